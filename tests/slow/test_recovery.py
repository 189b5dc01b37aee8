"""Replies of the served program that outlive connections, sessions and processes, seen from another process.

What two processes do by way of the database, tests/test_replies.py tests on both databases; the tests here that take
long use one of them.
"""

import sqlite3
import time
from contextlib import closing, suppress
from functools import partial
from http.client import HTTPException
from itertools import islice

import pytest

from tests.conftest import SHARED_SESSIONS, on_sqlite
from tests.helpers.bots import ASYNC, join_deltas
from tests.helpers.model_server import ModelServer, running, stall
from tests.helpers.server import PASSWORD, measure, record_measurement, run_in_background, wait_until

ONE_WORKER = {**SHARED_SESSIONS, "WEB_CONCURRENCY": 1}


@pytest.fixture
def model():
    with running(ModelServer()) as model:
        yield model


@pytest.fixture
def servers(serve):
    """Two servers of one database, each with one worker and the simulated bot."""
    return serve(**ONE_WORKER), serve(**ONE_WORKER)


@pytest.fixture
def model_servers(serve, model):
    """Two servers of one database, each with one worker and a model."""
    return serve(**ONE_WORKER, **model.settings()), serve(**ONE_WORKER, **model.settings())


class Exchange:
    """A message and its reply in progress, by the paths at which they are found."""

    def __init__(self, client, text, conversation_id=None):
        self.conversation_id = conversation_id or client.create_conversation()
        response = client.send_message(self.conversation_id, text, **ASYNC)
        assert response.status == 202
        self.question, self.reply = response.json
        self.messages_path = f"/api/conversations/{self.conversation_id}/messages"
        self.path = f"{self.messages_path}/{self.reply['id']}"

    def load(self, client):
        """Return the reply as it is stored."""
        return client.get(self.path).json

    def wait_for_words(self, client, count):
        """Wait until the stored reply has so many words."""
        wait_until(lambda: len(self.load(client)["text"].split()) >= count)

    def wait_for_end(self, client):
        """Return the reply as soon as it is over."""
        return wait_until(lambda: (reply := self.load(client)).get("status") != "in_progress" and reply)


@on_sqlite
def test_interrupted_stream_is_resumed_at_other_server_by_another_session(model, model_servers, gate):
    model.script = ["One ", lambda handler: gate.wait(), "two ", "three"]
    with model_servers[0].create_logged_in_client("ada") as ada, model_servers[1].other_client(ada) as other:
        conversation_id = ada.create_conversation()
        path = f"/api/conversations/{conversation_id}/messages"
        with model_servers[0].other_client(ada) as reader:
            stream = reader.stream("POST", path, {"text": "Hello"})
            received = list(islice(stream, 2))
            stream.close()
        assert [name for name, *_ in received] == ["start", "delta"]
        assert (other.post("/api/logout/1").status, other.login("ada").status) == (200, 200)
        reply_path = f"{path}/{received[0][1][1]['id']}"
        headers = {"Last-Event-ID": received[-1][2]}
        with run_in_background(lambda: list(other.stream("GET", f"{reply_path}/events", **headers))) as [resuming]:
            time.sleep(1)  # the reply goes on while the other server follows it
            gate.set()
        events = resuming.result()
        assert join_deltas(received) + join_deltas(events) == "One two three"
        assert events[-1][:2] == ("done", other.get(path).json)
        assert other.get(f"{reply_path}/events", Last_Event_ID=events[-1][2]).status == 204


def test_stop_at_other_server_closes_connection_of_model(model, model_servers):
    model.script = [step for _ in range(600) for step in ("word ", lambda handler: time.sleep(0.1))]
    with model_servers[0].create_logged_in_client("ada") as ada, model_servers[1].other_client(ada) as other:
        exchange = Exchange(ada, "Hello")
        with model_servers[0].other_client(ada) as reader:
            stream = reader.stream("GET", f"{exchange.path}/events")
            received = list(islice(stream, 20))
            assert exchange.load(other)["status"] == "in_progress"  # and the other server is warm
            seconds, response = measure(other.post, f"{exchange.path}/stop")
            rest = list(stream)
        record_measurement("seconds to stop a reply of another server", seconds)
        assert (response.status, response.json["status"]) == (200, "stopped")
        # The follower has received what was not stored yet.
        assert join_deltas(received + rest).startswith(response.json["text"])
        assert len(join_deltas(received)) - len(response.json["text"]) < len("word ") * 20
        assert rest[-1][:2] == ("done", [exchange.question, response.json])
        assert model.wait_for_hang_up()
        assert exchange.load(ada) == response.json
        assert seconds < 10


@pytest.mark.parametrize("steps", [[stall], ["word ", stall]], ids=["before the first chunk", "after the first chunk"])
@on_sqlite
def test_stop_of_model_that_stalls_closes_its_connection(model, model_servers, steps):
    model.script = steps
    with model_servers[0].create_logged_in_client("ada") as ada:
        exchange = Exchange(ada, "Hello")
        wait_until(lambda: model.requests)
        exchange.wait_for_words(ada, len(steps) - 1)
        assert ada.post(f"{exchange.path}/stop").json["status"] == "stopped"
        assert model.wait_for_hang_up()


