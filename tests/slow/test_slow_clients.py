"""Clients that send or read slowly, or not at all: time limits of the served program.

The limits take up to a minute, so all clients run at once, each in a thread, and each test looks at one of them.
"""

import re
import secrets
import select
import ssl
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain, repeat

import pytest

from tests.helpers.server import Server, connect, format_head, receive_all
from tests.helpers.tls import create_certificate, create_tls_context

pytestmark = pytest.mark.slow

MAX_SECONDS = 120  # that a client goes on if the server lets it
WAIT = 240  # seconds until every client must have finished
SLOW_SECONDS = 40  # longer than the server waits for a client that takes nothing
LIST_MESSAGES = 60  # of 100,000 characters that JSON makes six times longer: more than the kernel's buffers hold
BODY = b'{"username": "%s", "password": "correct horse battery staple"}'


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """The program at http and at https, on one database."""
    settings = {
        "DATABASE_URL": f"sqlite:///{tmp_path_factory.mktemp('database') / 'chatbot.db'}",
        "SECRET_KEY": secrets.token_hex(32),
        "SESSIONS_VALID_FROM": "2026-01-01T00:00:00Z",
        "SESSION_COOKIE_SECURE": "false",
        "PASSWORD_HASH_METHOD": "pbkdf2:sha256:1",
    }
    certificate = create_certificate(tmp_path_factory.mktemp("tls"))
    http = Server(**settings)
    try:
        https = Server(f"--certfile={certificate}", f"--keyfile={certificate}", **settings)
        yield http, https
        https.kill()
    finally:
        http.kill()


@pytest.fixture(scope="module")
def outcomes(servers):
    """What came of each of the slow clients, as futures by the name of the client's function."""
    http, https = servers
    with http.create_logged_in_client("ada") as client, ThreadPoolExecutor(32) as executor:
        conversation_id = client.create_conversation()
        for _ in range(LIST_MESSAGES):
            assert client.send_message(conversation_id, "a" + "\1" * 99_999).status == 201
        futures = {func.__name__: executor.submit(func, http.port) for func in HTTP_CLIENTS}
        futures |= {func.__name__: executor.submit(func, https.port) for func in HTTPS_CLIENTS}
        futures["read_nothing"] = executor.submit(read_list_late, http.port, client.cookie)
        futures["follow_silent_stream"] = executor.submit(follow_silent_stream, http, client)
        for name, connection, bytes_per_second in (
            ("read_600_kb_per_second", connect(http.port), 600_000),
            ("read_20_kb_per_second", connect(http.port), 20_000),
            ("read_20_kb_per_second_over_tls", connect_tls(https.port), 20_000),
        ):
            futures[name] = executor.submit(read_list_slowly, connection, client.cookie, bytes_per_second)
        yield futures


def connect_tls(port):
    return create_tls_context().wrap_socket(connect(port))


def drip(connection, chunks, interval=0.5):
    """Send one chunk per interval until the server responds or closes; return the seconds, and what the server sent."""
    start = time.monotonic()
    with connection:
        for chunk in chunks:
            if select.select([connection], [], [], interval)[0] or time.monotonic() > start + MAX_SECONDS:
                break
            with suppress(ConnectionError):
                connection.sendall(chunk)
        response = receive_all(connection)
        return time.monotonic() - start, response


def drip_after(connection, head, chunks):
    """Send the head of a request, then one chunk per interval."""
    connection.sendall(head)
    return drip(connection, chunks)


def send_nothing(port):
    return drip(connect(port), repeat(b""))


def send_second_request_never(port):
    return drip(connect(port), chain([format_head("GET /api/test HTTP/1.1")], []))


def drip_head(port):
    return drip(connect(port), chain([b"GET /api/test HTTP/1.1\r\nX-Slow: "], repeat(b"a")))


def drip_body(port):
    fields = ("Content-Type: application/json", "Content-Length: 1000")
    return drip_after(connect(port), format_head("POST /api/login HTTP/1.1", *fields), repeat(b" "))


