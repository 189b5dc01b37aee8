"""How a worker ends on a signal, and what becomes of the replies in progress.

The grace period takes seconds, so all servers run at once, each in a thread, and each test looks at one of them.
"""

import os
import signal
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from tests.helpers.server import TIMEOUT, Server, connect, format_head, measure, run_all, wait_until

pytestmark = pytest.mark.slow

WAIT = 240  # seconds until every server must have ended
GRACE = 8  # seconds that replies in progress have to finish
SETTINGS = {
    "SECRET_KEY": "0123456789abcdef" * 4,
    "SESSIONS_VALID_FROM": "2026-01-01T00:00:00Z",
    "PASSWORD_HASH_METHOD": "pbkdf2:sha256:1",
    "WEB_CONCURRENCY": "1",
}


def start_reply(client, text):
    """Send a message without waiting for its reply; return the reply's path."""
    conversation_id = client.create_conversation()
    response = client.send_message(conversation_id, text, Prefer="respond-async")
    assert response.status == 202
    return f"/api/conversations/{conversation_id}/messages/{response.json[1]['id']}"


def load_replies(url, client, *paths):
    """Return the replies as another run of the program shows them."""
    server = Server(DATABASE_URL=url, **SETTINGS)
    try:
        with server.other_client(client) as other:
            return [other.get(path).json for path in paths]
    finally:
        server.kill()


def end_without_connections(url, send_signal):
    """End a server whose replies nobody follows; return the seconds it took, its exit status and the replies."""
    server = Server(DATABASE_URL=url, **SETTINGS)
    try:
        with server.create_logged_in_client("ada") as client:
            paths = start_reply(client, "/slow 4"), start_reply(client, "/slow 60")
            wait_until(lambda: client.get(paths[1]).json["text"])
        send_signal(server)
        seconds, status = measure(server.process.wait, TIMEOUT)
        assert "Traceback" not in server.output
    finally:
        server.kill()
    return seconds, status, load_replies(url, client, *paths)


def terminate(url):
    return end_without_connections(url, lambda server: server.process.send_signal(signal.SIGTERM))


def quit_quickly(url):
    return end_without_connections(url, lambda server: server.process.send_signal(signal.SIGQUIT))


def press_control_c(url):
    """End a server as an impatient user at a terminal does, which sends SIGINT to the master and its workers.

    Another program locks the database for a second, so that the replies cannot be stored before the second signal.
    """

    def press_repeatedly(server):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            for _ in range(10):
                os.killpg(server.process.pid, signal.SIGINT)
                time.sleep(0.1)

    return end_without_connections(url, press_repeatedly)


def terminate_with_connections(url):
    """Terminate a server while clients wait for replies and follow one; return what they receive."""
    server = Server(DATABASE_URL=url, **SETTINGS)

    def wait_for_reply(text):
        with server.other_client(client) as other:
            return other.send_message(other.create_conversation(), text)

    def follow_reply():
        with server.other_client(client) as other:
            path = f"/api/conversations/{other.create_conversation()}/messages"
            return [event for event, _, _ in other.stream("POST", path, {"text": "/slow 60"})]

    def terminate_server():
        wait_until(lambda: sum(bool(each["messages"]) for each in client.get("/api/conversations").json) == 3)
        time.sleep(3)
        return server.terminate()

    try:
        with server.create_logged_in_client("ada") as client:
            results = run_all(
                lambda: wait_for_reply("/slow 6"), lambda: wait_for_reply("/slow 60"), follow_reply, terminate_server
            )
        assert "Traceback" not in server.output
        return results
    finally:
        server.kill()


def terminate_with_incomplete_request(url):
    """Terminate a server while a client sends a body slowly; return the exit status and what the server printed."""
    server = Server(DATABASE_URL=url, **SETTINGS)
    try:
        with server.client() as client, connect(server.port) as connection:
            assert client.get("/api/test").status == 200  # the worker is ready
            connection.sendall(format_head("POST /api/login HTTP/1.1", "Content-Length: 100") + b"{")
            time.sleep(0.5)
            return server.terminate(), server.output
    finally:
        server.kill()


