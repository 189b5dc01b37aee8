"""GET /api/health: whether the database answers within a second."""

import sqlite3
from contextlib import closing, contextmanager
from pathlib import Path

import psycopg
from sqlalchemy.engine import make_url

from tests.conftest import on_postgresql, on_sqlite
from tests.helpers.server import measure

UNAVAILABLE = {"error": "The database is unavailable, try again later"}
MAX_SECONDS = 5  # one, and what a busy machine takes; other requests wait for ten


def check_unavailable(client):
    """Assert that the health is 503, soon."""
    seconds, response = measure(client.get, "/api/health")
    assert (response.status_code, response.json) == (503, UNAVAILABLE)
    assert int(response.headers["Retry-After"]) > 0
    assert response.headers["Cache-Control"] == "no-store"
    assert seconds < MAX_SECONDS


def check_available(client):
    response = client.get("/api/health")
    assert (response.status_code, response.json) == (200, {"status": "ok"})
    assert response.headers["Cache-Control"] == "no-store"


@contextmanager
def lock_sqlite(url):
    """Let no other connection even read a SQLite database."""
    with closing(sqlite3.connect(make_url(url).database, isolation_level=None)) as connection:
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("BEGIN EXCLUSIVE")
        yield


@contextmanager
def lock_postgresql(url):
    """Let no other connection even read the users."""
    with psycopg.connect(url.replace("postgres://", "postgresql://")) as connection:
        connection.execute('LOCK TABLE "user"')
        yield
        connection.rollback()


def test_health_returns_ok(client):
    check_available(client)


@on_sqlite
def test_health_returns_503_while_the_file_of_the_database_is_missing(client, database):
    path = Path(make_url(database).database)
    check_available(client)
    other_path = path.rename(path.with_name("other.db"))
    check_unavailable(client)
    assert not path.exists()
    other_path.rename(path)
    check_available(client)


@on_sqlite
def test_health_on_sqlite_returns_503_while_another_program_locks_the_file(client, database):
    with lock_sqlite(database):
        check_unavailable(client)
    check_available(client)


@on_postgresql
def test_health_on_postgresql_returns_503_while_the_query_takes_longer_than_a_second(client, database):
    with lock_postgresql(database):
        check_unavailable(client)
    check_available(client)


def test_health_without_tables_returns_503(make_app, empty_database):
    check_unavailable(make_app(DATABASE_URL=empty_database).test_client())


def test_unavailable_database_is_not_logged_by_health(make_app, empty_database, caplog):
    check_unavailable(make_app(DATABASE_URL=empty_database).test_client())
    assert caplog.records == []