CHUNKED = ("Content-Type: application/json", "Transfer-Encoding: chunked")


def drip_chunk_extension(port):
    chunks = chain([b"1;name="], repeat(b"a"))
    return drip_after(connect(port), format_head("POST /api/login HTTP/1.1", *CHUNKED), chunks)


def drip_trailer(port):
    chunks = chain([b"2\r\n{}\r\n0\r\nX-Trailer: "], repeat(b"a"))
    return drip_after(connect(port), format_head("POST /api/login HTTP/1.1", *CHUNKED), chunks)


def drip_unread_body(port):
    """Drip a body that the application refused for its length."""
    head = format_head("POST /api/login HTTP/1.1", "Content-Type: application/json", "Content-Length: 9999999")
    start = time.monotonic()
    with connect(port) as connection:
        connection.sendall(head)
        response = connection.recv(65536)
        drip(connection, repeat(b" "))
    return time.monotonic() - start, response


def pause_in_body(port):
    """Send half a body, and the other half after more than SEND_TIMEOUT and less than REQUEST_BODY_TIMEOUT."""
    body = BODY % b"pausing"
    fields = ("Content-Type: application/json", f"Content-Length: {len(body)}", "Connection: close")
    with connect(port) as connection:
        connection.sendall(format_head("POST /api/signup HTTP/1.1", *fields) + body[:10])
        time.sleep(SLOW_SECONDS)
        connection.sendall(body[10:])
        return receive_all(connection)


def pipeline_and_read_nothing(port):
    """Send requests without reading the responses; return the seconds until the server resets the connection."""
    start = time.monotonic()
    with connect(port) as connection, suppress(OSError):
        connection.settimeout(MAX_SECONDS)
        while True:
            connection.sendall(format_head("GET /api/openapi.json HTTP/1.1") * 10)
    return time.monotonic() - start


HTTP_CLIENTS = [
    send_nothing,
    send_second_request_never,
    drip_head,
    drip_body,
    drip_chunk_extension,
    drip_trailer,
    drip_unread_body,
    pause_in_body,
    pipeline_and_read_nothing,
]


def begin_no_handshake(port):
    return drip(connect(port), repeat(b""))


def drip_handshake(port):
    tls, _, outgoing = start_tls()
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return drip(connect(port), chain(split_bytes(outgoing.read()), repeat(b"")))


def drip_tls_record(port):
    """Drip a record that holds the head of a request."""
    tls, incoming, outgoing = start_tls()
    with connect(port) as connection:
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                connection.sendall(outgoing.read())
                incoming.write(connection.recv(65536))
        connection.sendall(outgoing.read())
        tls.write(format_head("GET /api/test HTTP/1.1", "X-Long: " + "a" * 1000))
        record = outgoing.read()
        while select.select([connection], [], [], 1)[0]:
            connection.recv(65536)  # session tickets
        return drip(connection, split_bytes(record))


