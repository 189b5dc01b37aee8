"""Request ids and the log."""

import json
import logging
import re
from datetime import datetime

import pytest
from flask import g
from flask.logging import default_handler

from tests.conftest import create_logged_in_client, on_sqlite
from tests.helpers.statuses import failing_bot, request_every_status

pytestmark = on_sqlite
LINE = re.compile(r"(?P<time>\S+) (?P<level>[A-Z]+) \[(?P<request_id>[\w.-]+)\] (?P<message>.+)")
REQUEST = re.compile(
    r"(?P<method>[A-Z]+) (?P<path>\S+) (?P<status>\d{3}) (?P<ms>\d+\.\d) ms user=(?P<user>\S+) from (?P<address>\S+)"
)


@pytest.fixture
def log_app(make_app):
    """A function that returns an application whose log is on the standard error output."""
    apps = []

    def make(**settings):
        apps.append(make_app(failing_bot, LOGIN_RATE_LIMIT="1 per minute", **settings))
        apps[-1].logger.addHandler(default_handler)
        return apps[-1]

    yield make
    for app in apps:
        app.logger.removeHandler(default_handler)


def parse_lines(text):
    """Return the groups of each line of the log; each must have the documented form."""
    return [LINE.fullmatch(line).groupdict() for line in text.splitlines()]


both_formats = pytest.mark.parametrize("log_format", ["text", "json"])


# Request ids


def test_every_response_has_a_request_id_of_its_own(log_app):
    responses = request_every_status(log_app())
    ids = {response.headers["X-Request-ID"] for response in responses}
    assert len(ids) == len(responses)
    assert all(re.fullmatch("[0-9a-f]{16}", id) for id in ids)


@pytest.mark.parametrize(
    ("request_id", "expected"),
    [
        *((request_id, request_id) for request_id in ("abc-1.2_3", "a" * 64, "1")),
        *((invalid, "[0-9a-f]{16}") for invalid in ("", " ", "a b", "a" * 65, "é", "<script>", "a;b", "a\tb", "[x]")),
    ],
)
def test_request_id_of_the_client_is_kept_if_it_is_valid_and_replaced_if_not(client, request_id, expected):
    response = client.get("/api/test", headers={"X-Request-ID": request_id})
    assert re.fullmatch(expected, response.headers["X-Request-ID"])


# The log


def test_each_request_is_one_line_of_the_log(log_app, capsys):
    client = create_logged_in_client(log_app(), "ada")
    path = f"/api/conversations/{client.create_conversation()}"
    capsys.readouterr()
    responses = {
        ("GET", "/api/conversations", "200", "1"): client.get("/api/conversations?q=secret"),
        ("POST", f"{path}/messages", "201", "1"): client.post(f"{path}/messages", json={"text": "Hello"}),
        ("DELETE", path, "204", "1"): client.delete(path),
        ("POST", "/api/logout/99", "403", "1"): client.post("/api/logout/99"),
        ("GET", "/unknown", "404", "-"): client.get("/unknown"),
        ("PUT", "/api/login", "405", "-"): client.put("/api/login"),
        ("POST", "/api/logout/1", "200", "1"): client.logout(),
        ("GET", "/api/current_user", "401", "-"): client.get("/api/current_user"),
    }
    lines = parse_lines(capsys.readouterr().err)
    for (fields, response), line in zip(responses.items(), lines, strict=True):
        assert (line["level"], line["request_id"]) == ("INFO", response.headers["X-Request-ID"])
        assert datetime.fromisoformat(line["time"]).tzinfo
        *logged, milliseconds, user, address = REQUEST.fullmatch(line["message"]).groups()
        assert (*logged, user, address) == (*fields, "127.0.0.1")
        assert 0 <= float(milliseconds) < 60_000


def test_log_format_json_is_one_object_for_each_request(log_app, capsys):
    client = create_logged_in_client(log_app(LOG_FORMAT="json"), "ada")
    capsys.readouterr()
    client.get("/api/conversations", headers={"X-Request-ID": "my-id"})
    [line] = capsys.readouterr().err.splitlines()
    fields = json.loads(line)
    assert datetime.fromisoformat(fields.pop("time")).tzinfo
    assert 0 <= fields.pop("duration_ms") < 60_000
    assert re.fullmatch(r"GET /api/conversations 200 \d+\.\d ms user=1 from 127\.0\.0\.1", fields.pop("message"))
    assert fields == {
        **{"level": "INFO", "logger": "app.requests", "request_id": "my-id", "method": "GET"},
        **{"path": "/api/conversations", "status": 200, "address": "127.0.0.1", "user_id": 1},
    }


@both_formats
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/login", {"username": "ada", "password": "wrong"}),
        ("/api/conversations/1/messages", {"text": "fail"}),
        ("/api/conversations/1/messages", {"text": "crash"}),
    ],
)
def test_every_line_of_a_request_has_its_request_id(log_app, capsys, log_format, path, body):
    client = create_logged_in_client(log_app(LOG_FORMAT=log_format), "ada")
    client.create_conversation()
    capsys.readouterr()
    client.post(path, json=body, headers={"X-Request-ID": "my-id"})
    output = capsys.readouterr().err
    if log_format == "json":
        ids = [json.loads(line)["request_id"] for line in output.splitlines()]
    else:
        ids = re.findall(r"^\S+ [A-Z]+ \[(.*?)\]", output, re.MULTILINE)
    assert ids == ["my-id"] * 2


