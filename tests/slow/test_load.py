"""The served program under load: open streams, waiting sends, bursts, and followers that do not read."""

import socket
import statistics
import threading
import time
from contextlib import ExitStack

from tests.conftest import on_sqlite
from tests.helpers.server import TIMEOUT, connect, format_head, measure, run_concurrently, run_in_background, wait_until

REPLY = "".join(f"{number} " for number in range(1, 21))


def measure_calls(**calls):
    """Return the median seconds of calls that return a successful response."""
    seconds = {name: [] for name in calls}
    for _ in range(20):
        for name, call in calls.items():
            elapsed, response = measure(call)
            assert response.status in (200, 201), response.body
            seconds[name].append(elapsed)
        time.sleep(0.05)
    return {name: statistics.median(values) for name, values in seconds.items()}


def test_500_open_streams_do_not_slow_down_others(serve, database):
    server = serve(SIGNUP_RATE_LIMIT="1000 per minute")
    with ExitStack() as stack:
        bob, *users = [stack.enter_context(server.create_logged_in_client(f"user {number}")) for number in range(51)]
        conversation_ids = [user.create_conversation() for user in users]
        own_id = bob.create_conversation()
        calls = {
            "test": lambda: bob.get("/api/test"),
            "current user": lambda: bob.get("/api/current_user"),
            "send": lambda: bob.send_message(own_id),
        }
        before = measure_calls(**calls)
        started = []
        beginning = threading.Semaphore(100)  # so many begin at once

        def follow(number):
            """Send a message and return the events of its stream."""
            path = f"/api/conversations/{conversation_ids[number % 50]}/messages"
            with server.other_client(users[number % 50]) as client:
                stream = client.stream("POST", path, {"text": "/slow 20"})
                with beginning:
                    started.append(next(stream))
                return list(stream)

        with run_in_background(lambda: run_concurrently(500, follow)) as [followers]:
            wait_until(lambda: len(started) == 500 or followers.done(), 5 * TIMEOUT)
            for name, seconds in measure_calls(**calls).items():
                assert seconds < 5 * before[name] + 0.3, name
            assert not followers.done()
        assert {event for event, _, _ in started} == {"start"}
        for events in followers.result():
            assert "".join(data["text"] for name, data, _ in events if name == "delta") == REPLY
            assert events[-1][0] == "done"
        for user, conversation_id in zip(users, conversation_ids, strict=True):
            messages = user.list_messages(conversation_id)
            assert [message["text"] for message in messages] == ["/slow 20", REPLY] * 10
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

        devices = run_concurrently(16, send)
        messages = ada.list_messages(conversation_id)
    pairs = sorted((pair for pairs in devices for pair in pairs), key=lambda pair: pair[0]["id"])
    assert messages == [message for pair in pairs for message in pair]
    for pairs in devices:
        assert pairs == sorted(pairs, key=lambda pair: pair[0]["id"])
    assert "Traceback" not in server.output


@on_sqlite
def test_followers_that_read_nothing_do_not_slow_down_one_that_reads(serve):
    server = serve(WEB_CONCURRENCY=1)
    with ExitStack() as stack:
        ada = stack.enter_context(server.create_logged_in_client("ada"))
        conversation_id = ada.create_conversation()
        path = f"/api/conversations/{conversation_id}/messages"
        question, reply = ada.send_message(conversation_id, "/long 9999").json
        events_path = f"{path}/{reply['id']}/events"
        for _ in range(100):
            connection = stack.enter_context(connect(server.port))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.sendall(format_head(f"GET {events_path} HTTP/1.1", cookie=ada.cookie))
        seconds, events = measure(lambda: list(ada.stream("GET", events_path)))
        assert (events[-1][:2], seconds < 10) == (("done", [question, reply]), True)
        seconds, response = measure(ada.put, f"{path}/{question['id']}", {"text": "/long 9999"})
        assert (response.status, response.json[1]["text"], seconds < 10) == (200, reply["text"], True)
    assert "Traceback" not in server.output


@on_sqlite
def test_long_queries_do_not_stop_others(serve):
    server = serve(WEB_CONCURRENCY=1)
    with server.create_logged_in_client("ada") as ada, server.client() as other:
        id = ada.create_conversation()
        for _ in range(300):
            text = "a" + "\x01" * 99_999  # in JSON most of these have six characters
            assert ada.send_message(id, text).status == 201
        for path in (f"/api/messages?q={'a' * 254}b", "/api/conversations", f"/api/conversations/{id}"):
            answers = 0
            with run_in_background(lambda path=path: ada.get(path)) as [query]:
                while not query.done():
                    assert other.get("/api/test").status == 200
                    answers += 1
            assert (query.result().status, answers > 10) == (200, True), path
