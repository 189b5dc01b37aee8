"""How a worker ends on a signal, and what becomes of the replies in progress.

The grace period takes seconds, so all servers run at once, each in a thread, and each test looks at one of them.
"""

import os
import signal
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from operator import methodcaller
from pathlib import Path

import pytest

from tests.helpers.bots import ASYNC
from tests.helpers.server import TIMEOUT, connect, format_head, measure, run_all, wait_until
from tests.slow.conftest import run_server

WAIT = 240  # seconds until every server must have ended
GRACE = 8  # seconds that replies in progress have to finish


@contextmanager
def run_worker(url, arguments=(), **settings):
    """Run the program with one worker while the block is executed; it must print no traceback."""
    with run_server(url, WEB_CONCURRENCY=1, GUNICORN_CMD_ARGS=" ".join(arguments), **settings) as server:
        yield server
    assert "Traceback" not in server.output


def start_reply(client, text):
    """Send a message without waiting for its reply; return the reply's path."""
    conversation_id = client.create_conversation()
    reply = client.send_message(conversation_id, text, **ASYNC).json[1]
    return f"/api/conversations/{conversation_id}/messages/{reply['id']}"


def end_without_connections(url, send_signal):
    """End a server whose replies nobody follows; return the seconds it took, its exit status and the replies."""
    with run_worker(url) as server, server.create_logged_in_client("ada") as client:
        paths = start_reply(client, "/slow 4"), start_reply(client, "/slow 60")
        wait_until(lambda: client.get(paths[1]).json["text"])
        send_signal(server.process)
        seconds, status = measure(server.process.wait, TIMEOUT)
    with run_worker(url) as server, server.other_client(client) as other:
        return seconds, status, [other.get(path).json for path in paths]


def press_control_c(url):
    """End a server as an impatient user at a terminal does, which sends SIGINT to the master and its workers.

    Another program locks the database for a second, so that the replies cannot be stored before the second signal.
    """

    def press_repeatedly(process):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            for _ in range(10):
                os.killpg(process.pid, signal.SIGINT)
                time.sleep(0.1)

    return end_without_connections(url, press_repeatedly)


def terminate_with_connections(url):
    """Terminate a server while clients wait for replies and follow one; return what they receive."""

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

    with run_worker(url) as server, server.create_logged_in_client("ada") as client:
        return run_all(
            lambda: wait_for_reply("/slow 6"), lambda: wait_for_reply("/slow 60"), follow_reply, terminate_server
        )


def terminate_with_incomplete_request(url):
    """Terminate a server while a client sends a body slowly; return the exit status and what the server printed."""
    with run_worker(url) as server, server.client() as client, connect(server.port) as connection:
        assert client.get("/api/test").status == 200  # the worker is ready
        connection.sendall(format_head("POST /api/login HTTP/1.1", "Content-Length: 100") + b"{")
        time.sleep(0.5)
        return server.terminate(), server.output


def terminate_while_hashing(url):
    """Terminate a server while it hashes a password; return the response and the exit status."""
    with run_worker(url, PASSWORD_HASH_METHOD="pbkdf2:sha256:1000000") as server, server.client() as client:
        [worker] = server.all_workers(1)
        assert client.get("/api/test").status == 200  # the worker is ready
        threads = Path(f"/proc/{worker}/task")
        count = len(list(threads.iterdir()))

        def terminate_server():
            wait_until(lambda: len(list(threads.iterdir())) > count)  # one of them hashes
            return server.terminate()

        return run_all(lambda: client.signup("ada"), terminate_server)


def replace_worker(url, *arguments):
    """Start a reply, for which the worker is replaced; return the reply."""
    with run_worker(url, arguments) as server, server.create_logged_in_client("ada") as client:
        workers = server.all_workers(1)
        path = start_reply(client, "/slow 4")
        if not arguments:
            server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: not set(workers) & set(server.workers()))
        return client.get(path).json


SERVERS = {
    "SIGTERM": partial(end_without_connections, send_signal=methodcaller("send_signal", signal.SIGTERM)),
    "SIGQUIT": partial(end_without_connections, send_signal=methodcaller("send_signal", signal.SIGQUIT)),
    "Control-C": press_control_c,
    "connections": terminate_with_connections,
    "incomplete request": terminate_with_incomplete_request,
    "hashing": terminate_while_hashing,
    "SIGHUP": replace_worker,
    "last request": lambda url: replace_worker(url, "--max-requests=4"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What came of each of the servers, as futures by their names."""
    folder = tmp_path_factory.mktemp("databases")
    with ThreadPoolExecutor(len(SERVERS)) as executor:
        yield {name: executor.submit(func, f"sqlite:///{folder / name}.db") for name, func in SERVERS.items()}


def test_sigterm_lets_reply_finish_and_stores_what_there_is_after_the_grace_period(outcomes):
    seconds, status, [complete, unfinished] = outcomes["SIGTERM"].result(WAIT)
    assert (status, complete["text"].split(), "status" in complete) == (0, ["1", "2", "3", "4"], False)
    assert (unfinished["status"], len(unfinished["text"].split()) >= GRACE - 1) == ("failed", True)
    assert seconds < 30


@pytest.mark.parametrize("name", ["SIGQUIT", "Control-C"])
def test_quick_shutdown_stores_replies_at_once(outcomes, name):
    seconds, _, replies = outcomes[name].result(WAIT)
    assert seconds < GRACE
    assert [(reply["status"], reply["text"][:2]) for reply in replies] == [("failed", "1 ")] * 2


def test_sigterm_lets_clients_wait_and_gives_them_what_there_is_after_the_grace_period(outcomes):
    [complete, unfinished, events, status] = outcomes["connections"].result(WAIT)
    assert (complete.status, unfinished.status, events[-1], status) == (201, 201, "error", 0)
    assert (complete.json[1]["text"], "status" in complete.json[1]) == ("1 2 3 4 5 6 ", False)
    assert unfinished.json[1]["status"] == "failed"
    assert len(unfinished.json[1]["text"].split()) >= GRACE


def test_sigterm_lets_other_requests_finish(outcomes):
    response, status = outcomes["hashing"].result(WAIT)
    assert (response.status, status) == (201, 0)


def test_sigterm_closes_connection_of_incomplete_request(outcomes):
    status, output = outcomes["incomplete request"].result(WAIT)
    assert status == 0
    assert "Worker exiting" in output  # rather than killed by the master


@pytest.mark.parametrize("name", ["SIGHUP", "last request"])
def test_reply_finishes_when_worker_is_replaced(outcomes, name):
    reply = outcomes[name].result(WAIT)
    assert (reply["text"], "status" in reply) == ("1 2 3 4 ", False)
