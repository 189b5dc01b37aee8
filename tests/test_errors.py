"""Error responses, and what the log says of their causes."""

from contextlib import contextmanager

import pytest
from sqlalchemy import event, exc

from app import db
from tests.conftest import on_sqlite
from tests.helpers.bots import start_reply
from tests.helpers.data import get_answer
from tests.helpers.server import wait_until
from tests.helpers.statuses import STATUSES, failing_bot, request_every_status

DATABASE_UNAVAILABLE = 503, {"error": "The database is unavailable, try again later"}
DATABASE_ERRORS = exc.OperationalError, exc.InterfaceError, exc.InternalError, exc.NotSupportedError, exc.DatabaseError
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
    ("GET", "/api/logout/1", {"POST"}),
    ("POST", "/api/password", {"PUT"}),
    ("GET", "/api/account", {"DELETE"}),
    ("POST", "/api/test", {"GET"}),
    ("DELETE", "/api/conversations", {"GET", "POST"}),
    ("POST", "/api/conversations/1", {"GET", "PUT", "PATCH", "DELETE"}),
    ("POST", "/api/conversations/1/messages/1", {"GET", "PUT"}),
]


@pytest.fixture
def app(make_app):
    return make_app(failing_bot, LOGIN_RATE_LIMIT="1 per minute")


@pytest.fixture
def raise_in_database(app):
    """A function that has each statement, or the next one, fail with an exception."""

    def install(error, once=False):
        def fail(*args):
            raise error

        with app.app_context():
            event.listen(db.engine, "before_cursor_execute", fail, once=once)

    return install


def test_every_error_is_one_sentence_in_json(app):
    responses = request_every_status(app)
    assert [response.status_code for response in responses] == STATUSES
    for response in responses:
        if response.status_code >= 400:
            assert (response.content_type, [*response.json]) == ("application/json", ["error"])
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
    assert get_answer(response) == (status, {"error": error})
    assert response.headers.get("Retry-After") == retry_after
    assert "cause" not in f"{response.headers}"
    assert "the cause" in caplog.text
    assert ("Traceback" in caplog.text) is (status == 500)


@on_sqlite
def test_unknown_path_returns_404(client):
    for path in UNKNOWN_PATHS:
        for method in ("GET", "POST", "DELETE"):
            assert get_answer(client.open(path, method=method)) == (404, {"error": "Not found"}), (method, path)


@on_sqlite
def test_wrong_method_returns_405_with_the_allowed_methods(client):
    for method, path, allowed in WRONG_METHODS:
        response = client.open(path, method=method)
        assert get_answer(response) == (405, {"error": "Method not allowed"}), (method, path)
        assert set(response.headers["Allow"].split(", ")) - {"HEAD", "OPTIONS"} == allowed, (method, path)


@pytest.mark.parametrize(
    "error",
    [
        *(kind("SELECT secret", None, Exception("the\ncause")) for kind in DATABASE_ERRORS),
        exc.TimeoutError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_unavailable_database_returns_503_and_is_logged_in_one_line(ada, raise_in_database, caplog, error):
    raise_in_database(error)
    for method, path, body in REQUESTS:
        caplog.clear()
        response = ada.open(path, method=method, json=body)
        assert get_answer(response) == DATABASE_UNAVAILABLE, path
        assert int(response.headers["Retry-After"]) > 0
        [line] = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
        assert line.startswith("The database of DATABASE_URL cannot be used (")
        assert "\n" not in line
        assert "secret" not in caplog.text
        assert "Traceback" not in caplog.text


def test_request_after_the_database_was_unavailable_succeeds(ada, raise_in_database):
    raise_in_database(exc.OperationalError("SELECT 1", None, Exception("gone")), once=True)
    assert [ada.get("/api/current_user").status_code for _ in range(2)] == [503, 200]


@on_sqlite
@pytest.mark.parametrize("url", ["sqlite:///{}", "sqlite:///{}/text.db", "postgresql://127.0.0.1:1/none"])
def test_database_that_cannot_be_reached_or_is_none_returns_503(make_app, tmp_path, url):
    (tmp_path / "text.db").write_text("no database " * 1000)
    client = make_app(DATABASE_URL=url.format(tmp_path)).test_client()
    for method, path, body in (REQUESTS[0], *REQUESTS[2:4]):
        assert get_answer(client.open(path, method=method, json=body)) == DATABASE_UNAVAILABLE, path


def test_database_without_tables_returns_503_and_the_log_says_what_to_run(make_app, empty_database, caplog):
    client = make_app(DATABASE_URL=empty_database).test_client()
    assert get_answer(client.get("/api/users/status")) == DATABASE_UNAVAILABLE
    assert "The database lacks its tables: run python -m flask db upgrade" in caplog.text


@pytest.mark.parametrize(
    "error", [exc.ProgrammingError("SELECT secret", None, Exception("the cause")), ZeroDivisionError("the cause")]
)
def test_bug_returns_500_without_its_cause_and_is_logged_once_with_traceback(ada, raise_in_database, caplog, error):
    caplog.clear()
    raise_in_database(error)
    response = ada.get("/api/conversations")
    assert get_answer(response) == (500, {"error": "Internal server error"})
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
        _, reply = start_reply(ada, conversation_id, "my words")
        wait_until(lambda: "Replies cannot be saved" in caplog.text)
    assert [record for record in caplog.records if record.levelname == "ERROR"]
    assert "Traceback" in caplog.text
    assert "my words" not in caplog.text
    wait_until(lambda: "status" not in ada.get_message(conversation_id, reply["id"]).json)


def test_error_of_a_client_leaves_no_traceback(ada, caplog):
    ada.post("/api/login", json=[])
    ada.post("/api/login", data=b"\x80", content_type="application/json")
    ada.put("/api/conversations/9", json={"name": "x"})
    ada.patch("/api/login")
    ada.get("/%ff")
    assert not any(record.exc_info for record in caplog.records)