def start_tls():
    """Return the client's end of a TLS connection, with its incoming and outgoing buffers."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    return create_tls_context().wrap_bio(incoming, outgoing, server_hostname="localhost"), incoming, outgoing


def split_bytes(data):
    return [data[index : index + 1] for index in range(len(data))]


HTTPS_CLIENTS = [begin_no_handshake, drip_handshake, drip_tls_record]


def read_list_slowly(connection, cookie, bytes_per_second):
    """Read a long list at a rate for SLOW_SECONDS, then the rest; return its announced and its actual length."""
    with connection:
        connection.sendall(format_head("GET /api/conversations HTTP/1.1", "Connection: close", cookie=cookie))
        data = bytearray()
        start = time.monotonic()
        while (elapsed := time.monotonic() - start) < SLOW_SECONDS:
            if len(data) < elapsed * bytes_per_second:
                data += connection.recv(4096)
            else:
                time.sleep(0.02)
        return get_lengths(data + receive_all(connection))


def read_list_late(port, cookie):
    """Read a long list, but nothing of it for longer than SEND_TIMEOUT; return its announced and actual length."""
    with connect(port) as connection:
        connection.sendall(format_head("GET /api/conversations HTTP/1.1", "Connection: close", cookie=cookie))
        time.sleep(SLOW_SECONDS + 10)
        return get_lengths(receive_all(connection))


def get_lengths(response):
    """Return the Content-Length of a response and the length of its body."""
    head, _, body = response.partition(b"\r\n\r\n")
    return int(re.search(rb"Content-Length: (\d+)", head)[1]), len(body)


def follow_silent_stream(server, client):
    """Return the last event of a reply that is silent for longer than SEND_TIMEOUT, but for comments."""
    with server.other_client(client) as follower:
        path = f"/api/conversations/{follower.create_conversation()}/messages"
        return list(follower.stream("POST", path, {"text": f"/slow {SLOW_SECONDS}"}))[-1]


def test_connection_without_request_is_closed_after_10_seconds(outcomes):
    seconds, response = outcomes["send_nothing"].result(WAIT)
    assert response == b""
    assert 4 < seconds < 25


def test_idle_connection_is_closed_5_seconds_after_response(outcomes):
    seconds, response = outcomes["send_second_request_never"].result(WAIT)
    assert response.startswith(b"HTTP/1.1 200 OK")
    assert 4 < seconds < 20


def test_head_that_takes_10_seconds_returns_408(outcomes):
    seconds, response = outcomes["drip_head"].result(WAIT)
    assert response.startswith(b"HTTP/1.1 408 Request Timeout")
    assert response.endswith(b'{"error": "The request headers must arrive within 10 seconds"}')
    assert 9 < seconds < 25


@pytest.mark.parametrize("client", ["drip_body", "drip_chunk_extension", "drip_trailer"])
def test_body_that_takes_60_seconds_returns_400(outcomes, client):
    seconds, response = outcomes[client].result(WAIT)
    assert response.startswith(b"HTTP/1.1 400")
    assert 55 < seconds < 90


def test_refused_body_is_not_read_for_longer_than_10_seconds(outcomes):
    seconds, response = outcomes["drip_unread_body"].result(WAIT)
    assert response.startswith(b"HTTP/1.1 413")
    assert seconds < 25


def test_body_with_pause_of_40_seconds_is_accepted(outcomes):
    assert outcomes["pause_in_body"].result(WAIT).startswith(b"HTTP/1.1 201")


def test_client_that_pipelines_and_reads_nothing_is_dropped(outcomes):
    assert 25 < outcomes["pipeline_and_read_nothing"].result(WAIT) < 75


def test_client_that_reads_nothing_of_response_is_dropped(outcomes):
    announced, received = outcomes["read_nothing"].result(WAIT)
    assert received < announced


@pytest.mark.parametrize(
    "client", ["read_600_kb_per_second", "read_20_kb_per_second", "read_20_kb_per_second_over_tls"]
)
def test_client_that_reads_slowly_receives_whole_list(outcomes, client):
    announced, received = outcomes[client].result(WAIT)
    assert announced > LIST_MESSAGES * 600_000
    assert received == announced


def test_stream_that_is_silent_for_40_seconds_is_followed_to_its_end(outcomes):
    assert outcomes["follow_silent_stream"].result(WAIT)[0] == "done"


@pytest.mark.parametrize("client", ["begin_no_handshake", "drip_handshake"])
def test_tls_handshake_that_takes_10_seconds_is_ended(outcomes, client):
    seconds, response = outcomes[client].result(WAIT)
    assert response == b""
    assert 9 < seconds < 25


def test_tls_record_that_arrives_slowly_counts_as_slow_head(outcomes):
    seconds, _ = outcomes["drip_tls_record"].result(WAIT)
    assert seconds < 25


def test_slow_clients_leave_no_traceback(servers, outcomes):
    for outcome in outcomes.values():
        outcome.result(WAIT)
    for server in servers:
        assert "Traceback" not in server.output