@pytest.mark.parametrize("resource", ["conversation", "account"])
@on_sqlite
def test_deletion_at_other_server_closes_connection_of_model(model, model_servers, resource):
    model.script = ["word ", stall]
    with model_servers[0].create_logged_in_client("ada") as ada, model_servers[1].other_client(ada) as other:
        exchange = Exchange(ada, "Hello")
        exchange.wait_for_words(other, 1)
        with model_servers[0].other_client(ada) as follower:
            stream = follower.stream("GET", f"{exchange.path}/events")
            assert next(stream)[0] == "start"
            if resource == "conversation":
                response = other.delete(f"/api/conversations/{exchange.conversation_id}")
            else:
                response = other.delete("/api/account", {"password": PASSWORD})
            assert response.status == 204
            seconds, is_closed = measure(model.wait_for_hang_up)
            assert list(stream)[-1][:2] == ("error", {"error": "Conversation not found"})
        assert is_closed
        record_measurement("seconds until the model's connection is closed", seconds)
        assert seconds < 10


@on_sqlite
def test_reply_whose_model_is_silent_for_long_is_not_taken_for_abandoned(model, model_servers):
    model.script = ["One ", lambda handler: time.sleep(42), "two"]
    with model_servers[0].create_logged_in_client("ada") as ada, model_servers[1].other_client(ada) as other:
        exchange = Exchange(ada, "Hello")
        deadline = time.monotonic() + 40
        while time.monotonic() < deadline:
            assert exchange.load(other)["status"] == "in_progress"
            time.sleep(1)
        reply = exchange.wait_for_end(other)
        assert (reply["text"], reply.get("status")) == ("One two", None)


def test_kill_9_keeps_question_and_text_and_fails_reply_within_a_minute(servers):
    with servers[0].create_logged_in_client("ada") as ada, servers[1].other_client(ada) as other:
        exchange = Exchange(ada, "/slow 60")
        with servers[0].other_client(ada) as reader:
            received = list(islice(reader.stream("GET", f"{exchange.path}/events"), 6))
            servers[0].kill()
        killed_at = time.monotonic()
        question, reply = other.get(exchange.messages_path).json
        assert (question, reply["status"]) == (exchange.question, "in_progress")
        assert len(reply["text"].split()) >= len(join_deltas(received).split()) - 2  # one word a second
        path = f"/api/conversations/{exchange.conversation_id}"
        etags = {path: other.get(path).headers["ETag"] for path in (path, "/api/conversations?limit=5")}
        with (
            servers[1].other_client(ada) as follower,
            run_in_background(lambda: list(follower.stream("GET", f"{exchange.path}/events"))) as [stream],
        ):
            for path, etag in etags.items():
                wait_until(lambda path=path, etag=etag: other.get(path, If_None_Match=etag).status == 200)
                assert '"failed"' in other.get(path).body.decode()
        record_measurement("seconds until the reply reads failed", time.monotonic() - killed_at)
        assert time.monotonic() - killed_at < 60
        assert exchange.load(other) == {**reply, "status": "failed", "error": "The server was stopped"}
        assert join_deltas(stream.result()) == reply["text"]
        assert stream.result()[-1][:2] == ("error", {"error": "The server was stopped"})
        assert other.send_message(exchange.conversation_id, "Again").status == 201
    assert "Traceback" not in servers[1].output


@on_sqlite
def test_repeat_after_kill_9_gets_another_reply(servers):
    with servers[0].create_logged_in_client("ada") as ada, servers[1].other_client(ada) as other:
        conversation_id = ada.create_conversation()
        first = ada.send_message(conversation_id, "/slow 5", Idempotency_Key="key", **ASYNC).json
        wait_until(lambda: ada.list_messages(conversation_id)[1]["text"])
        servers[0].kill()
        response = other.send_message(conversation_id, "/slow 5", Idempotency_Key="key")  # joins it
        assert (response.status, response.json[1]["status"]) == (201, "failed")
        response = other.send_message(conversation_id, "/slow 5", Idempotency_Key="key")
        question, reply = response.json
        assert (response.status, question, reply["id"] > first[1]["id"]) == (201, first[0], True)
        assert (reply["text"], reply.get("status")) == ("1 2 3 4 5 ", None)
        assert other.list_messages(conversation_id) == response.json


def check_integrity(database):
    """Check a SQLite database for damage and orphans."""
    if database.startswith("sqlite"):
        with closing(sqlite3.connect(database.removeprefix("sqlite:///"))) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert connection.execute("PRAGMA foreign_key_check").fetchall() == []


def send_until_killed(server, client, conversation_id, exchanges):
    """Send messages until the server is killed; append each exchange that it returned."""
    with server.other_client(client) as sender, suppress(OSError, HTTPException):
        while True:
            response = sender.send_message(conversation_id, f"Text {len(exchanges)}")
            assert response.status == 201
            exchanges.append(response.json)


def check_stored(client, conversation_id, exchanges):
    """Check that exchanges are stored as they were returned, and that there are no parts of others."""
    messages = client.list_messages(conversation_id)
    assert [message["sender"] for message in messages] == ["user", "bot"] * (len(messages) // 2)
    stored = [messages[index : index + 2] for index in range(0, len(messages), 2)]
    assert all(exchange in stored for exchange in exchanges)


def test_acknowledged_messages_survive_kill_9(serve, database):
    server = serve(**SHARED_SESSIONS)
    client = server.create_logged_in_client("ada")
    returned = {client.create_conversation(): [] for _ in range(8)}
    for number in range(1, 5):
        sends = [partial(send_until_killed, server, client, *item) for item in returned.items()]
        with run_in_background(*sends) as sendings:
            wait_until(lambda count=40 * number: sum(map(len, returned.values())) > count)
            server.kill()
        assert [sending.result() for sending in sendings] == [None] * 8
        check_integrity(database)
        server = serve(**SHARED_SESSIONS)
        client = server.other_client(client)
        for conversation_id, exchanges in returned.items():
            check_stored(client, conversation_id, exchanges)
    record_measurement("acknowledged messages, all of them stored", sum(map(len, returned.values())))
    client.close()