def test_traceback_in_json_is_a_field_of_one_line(log_app, capsys):
    client = create_logged_in_client(log_app(LOG_FORMAT="json"), "ada")
    client.send_message(client.create_conversation(), "crash")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert ["RuntimeError: the cause" in line["exception"] for line in lines if "exception" in line] == [True]


def test_warning_of_a_library_has_the_format_of_the_log(log_app, capsys):
    record = logging.makeLogRecord({"name": "sqlalchemy.pool", "levelno": logging.WARNING, "msg": "a\nb"})
    with log_app(LOG_FORMAT="json").test_request_context():
        g.request_id = "my-id"
        logging.lastResort.handle(record)  # which is where it gets without a handler of its own
    expected = {"logger": "sqlalchemy.pool", "message": "a\nb", "request_id": "my-id"}
    assert json.loads(capsys.readouterr().err).items() >= expected.items()


def test_health_is_not_logged(log_app, capsys):
    log_app().test_client().get("/api/health")
    assert capsys.readouterr().err == ""


@both_formats
def test_log_contains_no_password_text_name_query_or_cookie(log_app, capsys, log_format):
    client = log_app(LOG_FORMAT=log_format).test_client()
    client.signup("USERNAME", "PASSWORD")
    for username, password in (("PASSWORD", "PASSWORD"), ("USERNAME", "PASSWORD wrong"), ("USERNAME", "PASSWORD")):
        client.login(username, password)
    for body in (["PASSWORD"], {"password": ["PASSWORD"]}):
        client.post("/api/login?password=PASSWORD", json=body)
    client.post("/api/login", data='{"password": "PASSWORD', content_type="application/json")
    client = create_logged_in_client(client.application, "bob")
    conversation_id = client.create_conversation("NAME")
    for id, text in ((conversation_id, "TEXT"), (999, "TEXT"), (conversation_id, {"TEXT": "TEXT"})):
        client.send_message(id, text)
    client.get("/api/conversations?q=TEXT")
    client.put("/api/password", json={"current_password": "PASSWORD", "new_password": "PASSWORD"})
    output = capsys.readouterr().err
    assert output.count("\n") >= 15
    assert not re.search("USERNAME|PASSWORD|TEXT|NAME|correct horse", output)
    assert client.session_cookie not in output


@both_formats
@pytest.mark.parametrize(
    "path", ["/a%0AINFO GET /forged", "/a%0D%0Aforged", "/a\x85forged", "/%1b[31mforged", "/a%E2%80%A8forged", "/a b é"]
)
def test_path_cannot_forge_a_line_of_the_log(log_app, capsys, log_format, path):
    log_app(LOG_FORMAT=log_format).test_client().get(path)
    output = capsys.readouterr().err
    assert output.count("\n") == 1
    assert output.rstrip("\n").isprintable()
    if log_format == "text":
        assert REQUEST.fullmatch(parse_lines(output)[0]["message"])


def test_failure_before_the_request_begins_is_a_500_in_json_with_a_request_id(app, client, monkeypatch):
    monkeypatch.setattr(app.session_interface, "open_session", lambda *args: 1 / 0)
    response = client.get("/api/test")
    assert (response.status_code, response.json) == (500, {"error": "Internal server error"})
    assert re.fullmatch("[0-9a-f]{16}", response.headers["X-Request-ID"])


@both_formats
def test_stream_is_logged_when_it_ends_with_what_it_notes(log_app, capsys, log_format):
    app = log_app(LOG_FORMAT=log_format)

    @app.get("/stream")
    def stream():
        fields = g.log_fields

        def generate():
            for fields["characters"] in range(1, 4):
                yield "x"

        return app.response_class(generate(), mimetype="text/event-stream")

    response = app.test_client().get("/stream", buffered=False)
    assert next(response.response) == b"x"
    assert capsys.readouterr().err == ""
    response.close()
    output = capsys.readouterr().err
    if log_format == "json":
        assert json.loads(output)["characters"] == 1
    else:
        assert output.endswith(" user=- from 127.0.0.1 characters=1\n")


# Bodies


@pytest.mark.parametrize(("coding", "status"), [("gzip", 415), ("br", 415), ("gzip, identity", 415), ("Identity", 401)])
def test_body_with_a_content_coding_returns_415(client, coding, status):
    body = {"username": "ada", "password": "secret"}
    response = client.post("/api/login", json=body, headers={"Content-Encoding": coding})
    assert response.status_code == status
    assert response.json["error"].startswith("The body must not be compressed") is (status == 415)


def test_longest_message_arrives_however_it_is_escaped(ada, conversation_id):
    body = json.dumps({"text": "😀" * 100_000})
    assert len(body) > 1_200_000
    path = f"/api/conversations/{conversation_id}/messages"
    assert ada.post(path, data=body, content_type="application/json").status_code == 201
