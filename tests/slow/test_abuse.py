"""Eight abusive clients at once, and a well-behaved one that must not notice, and of which nothing may be lost."""

import os
import time
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPException
from multiprocessing import get_context

from tests.helpers.server import PASSWORD, TIMEOUT, HttpClient, connect, format_head, receive_all

LONG_MESSAGES = 40
LOST_CONNECTION = (OSError, HTTPException)

MALFORMED_REQUESTS = [
    b"\0" * 20_000,
    b"GET / HTTP/9.9\r\n\r\n",
    format_head("GET / HTTP/1.1", "Bad Header: x"),
    format_head("POST /api/login HTTP/1.1", "Transfer-Encoding: chunked") + b"x\r\n",
    format_head("POST /api/login HTTP/1.1", "Content-Length: 5", "Transfer-Encoding: chunked"),
    b"GET /api/test HTTP/1.1\r\nAccept: " + b"x" * 750_000,
]
LARGE_FIELDS = [
    ("GET /api/test HTTP/1.1", ["Accept: " + "text/html;q=0.1," * 500] * 4),
    ("GET /api/current_user HTTP/1.1", ["Cookie: " + "a=b; " * 1600] * 4),
    (
        "OPTIONS /api/login HTTP/1.1",
        ["Origin: http://localhost:3000", *["Access-Control-Request-Headers: " + "x," * 4000] * 4],
    ),
]


def search(client, conversation_id):
    """Search long messages for a text that nearly matches everywhere."""
    client.get(f"/api/messages?q={'a' * 254}b")
    client.get(f"/api/conversations?q={'a' * 254}b")


def read_lists(client, conversation_id):
    """Read the longest lists there are."""
    client.get("/api/conversations")
    client.get(f"/api/conversations/{conversation_id}/messages?limit=100")


def log_in(client, conversation_id):
    """Log in with the right password and with wrong ones, which costs a hash each."""
    client.login("mallory")
    client.login("mallory", "wrong password")


def send_large_fields(client, conversation_id):
    """Send header fields that are as large as they may be."""
    for request_line, fields in LARGE_FIELDS:
        with connect(client.connection.port) as connection:
            connection.sendall(format_head(request_line, "Connection: close", *fields))
            receive_all(connection)


def send_malformed_requests(client, conversation_id):
    """Send what is no HTTP, or too large."""
    for data in MALFORMED_REQUESTS:
        with suppress(OSError), connect(client.connection.port) as connection:
            connection.sendall(data)
            receive_all(connection)


def hold(client, *requests):
    """Send each request on a connection of its own, read nothing of the responses, and leave after five seconds."""
    with ExitStack() as stack:
        for request in requests:
            stack.enter_context(connect(client.connection.port)).sendall(request)
        time.sleep(5)


def send_incomplete_requests(client, conversation_id):
    """Send half a head on 50 connections, half a body on 50 others."""
    head = format_head("POST /api/login HTTP/1.1", "Content-Type: application/json", "Content-Length: 1000")
    hold(client, *[head[:20], head + b'{"username": '] * 50)


def read_nothing(client, conversation_id):
    """Pipeline small requests on 20 connections, and ask for a long list on another."""
    lists = format_head("GET /api/conversations HTTP/1.1", cookie=client.cookie) * 3
    hold(client, *[format_head("GET /api/test HTTP/1.1") * 50] * 20, lists)


def abandon_streams(client, conversation_id):
    """Start more slow replies than are allowed."""
    body = b'{"text": "/slow 600"}'
    fields = ("Accept: text/event-stream", "Content-Type: application/json", f"Content-Length: {len(body)}")
    head = format_head(f"POST /api/conversations/{conversation_id}/messages HTTP/1.1", *fields, cookie=client.cookie)
    hold(client, *[head + body] * 30)


ABUSES = [
    search,
    read_lists,
    log_in,
    send_large_fields,
    send_malformed_requests,
    send_incomplete_requests,
    read_nothing,
    abandon_streams,
]


def abuse(func, port, cookie, conversation_id, barrier):
    """Repeat an abuse until the process is terminated; it leaves the processor to others."""
    os.nice(10)
    with HttpClient(port) as client:
        barrier.wait(TIMEOUT)
        while True:
            client.cookie = cookie  # an abusive login changes it
            with suppress(*LOST_CONNECTION):
                func(client, conversation_id)


@contextmanager
def run_abuses(server):
    """Run all abuses while the block is executed, each in a process and with a user of its own that has messages."""
    context = get_context("spawn")
    barrier = context.Barrier(len(ABUSES) + 1)
    processes = []
    try:
        for func in ABUSES:
            with server.create_logged_in_client("mallory" if func is log_in else func.__name__) as client:
                conversation_id = client.create_conversation()
                for _ in range(LONG_MESSAGES if func in (search, read_lists, read_nothing) else 0):
                    assert client.send_message(conversation_id, "a" * 100_000).status == 201
            arguments = (func, server.port, client.cookie, conversation_id, barrier)
            processes.append(context.Process(target=abuse, args=arguments, daemon=True))
            processes[-1].start()
        barrier.wait(TIMEOUT)
        yield
    finally:
        for process in processes:
            process.terminate()
            process.join()


def behave_well(client, seconds):
    """Make requests and send messages for some seconds; all of them are served and kept."""
    texts = []
    conversation_id = client.create_conversation()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        texts.append(f"message {len(texts)}")
        assert client.get("/api/test").status == 200
        with HttpClient(client.connection.port) as other:
            assert other.get("/api/test").status == 200
        response = client.send_message(conversation_id, texts[-1])
        assert response.status == 201, response.body
        time.sleep(0.1)
    messages = client.get(f"/api/conversations/{conversation_id}").json["messages"]
    assert [message["text"] for message in messages[::2]] == texts


def test_abusive_clients_do_not_slow_down_others(serve):
    server = serve(PASSWORD_HASH_METHOD="", SIGNUP_RATE_LIMIT="1000 per minute")
    workers = server.all_workers()
    with server.create_logged_in_client("ada") as client, run_abuses(server):
        behave_well(client, seconds=30)
    assert server.workers() == workers
    assert "Traceback" not in server.output
    assert PASSWORD not in server.output
