"""The HTTP server around the application: malformed requests, header limits, proxies, file modes and TLS errors."""

import os
import socket
import stat
import struct
import subprocess
import sys
from contextlib import suppress

import pytest

from tests.helpers.server import (
    ROOT,
    HttpClient,
    Server,
    connect,
    find_free_port,
    format_head,
    read_response,
    receive_all,
    wait_until,
)
from tests.helpers.tls import create_certificate, create_tls_context

pytestmark = pytest.mark.slow

CHUNKED = ("Content-Type: application/json", "Transfer-Encoding: chunked")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of the database and of a Unix socket."""
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def server(folder):
    server = Server(
        "--bind=127.0.0.1:0",
        f"--bind=unix:{folder / 'socket'}",
        DATABASE_URL=f"sqlite:///{folder / 'chatbot.db'}",
    )
    yield server
    server.kill()


@pytest.fixture(scope="module")
def tls_server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    path = create_certificate(folder)
    server = Server(f"--certfile={path}", f"--keyfile={path}", DATABASE_URL=f"sqlite:///{folder / 'chatbot.db'}")
    yield server
    server.kill()


def exchange(connection, data):
    """Send data, close the sending side and return the response."""
    with connection:
        with suppress(OSError):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        return read_response(connection)


LOGIN = "POST /api/login HTTP/1.1"
MALFORMED_REQUESTS = {
    "no HTTP": (b"\0" * 10_000, 414),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400),
    "unknown version": (b"GET / HTTP/9.9\r\n\r\n", 400),
    "lower-case method": (format_head("get / HTTP/1.1"), 400),
    "space in header name": (format_head("GET /api/test HTTP/1.1", "Bad Header: x"), 400),
    "NUL in header": (format_head("GET /api/test HTTP/1.1", "X-Bad: \0"), 400),
    "two hosts": (format_head("GET /api/test HTTP/1.1", "Host: other"), 400),
    "folded header": (format_head("GET /api/test HTTP/1.1", "X-A: b", " c"), 400),
    "negative length": (format_head(LOGIN, "Content-Length: -1"), 400),
    "two lengths": (format_head(LOGIN, "Content-Length: 1", "Content-Length: 2") + b"xx", 400),
    "length and chunks": (format_head(LOGIN, "Content-Length: 5", "Transfer-Encoding: chunked") + b"0\r\n\r\n", 400),
    "unknown coding": (format_head(LOGIN, "Transfer-Encoding: unknown"), 501),
    "unknown expectation": (format_head(LOGIN, "Expect: 200-ok"), 417),
    "long request line": (format_head(f"GET /{'x' * 9000} HTTP/1.1"), 414),
    "long header": (format_head("GET /api/test HTTP/1.1", f"Accept: {'x' * 9000}"), 431),
    "many headers": (format_head("GET /api/test HTTP/1.1", *["X-Many: x"] * 65), 431),
    "endless header": (b"GET /api/test HTTP/1.1\r\nAccept: " + b"x" * 1_000_000, 431),
}


@pytest.mark.parametrize(("data", "status"), MALFORMED_REQUESTS.values(), ids=MALFORMED_REQUESTS)
def test_malformed_request_is_refused(server, data, status):
    response = exchange(connect(server.port), data)
    assert response.status == status
    assert response.headers["Connection"] == "close"


@pytest.mark.parametrize(
    "body", [b"nonsense\r\n", b"5\r\nabcdeXX", b"5;\x01\r\n{}\r\n", b"2\r\n{}\r\n0\r\nBad Name: x\r\n\r\n"]
)
def test_malformed_chunk_returns_400(server, body):
    response = exchange(connect(server.port), format_head(LOGIN, *CHUNKED) + body)
    assert response.status == 400
    assert list(response.json) == ["error"]


def test_malformed_requests_leave_workers_and_no_traceback(server):
    workers = server.all_workers()
    for data, _ in MALFORMED_REQUESTS.values():
        exchange(connect(server.port), data)
    with server.client() as client:
        assert client.get("/api/test").status == 200
    assert server.workers() == workers
    assert "Traceback" not in server.output


@pytest.mark.parametrize(
    "data",
    [
        format_head(LOGIN, *CHUNKED[:1], "Content-Length: 2") + b'{"password": "SECRET"}\r\n\r\n',
        b"GET /?password=SECRET HTTP/9.9\r\n\r\n",
        b"SECRET\r\n\r\n",
        format_head("GET /api/test HTTP/1.1", "Cookie SECRET"),
        format_head(LOGIN, *CHUNKED) + b"SECRET\r\n",
    ],
)
def test_log_quotes_nothing_of_malformed_request(server, data):
    exchange(connect(server.port), data)
    with server.client() as client:
        server.wait_for(client.get("/api/current_user").headers["X-Request-ID"])
    assert "SECRET" not in server.output


def test_log_names_what_was_malformed(server):
    exchange(connect(server.port), b"GET /?password=SECRET HTTP/9.9\r\n\r\n")
    server.wait_for(r"Invalid request from ip=127\.0\.0\.1: InvalidHTTPVersion$")


def test_connection_survives_refused_requests(server):
    with server.create_logged_in_client("connected") as client:
        address = client.connection.sock.getsockname()
        for method, path, body, status in (
            ("GET", "/api/unknown", None, 404),
            ("POST", "/api/conversations", [], 400),
            ("POST", "/api/unknown", {"x": "y" * 10_000}, 404),
            ("PUT", "/api/test", {"x": 1}, 405),
            ("POST", "/api/conversations", {"name": "Conversation"}, 201),
        ):
            assert client.request(method, path, body).status == status
            assert client.connection.sock.getsockname() == address


@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_body_above_2_mib_returns_413_to_client_that_sends_all(server, framing):
    body = b'{"name": "' + b"x" * 2**22 + b'"}'
    if framing == "length":
        data = format_head(LOGIN, "Content-Type: application/json", f"Content-Length: {len(body)}") + body
    else:
        data = format_head(LOGIN, *CHUNKED) + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    response = exchange(connect(server.port), data)
    assert response.status in ((413,) if framing == "length" else (411, 413))
    assert list(response.json) == ["error"]


@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_incomplete_body_changes_nothing(server, framing):
    with server.create_logged_in_client(f"incomplete {framing}") as client:
        body = b'{"name": "Conversation"}'
        length = f"Content-Length: {len(body) + 1}" if framing == "length" else "Transfer-Encoding: chunked"
        head = format_head("POST /api/conversations HTTP/1.1", CHUNKED[0], length, cookie=client.cookie)
        data = head + (body if framing == "length" else b"%x\r\n%s\r\n" % (len(body), body))
        assert exchange(connect(server.port), data).status == 400
        assert client.get("/api/conversations").json == []


def test_client_that_expects_100_continue_receives_it(server):
    body = b'{"username": "expecting", "password": "correct horse battery staple"}'
    fields = (CHUNKED[0], f"Content-Length: {len(body)}", "Expect: 100-continue")
    with connect(server.port) as connection, connection.makefile("rb") as response:
        connection.sendall(format_head("POST /api/signup HTTP/1.1", *fields))
        assert response.readline().startswith(b"HTTP/1.1 100")
        assert response.readline() == b"\r\n"
        connection.sendall(body)
        assert response.readline().startswith(b"HTTP/1.1 201")


def test_head_returns_headers_of_get_without_body(server):
    with server.client() as client:
        response = client.request("HEAD", "/api/test")
        assert (response.status, response.body) == (200, b"")
        assert response.headers["Content-Length"] == str(len(client.get("/api/test").body))


@pytest.fixture(params=["tcp", "unix"])
def connection(request, server, folder):
    """A connection by TCP or by the Unix socket, where gunicorn believes proxies by default."""
    if request.param == "tcp":
        return connect(server.port)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(folder / "socket"))
    return connection


@pytest.mark.parametrize(
    "field",
    [
        *("SCRIPT_NAME: /api", "PATH_INFO: /api/unknown", "X-Forwarded-Prefix: /api"),
        *("X-Forwarded-Proto: https", "X-Forwarded-Ssl: on", "X-Forwarded-Protocol: ssl", "X_Request_ID: underscored"),
    ],
)
def test_header_of_unknown_proxy_is_ignored(connection, field):
    response = exchange(connection, format_head("GET /api/test HTTP/1.1", field))
    assert response.status == 200
    assert "Strict-Transport-Security" not in response.headers
    assert response.headers["X-Request-ID"] != "underscored"


def test_files_of_database_are_private(server, folder):
    paths = list(folder.glob("chatbot.db*"))
    assert paths
    for path in paths:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def reset(connection):
    """Close a connection with a reset instead of an orderly end."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.parametrize(
    "data",
    [b"", format_head("GET /api/test HTTP/1.1"), b"\x16\x03\x01\x02\x00\x01", b"\0" * 1000],
    ids=["nothing", "http", "beginning", "zeros"],
)
def test_failed_tls_handshake_leaves_no_traceback(tls_server, data):
    with connect(tls_server.port) as connection:
        connection.sendall(data)
        with suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
        receive_all(connection)
    connection = connect(tls_server.port)
    connection.sendall(data)
    reset(connection)
    reset(create_tls_context().wrap_socket(connect(tls_server.port)))
    with HttpClient(tls_server.port, context=create_tls_context()) as client:
        tls_server.wait_for(client.get("/api/current_user").headers["X-Request-ID"])
    assert "Traceback" not in tls_server.output


def test_error_logfile_has_the_lines_of_requests(tmp_path):
    log, port = tmp_path / "error.log", find_free_port()
    settings = {"PORT": str(port), "DATABASE_URL": f"sqlite:///{tmp_path / 'chatbot.db'}"}
    command = [sys.executable, "run.py", f"--error-logfile={log}"]
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, **settings}, stderr=subprocess.DEVNULL) as program:
        wait_until(lambda: log.exists() and "Booting worker" in log.read_text())
        with HttpClient(port) as client:
            assert client.get("/api/test").status == 200
        program.terminate()
    assert "GET /api/test 200" in log.read_text()
