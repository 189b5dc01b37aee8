"""The HTTP server around the application: malformed requests, header limits, proxies, and TLS errors."""

import socket
import struct
from contextlib import suppress

import pytest

from tests.helpers.server import HttpClient, connect, format_head, read_response, receive_all
from tests.helpers.tls import create_certificate, create_tls_context
from tests.slow.conftest import run_server

CHUNKED = ("Content-Type: application/json", "Transfer-Encoding: chunked")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of the database and of a Unix socket."""
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def server(folder):
    arguments = ["--bind=127.0.0.1:0", f"--bind=unix:{folder / 'socket'}"]
    with run_server(f"sqlite:///{folder / 'chat.db'}", arguments=arguments) as server:
        yield server


@pytest.fixture(scope="module")
def tls_server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    arguments = [f"--certfile={create_certificate(folder)}"]
    with run_server(f"sqlite:///{folder / 'chat.db'}", arguments=arguments) as server:
        yield server


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
    "unknown version": (b"GET / HTTP/9.9\r\n\r\n", 400),
    "space in header name": (format_head("GET /api/test HTTP/1.1", "Bad Header: x"), 400),
    "NUL in header": (format_head("GET /api/test HTTP/1.1", "X-Bad: \0"), 400),
    "two hosts": (format_head("GET /api/test HTTP/1.1", "Host: other"), 400),
    "two lengths": (format_head(LOGIN, "Content-Length: 1", "Content-Length: 2") + b"xx", 400),
    "length and chunks": (format_head(LOGIN, "Content-Length: 5", "Transfer-Encoding: chunked") + b"0\r\n\r\n", 400),
    "unknown coding": (format_head(LOGIN, "Transfer-Encoding: unknown"), 501),
    "long request line": (format_head(f"GET /{'x' * 9000} HTTP/1.1"), 414),
    "long header": (format_head("GET /api/test HTTP/1.1", f"Accept: {'x' * 9000}"), 431),
    "many headers": (format_head("GET /api/test HTTP/1.1", *["X-Many: x"] * 65), 431),
    "endless header": (b"GET /api/test HTTP/1.1\r\nAccept: " + b"x" * 1_000_000, 431),
}


@pytest.mark.parametrize(("data", "status"), MALFORMED_REQUESTS.values(), ids=MALFORMED_REQUESTS)
def test_malformed_request_is_refused(server, data, status):
    workers = server.all_workers()
    response = exchange(connect(server.port), data)
    assert (response.status, response.headers["Connection"]) == (status, "close")
    with server.client() as client:
        server.wait_for(client.get("/api/current_user").headers["X-Request-ID"])
    assert server.workers() == workers
    assert "Traceback" not in server.output


@pytest.mark.parametrize(
    "body", [b"nonsense\r\n", b"5\r\nabcdeXX", b"5;\x01\r\n{}\r\n", b"2\r\n{}\r\n0\r\nBad Name: x\r\n\r\n"]
)
def test_malformed_chunk_returns_400(server, body):
    response = exchange(connect(server.port), format_head(LOGIN, *CHUNKED) + body)
    assert response.status == 400
    assert list(response.json) == ["error"]


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
            ("POST", "/api/unknown", {"x": "y" * 10_000}, 404),
            ("PUT", "/api/test", {"x": 1}, 405),
            ("POST", "/api/conversations", {"name": "Conversation"}, 201),
        ):
            response = client.request(method, path, body)
            assert (response.status, client.connection.sock.getsockname()) == (status, address)


LONG_BODY = b'{"name": "' + b"x" * 2**22 + b'"}'


@pytest.mark.parametrize(
    ("field", "data", "statuses"),
    [
        (f"Content-Length: {len(LONG_BODY)}", LONG_BODY, [413]),
        (CHUNKED[1], b"%x\r\n%s\r\n0\r\n\r\n" % (len(LONG_BODY), LONG_BODY), [411, 413]),
    ],
    ids=["length", "chunks"],
)
def test_body_above_2_mib_returns_413_to_client_that_sends_all(server, field, data, statuses):
    response = exchange(connect(server.port), format_head(LOGIN, CHUNKED[0], field) + data)
    assert response.status in statuses
    assert list(response.json) == ["error"]


@pytest.mark.parametrize(
    ("field", "data"),
    [("Content-Length: 16", b'{"name": "New"}'), (CHUNKED[1], b'f\r\n{"name": "New"}\r\n')],
    ids=["length", "chunks"],
)
def test_incomplete_body_changes_nothing(server, field, data):
    with server.create_logged_in_client(f"user {len(data)}") as client:
        head = format_head("POST /api/conversations HTTP/1.1", CHUNKED[0], field, cookie=client.cookie)
        assert exchange(connect(server.port), head + data).status == 400
        assert client.get("/api/conversations").json == []


@pytest.mark.parametrize(
    "field",
    [
        *("SCRIPT_NAME: /api", "PATH_INFO: /api/unknown", "X-Forwarded-Prefix: /api"),
        *("X-Forwarded-Proto: https", "X-Forwarded-Ssl: on", "X-Forwarded-Protocol: ssl", "X_Request_ID: underscored"),
    ],
)
@pytest.mark.parametrize("is_unix", [False, True], ids=["tcp", "unix"])  # where gunicorn believes proxies by default
def test_header_of_unknown_proxy_is_ignored(server, folder, is_unix, field):
    connection = socket.socket(socket.AF_UNIX if is_unix else socket.AF_INET)
    connection.connect(f"{folder}/socket" if is_unix else ("127.0.0.1", server.port))
    response = exchange(connection, format_head("GET /api/test HTTP/1.1", field))
    assert response.status == 200
    assert "Strict-Transport-Security" not in response.headers
    assert response.headers["X-Request-ID"] != "underscored"


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
