"""The served program under load: open streams, waiting sends, bursts, and followers that do not read."""

import socket
import sqlite3
import statistics
import threading
import time
from contextlib import ExitStack, closing

import psycopg
import pytest

from tests.helpers.server import (
    TIMEOUT,
    connect,
    format_head,
    measure,
    record_measurement,
    run_concurrently,
    run_in_background,
    wait_until,
)

WORDS = [f"{number} " for number in range(1, 31)]


def list_transactions(database):
    """Return the states of the program's PostgreSQL connections that are in a transaction."""
    if database.startswith("sqlite"):
        return []
    query = """SELECT state FROM pg_stat_activity
               WHERE datname = current_database() AND pid <> pg_backend_pid() AND xact_start IS NOT NULL"""
    with psycopg.connect(database.replace("postgres://", "postgresql://")) as connection:
        return [state for (state,) in connection.execute(query)]


def check_no_transaction(database):
    """Check that no transaction stays open."""
    if database.startswith("sqlite"):
        path = database.removeprefix("sqlite:///")
        with closing(sqlite3.connect(path, timeout=TIMEOUT, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
    wait_until(lambda: list_transactions(database) == [])


class Latencies:
    """The median latencies of some calls of a client, before and during a load."""

    def __init__(self, **calls):
        self.calls = calls
        self.before = self.measure()

    def measure(self):
        """Return the median seconds of each call."""
        seconds = {name: [] for name in self.calls}
        for _ in range(20):
            for name, call in self.calls.items():
                elapsed, response = measure(call)
                assert response.status in (200, 201), response.body
                seconds[name].append(elapsed)
            time.sleep(0.05)
        return {name: statistics.median(values) for name, values in seconds.items()}

    def check(self):
        """Check that the calls are about as fast as before."""
        for name, median in self.measure().items():
            record_measurement(f"{name}: median ms before", self.before[name] * 1000)
            record_measurement(f"{name}: median ms under load", median * 1000)
            assert median < 5 * self.before[name] + 0.3


def test_500_open_streams_do_not_slow_down_others(serve, database):
    server = serve(SIGNUP_RATE_LIMIT="1000 per minute")
    with ExitStack() as stack:
        bob, *users = [stack.enter_context(server.create_logged_in_client(f"user {number}")) for number in range(51)]
        conversation_ids = [user.create_conversation() for user in users]
        own_id = bob.create_conversation()
        latencies = Latencies(
            test=lambda: bob.get("/api/test"),
            current_user=lambda: bob.get("/api/current_user"),
            send=lambda: bob.send_message(own_id),
        )
        delays = []
        beginning = threading.Semaphore(100)  # so many begin at once

        def follow(number):
            """Send a message and return the events of its stream."""
            path = f"/api/conversations/{conversation_ids[number % 50]}/messages"
            with server.other_client(users[number % 50]) as client:
                stream = client.stream("POST", path, {"text": "/slow 30"})
                with beginning:
                    started_at = time.monotonic()
                    events = [next(stream)]
                delays.append(time.monotonic() - started_at)
                return [*events, *stream]

        with run_in_background(lambda: run_concurrently(500, follow)) as [followers]:
            wait_until(lambda: len(delays) == 500 or followers.done(), 5 * TIMEOUT)
            latencies.check()
            check_no_transaction(database)
            assert not followers.done()
        record_measurement("seconds to the first word, which takes one: median", statistics.median(delays))
        record_measurement("seconds to the first word, which takes one: most", max(delays))
        for events in followers.result():
            assert "".join(data["text"] for name, data, _ in events if name == "delta") == "".join(WORDS)
            assert [events[0][0], events[-1][0]] == ["start", "done"]
        for user, conversation_id in zip(users, conversation_ids, strict=True):
            messages = user.list_messages(conversation_id)
            assert [message["text"] for message in messages] == ["/slow 30", "".join(WORDS)] * 10
    assert " ERROR " not in server.output
    assert "Traceback" not in server.output


def test_320_sends_by_16_devices_of_one_user_are_stored_in_order(serve):
    server = serve()
    with ExitStack() as stack:
        ada = stack.enter_context(server.create_logged_in_client("ada"))
        conversation_id = ada.create_conversation()

        def send(device):
            """Log in and send 20 messages, one after the other; return the exchanges."""
            with server.client() as client:
                assert client.login("ada").status == 200
                responses = [client.send_message(conversation_id, f"<{device:02}:{n:02}>") for n in range(20)]
            assert {response.status for response in responses} == {201}
            return [response.json for response in responses]

        seconds, devices = measure(run_concurrently, 16, send)
        record_measurement("messages per second", 320 / seconds)
        messages = ada.list_messages(conversation_id)
    pairs = sorted((pair for pairs in devices for pair in pairs), key=lambda pair: pair[0]["id"])
    assert messages == [message for pair in pairs for message in pair]
    for pairs in devices:
        assert pairs == sorted(pairs, key=lambda pair: pair[0]["id"])
    assert "Traceback" not in server.output


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_followers_that_read_nothing_do_not_slow_down_one_that_reads(serve):
    server = serve(WEB_CONCURRENCY=1)
    text_length = sum(len(f"{number} ") for number in range(1, 10_000))
    with ExitStack() as stack:
        ada = stack.enter_context(server.create_logged_in_client("ada"))
        conversation_id = ada.create_conversation()
        path = f"/api/conversations/{conversation_id}/messages"
        question, reply = ada.send_message(conversation_id, "/long 9999").json
        assert len(reply["text"]) == text_length
        events_path = f"{path}/{reply['id']}/events"
        for _ in range(100):
            connection = stack.enter_context(connect(server.port))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.sendall(format_head(f"GET {events_path} HTTP/1.1", cookie=ada.cookie))
        seconds, events = measure(lambda: list(ada.stream("GET", events_path)))
        record_measurement("seconds to read the reply", seconds)
        assert events[-1][:2] == ("done", [question, reply])
        assert seconds < 10
        seconds, response = measure(ada.put, f"{path}/{question['id']}", {"text": "/long 9999"})
        assert (response.status, response.json[1]["text"]) == (200, reply["text"])
        assert seconds < 10
    assert "Traceback" not in server.output


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
@pytest.mark.parametrize("path", [f"/api/messages?q={'a' * 254}b", "/api/conversations", "/api/conversations/{id}"])
def test_long_query_does_not_stop_others(serve, path):
    server = serve(WEB_CONCURRENCY=1)
    with server.create_logged_in_client("ada") as ada, server.client() as other:
        id = ada.create_conversation()
        for _ in range(300):
            text = "a" + "\x01" * 99_999  # in JSON most of these have six characters
            assert ada.send_message(id, text).status == 201
        answers = 0
        with run_in_background(lambda: ada.get(path.format(id=id))) as [query]:
            while not query.done():
                assert other.get("/api/test").status == 200
                answers += 1
        assert query.result().status == 200
        record_measurement("requests answered meanwhile", answers)
        assert answers > 10


def test_200_concurrent_signups_get_different_ids(serve):
    server = serve(SIGNUP_RATE_LIMIT="1000 per minute")

    def sign_up(number):
        with server.client() as client:  # 503: too many wait for their passwords' hashes
            return wait_until(lambda: (response := client.signup(f"user {number}")).status != 503 and response)

    seconds, responses = measure(run_concurrently, 200, sign_up)
    record_measurement("seconds for 200 signups", seconds)
    assert {response.status for response in responses} == {201}
    assert len({response.json["user_id"] for response in responses}) == 200
