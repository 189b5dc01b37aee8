"""Clients that send or read slowly, or not at all: time limits of the served program.

The limits take up to a minute, so all clients run at once, each in a thread, and each test looks at one of them.
"""

import re
import select
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.helpers.server import connect, format_head, receive_all
from tests.helpers.tls import create_certificate, create_tls_context
from tests.slow.conftest import run_server

WAIT = 240  # seconds until every client must have finished
SLOW_SECONDS = 37  # longer than the server waits for a client that sends or takes nothing
LIST_MESSAGES = 30  # of 100,000 characters that JSON makes six times longer: more than the kernel's buffers hold


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """The program at http and at https, on one database."""
    folder = tmp_path_factory.mktemp("servers")
    url, option = f"sqlite:///{folder / 'chat.db'}", f"--certfile={create_certificate(folder)}"
    with run_server(url) as http, run_server(url, arguments=[option], SESSION_COOKIE_SECURE="false") as https:
        yield http, https


@pytest.fixture(scope="module")
def outcomes(servers):
    """What came of each of the slow clients, as futures by name."""
    http, https = servers
    with http.create_logged_in_client("ada") as client, ThreadPoolExecutor(16) as executor:
        conversation_id = client.create_conversation()
        for _ in range(LIST_MESSAGES):
            assert client.send_message(conversation_id, "a" + "\1" * 99_999).status == 201
        body = ("Content-Type: application/json", "Content-Length: 1000")
        calls = {
            "nothing": (send_and_wait, connect(http.port), b""),
            "no second request": (send_and_wait, connect(http.port), format_head("GET /api/test HTTP/1.1")),
            "half a head": (send_and_wait, connect(http.port), b"GET /api/test HTTP/1.1\r\nX-Slow: "),
            "half a body": (send_and_wait, connect(http.port), format_head("POST /api/login HTTP/1.1", *body) + b"{"),
            "reads nothing": (read_list, connect(http.port), client.cookie, 0),
            "reads slowly": (read_list, connect(http.port), client.cookie, 20_000),
            "reads slowly over TLS": (read_list, connect_tls(https.port), client.cookie, 20_000),
            "follows": (follow_reply, http, client),
        }
        yield {name: executor.submit(*call) for name, call in calls.items()}


def connect_tls(port):
    return create_tls_context().wrap_socket(connect(port))


def send_and_wait(connection, data):
    """Send some data, then nothing; return the seconds until the server closes, and what it has sent."""
    start = time.monotonic()
    with connection:
        connection.sendall(data)
        select.select([connection], [], [], WAIT)
        response = receive_all(connection)
        return time.monotonic() - start, response


def read_list(connection, cookie, rate):
    """Read so many bytes a second of a long list, then the rest; return its announced and its actual length."""
    with connection:
        connection.sendall(format_head("GET /api/conversations HTTP/1.1", "Connection: close", cookie=cookie))
        data = bytearray()
        start = time.monotonic()
        while (elapsed := time.monotonic() - start) < SLOW_SECONDS:
            if len(data) < elapsed * rate:
                data += connection.recv(4096)
            else:
                time.sleep(0.02)
        head, _, body = (data + receive_all(connection)).partition(b"\r\n\r\n")
    return int(re.search(rb"Content-Length: (\d+)", head)[1]), len(body)


def follow_reply(server, client):
    """Return the name of the last event of a reply that takes longer than a client may be silent."""
    with server.other_client(client) as follower:
        path = f"/api/conversations/{follower.create_conversation()}/messages"
        return list(follower.stream("POST", path, {"text": f"/slow {SLOW_SECONDS}"}))[-1][0]


@pytest.mark.parametrize(
    ("client", "response", "least", "most"),
    [
        ("nothing", b"", 4, 20),
        ("no second request", b"HTTP/1.1 200", 4, 20),
        ("half a head", b"", 4, 20),
        ("half a body", b"HTTP/1.1 400", 25, 60),
    ],
)
def test_client_that_sends_nothing_more_is_dropped(outcomes, client, response, least, most):
    seconds, received = outcomes[client].result(WAIT)
    assert received[:12] == response
    assert least < seconds < most


def test_client_that_reads_nothing_of_a_response_is_dropped(outcomes):
    announced, received = outcomes["reads nothing"].result(WAIT)
    assert received < announced


@pytest.mark.parametrize("client", ["reads slowly", "reads slowly over TLS"])
def test_client_that_reads_slowly_receives_the_whole_list(outcomes, client):
    announced, received = outcomes[client].result(WAIT)
    assert received == announced > LIST_MESSAGES * 600_000


def test_client_that_follows_a_long_reply_is_not_dropped(outcomes):
    assert outcomes["follows"].result(WAIT) == "done"


def test_slow_clients_leave_no_traceback(servers, outcomes):
    for outcome in outcomes.values():
        outcome.result(WAIT)
    for server in servers:
        assert "Traceback" not in server.output
