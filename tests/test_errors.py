"""Error responses, and what the log says of their causes."""

from contextlib import contextmanager

import pytest
from sqlalchemy import event, exc

from app import db
from tests.conftest import on_sqlite
from tests.helpers.server import wait_until
from tests.helpers.statuses import STATUSES, failing_bot, request_every_status

DATABASE_UNAVAILABLE = {"error": "The database is unavailable, try again later"}
REQUESTS = [
    ("GET", "/api/users/status", None),
    ("GET", "/api/current_user", None),
    ("POST", "/api/signup", {"username": "bob", "password": "secret"}),
    ("POST", "/api/login", {"username": "ada", "password": "secret"}),
    ("POST", "/api/conversations", {"name": "New"}),
]
UNKNOWN_PATHS = ["/unknown", "/api", "/api/", "/API/test", "/api/test/", "/api//test", "/😀", "/%ff"]
WRONG_METHODS = [
    ("GET", "/api/signup", {"POST"}),
    ("GET", "/api/login", {"POST"}),
    ("GET", "/api/logout/1", {"POST"}),
    ("POST", "/api/password", {"PUT"}),
    ("GET", "/api/account", {"DELETE"}),
    ("POST", "/api/test", {"GET"}),
    ("POST", "/api/users/status", {"GET"}),
    ("DELETE", "/api/conversations", {"GET", "POST"}),
    ("POST", "/api/conversations/1", {"GET", "PUT", "PATCH", "DELETE"}),
    ("PUT", "/api/conversations/1/messages", {"GET", "POST"}),
    ("POST", "/api/conversations/1/messages/1", {"GET", "PUT"}),
    ("GET", "/api/conversations/1/messages/1/stop", {"POST"}),
]


def open_path(client, method, path, body):
    return client.open(path, method=method, json=body)


@pytest.fixture
def app(make_app):
    return make_app(failing_bot, LOGIN_RATE_LIMIT="1 per minute")


@pytest.fixture
def raise_in_database(app):
    """A function that has each statement fail with an exception."""

    def install(error):
        with app.app_context():
            event.listen(db.engine, "before_cursor_execute", lambda *args: raise_error(error))

    return install


def raise_error(error):
    raise error


def test_every_error_is_one_sentence_in_json(app):
    responses = request_every_status(app)
    assert [response.status_code for response in responses] == STATUSES
    for response in responses:
        if response.status_code >= 400:
            assert response.content_type == "application/json"
            assert list(response.json) == ["error"]
            assert response.json["error"].strip() == response.json["error"] != ""


@pytest.mark.parametrize(
    ("text", "status", "error", "retry_after"),
    [
        ("crash", 500, "Internal server error", None),
        ("fail", 502, "The bot failed to answer", None),
        ("silent", 504, "The bot took too long to answer", None),
        ("busy", 503, "The bot is busy, try again later", "7"),
        ("too long", 413, "The message is too long for the bot", None),
    ],
)
def test_error_of_the_bot_says_nothing_of_its_cause_but_the_log_does(ada, caplog, text, status, error, retry_after):
    response = ada.send_message(ada.create_conversation(), text)
    assert (response.status_code, response.json) == (status, {"error": error})
    assert response.headers.get("Retry-After") == retry_after
    assert "cause" not in f"{response.headers}"
    assert "the cause" in caplog.text
    assert ("Traceback" in caplog.text) is (status == 500)


@on_sqlite
def test_unknown_path_returns_404(client):
    for path in UNKNOWN_PATHS:
        for method in ("GET", "POST", "DELETE"):
            response = client.open(path, method=method)
            assert (response.status_code, response.json) == (404, {"error": "Not found"}), (method, path)


@on_sqlite
def test_wrong_method_returns_405_with_the_allowed_methods(client):
    for method, path, allowed in WRONG_METHODS:
        response = client.open(path, method=method)
        assert (response.status_code, response.json) == (405, {"error": "Method not allowed"}), (method, path)
        assert set(response.headers["Allow"].split(", ")) - {"HEAD", "OPTIONS"} == allowed, (method, path)


@pytest.mark.parametrize(
    "kind",
    [
        exc.OperationalError,
        exc.InterfaceError,
        exc.InternalError,
        exc.NotSupportedError,
        exc.DatabaseError,
        exc.TimeoutError,
    ],
)
def test_unavailable_database_returns_503_and_is_logged_in_one_line(ada, raise_in_database, caplog, kind):
    raise_in_database(kind() if kind is exc.TimeoutError else kind("SELECT secret", None, Exception("the\ncause")))
    for method, path, body in REQUESTS:
        caplog.clear()
        response = open_path(ada, method, path, body)
        assert (response.status_code, response.json) == (503, DATABASE_UNAVAILABLE), path
        assert int(response.headers["Retry-After"]) > 0
        [error] = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
        assert error.startswith("The database of DATABASE_URL cannot be used (")
        assert "\n" not in error
        assert "secret" not in caplog.text
        assert "Traceback" not in caplog.text


