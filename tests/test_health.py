"""GET /api/health: whether the database answers."""

import pytest

from app.schema import upgrade_schema
from tests.conftest import on_sqlite
from tests.helpers.data import get_answer

UNAVAILABLE = 503, {"error": "The database is unavailable, try again later"}


def test_health_returns_ok(client):
    response = client.get("/api/health")
    assert get_answer(response) == (200, {"status": "ok"})
    assert response.headers["Cache-Control"] == "no-store"


def check_unavailable(app):
    """Assert that the health is 503."""
    response = app.test_client().get("/api/health")
    assert get_answer(response) == UNAVAILABLE
    assert int(response.headers["Retry-After"]) > 0
    assert response.headers["Cache-Control"] == "no-store"


def test_health_without_tables_returns_503(make_app, empty_database):
    check_unavailable(make_app(DATABASE_URL=empty_database))


@on_sqlite
def test_health_returns_503_when_the_file_was_deleted(make_app, tmp_path):
    path = tmp_path / "chat.db"
    app = make_app(DATABASE_URL=f"sqlite:///{path}")
    upgrade_schema(app)
    assert app.test_client().get("/api/health").status_code == 200
    path.unlink()
    check_unavailable(app)


@on_sqlite
@pytest.mark.parametrize("url", ["sqlite:///{}", "sqlite:///{}/missing.db", "postgresql://127.0.0.1:1/none"])
def test_health_without_a_database_returns_503(make_app, tmp_path, url):
    check_unavailable(make_app(DATABASE_URL=url.format(tmp_path)))