def terminate_while_hashing(url):
    """Terminate a server while it hashes a password; return the response and the exit status."""
    server = Server(DATABASE_URL=url, **SETTINGS | {"PASSWORD_HASH_METHOD": "pbkdf2:sha256:1000000"})
    [worker] = server.all_workers(1)

    def count_threads():
        return len(os.listdir(f"/proc/{worker}/task"))

    def terminate_server():
        wait_until(lambda: count_threads() > threads)  # one of them hashes
        return server.terminate()

    try:
        with server.client() as client:
            assert client.get("/api/test").status == 200  # the worker is ready
            threads = count_threads()
            return run_all(lambda: client.signup("ada"), terminate_server)
    finally:
        server.kill()


def reload(url):
    """Reload a server while a reply is in progress; return the reply."""
    server = Server(DATABASE_URL=url, **SETTINGS)
    try:
        with server.create_logged_in_client("ada") as client:
            path = start_reply(client, "/slow 4")
            workers = server.all_workers(1)
            server.process.send_signal(signal.SIGHUP)
            wait_until(lambda: not set(workers) & set(server.workers()))
            return client.get(path).json
    finally:
        server.kill()


def exceed_max_requests(url):
    """Start a reply with the last request of a worker; return the reply."""
    server = Server("--max-requests=4", DATABASE_URL=url, **SETTINGS)
    try:
        workers = server.all_workers(1)
        with server.create_logged_in_client("ada") as client:
            path = start_reply(client, "/slow 4")
            wait_until(lambda: not set(workers) & set(server.workers()))
            return client.get(path).json
    finally:
        server.kill()


SERVERS = [
    terminate,
    quit_quickly,
    press_control_c,
    terminate_with_connections,
    terminate_with_incomplete_request,
    terminate_while_hashing,
    reload,
    exceed_max_requests,
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What came of each of the servers, as futures by the name of the function."""
    folder = tmp_path_factory.mktemp("databases")
    with ThreadPoolExecutor(len(SERVERS)) as executor:
        yield {func: executor.submit(func, f"sqlite:///{folder / func.__name__}.db") for func in SERVERS}


def test_sigterm_lets_reply_finish_without_connection(outcomes):
    _, status, [reply, _] = outcomes[terminate].result(WAIT)
    assert status == 0
    assert "status" not in reply
    assert reply["text"].split() == ["1", "2", "3", "4"]


def test_sigterm_stores_unfinished_reply_after_grace_period(outcomes):
    seconds, _, [_, reply] = outcomes[terminate].result(WAIT)
    assert reply["status"] == "failed"
    assert len(reply["text"].split()) >= GRACE - 1
    assert seconds < 30


@pytest.mark.parametrize("func", [quit_quickly, press_control_c])
def test_quick_shutdown_stores_replies_at_once(outcomes, func):
    seconds, _, replies = outcomes[func].result(WAIT)
    assert seconds < GRACE
    assert [reply["status"] for reply in replies] == ["failed", "failed"]
    assert all(reply["text"].startswith("1 ") for reply in replies)


def test_sigterm_lets_client_wait_for_reply(outcomes):
    [response, _, _, status] = outcomes[terminate_with_connections].result(WAIT)
    assert status == 0
    assert response.status == 201
    assert response.json[1]["text"].split() == ["1", "2", "3", "4", "5", "6"]
    assert "status" not in response.json[1]


def test_sigterm_returns_unfinished_reply_to_waiting_client(outcomes):
    [_, response, _, _] = outcomes[terminate_with_connections].result(WAIT)
    assert response.status == 201
    assert response.json[1]["status"] == "failed"
    assert len(response.json[1]["text"].split()) >= GRACE


def test_sigterm_ends_stream_with_error_event(outcomes):
    [_, _, events, _] = outcomes[terminate_with_connections].result(WAIT)
    assert events[-1] == "error"


def test_sigterm_lets_other_requests_finish(outcomes):
    response, status = outcomes[terminate_while_hashing].result(WAIT)
    assert status == 0
    assert response.status == 201


def test_sigterm_closes_connection_of_incomplete_request(outcomes):
    status, output = outcomes[terminate_with_incomplete_request].result(WAIT)
    assert status == 0
    assert "Worker exiting" in output  # rather than killed by the master
    assert "Traceback" not in output


@pytest.mark.parametrize("func", [reload, exceed_max_requests])
def test_reply_finishes_when_worker_is_replaced(outcomes, func):
    reply = outcomes[func].result(WAIT)
    assert "status" not in reply
    assert reply["text"].split() == ["1", "2", "3", "4"]