def test_request_after_the_database_was_unavailable_succeeds(app, ada):
    def fail_once(*args):
        raise exc.OperationalError("SELECT 1", None, Exception("gone"))

    with app.app_context():
        event.listen(db.engine, "before_cursor_execute", fail_once, once=True)
    assert ada.get("/api/current_user").status_code == 503
    assert ada.get("/api/current_user").status_code == 200


@pytest.mark.parametrize(("method", "path", "body"), [REQUESTS[0], *REQUESTS[2:4]])
def test_database_that_cannot_be_reached_returns_503(make_app, tmp_path, method, path, body):
    for url in (f"sqlite:///{tmp_path}", "postgresql://127.0.0.1:1/none"):
        response = open_path(make_app(DATABASE_URL=url).test_client(), method, path, body)
        assert (response.status_code, response.json) == (503, DATABASE_UNAVAILABLE)


def test_database_without_tables_returns_503_and_the_log_says_what_to_run(make_app, empty_database, caplog):
    response = make_app(DATABASE_URL=empty_database).test_client().get("/api/users/status")
    assert (response.status_code, response.json) == (503, DATABASE_UNAVAILABLE)
    assert "The database lacks its tables: run python -m flask db upgrade" in caplog.text


def test_file_that_is_no_database_returns_503(make_app, tmp_path):
    (tmp_path / "text.db").write_text("no database " * 1000)
    response = make_app(DATABASE_URL=f"sqlite:///{tmp_path / 'text.db'}").test_client().get("/api/users/status")
    assert (response.status_code, response.json) == (503, DATABASE_UNAVAILABLE)


@pytest.mark.parametrize(
    "error", [exc.ProgrammingError("SELECT secret", None, Exception("the cause")), ZeroDivisionError("the cause")]
)
def test_bug_returns_500_without_its_cause_and_is_logged_once_with_traceback(
    app, ada, raise_in_database, caplog, error
):
    caplog.clear()
    raise_in_database(error)
    response = ada.get("/api/conversations")
    assert (response.status_code, response.json) == (500, {"error": "Internal server error"})
    assert "cause" not in f"{response.headers}"
    assert [record.levelname for record in caplog.records].count("ERROR") == 1
    assert "Traceback" in caplog.text
    assert "test_errors.py" in caplog.text
    assert "secret" not in caplog.text


REFUSE = {
    "sqlite": """CREATE TRIGGER refuse BEFORE {event} ON message WHEN NEW.text LIKE '%words%'
        BEGIN SELECT RAISE(ABORT, 'refused'); END""",
    "postgresql": "ALTER TABLE message ADD CONSTRAINT refuse CHECK (text NOT LIKE '%words%' OR sender <> '{sender}')",
}
ALLOW = {"sqlite": "DROP TRIGGER refuse", "postgresql": "ALTER TABLE message DROP CONSTRAINT refuse"}


@contextmanager
def messages_refused(app, **names):
    """Have the database refuse messages that contain "words" while the block is executed."""
    with app.app_context(), db.engine.begin() as connection:
        connection.exec_driver_sql(REFUSE[connection.dialect.name].format(**names).replace("%", "%%"))
    try:
        yield
    finally:
        with app.app_context(), db.engine.begin() as connection:
            connection.exec_driver_sql(ALLOW[connection.dialect.name])


def test_database_error_at_a_send_is_logged_without_the_message(app, ada, caplog):
    conversation_id = ada.create_conversation()
    with messages_refused(app, event="INSERT", sender="user"):
        response = ada.send_message(conversation_id, "my words")
    assert response.status_code == 500
    assert "Traceback" in caplog.text
    assert "my words" not in caplog.text


def test_database_error_at_the_end_of_a_reply_is_logged_without_the_message(app, ada, caplog):
    conversation_id = ada.create_conversation()
    with messages_refused(app, event="UPDATE", sender="bot"):
        headers = {"Prefer": "respond-async", "X-Request-ID": "request-7"}
        response = ada.send_message(conversation_id, "words", headers=headers)
        wait_until(lambda: "Replies cannot be saved" in caplog.text)
    assert [record for record in caplog.records if record.levelname == "ERROR"]
    assert "Traceback" in caplog.text
    assert "words" not in caplog.text
    wait_until(lambda: "status" not in ada.get_message(conversation_id, response.json[1]["id"]).json)


def test_error_of_a_client_leaves_no_traceback(ada, caplog):
    ada.post("/api/login", json=[])
    ada.post("/api/login", data=b"\x80", content_type="application/json")
    ada.put("/api/conversations/9", json={"name": "x"})
    ada.patch("/api/login")
    ada.get("/%ff")
    assert not any(record.exc_info for record in caplog.records)
