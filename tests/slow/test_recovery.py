"""Replies of the served program that outlive connections, sessions and processes, seen from another process."""

import sqlite3
import threading
import time
from contextlib import closing, suppress
from functools import partial
from http.client import HTTPException
from itertools import islice

import pytest

from tests.conftest import SHARED_SESSIONS, on_sqlite
from tests.helpers.bots import ASYNC, join_deltas
from tests.helpers.model_server import ModelServer, running, stall
from tests.helpers.server import PASSWORD, measure, run_in_background, wait_until

ONE_WORKER = {**SHARED_SESSIONS, "WEB_CONCURRENCY": 1}


@pytest.fixture
def model():
    with running(ModelServer()) as model:
        yield model


@pytest.fixture
def model_servers(serve, model):
    """Two servers of one database, each with one worker and a model."""
    return serve(**ONE_WORKER, **model.settings()), serve(**ONE_WORKER, **model.settings())


class Exchange:
    """A message and its reply in progress, by the paths at which they are found."""

    def __init__(self, client, text):
        self.conversation_path = f"/api/conversations/{client.create_conversation()}"
        self.messages_path = f"{self.conversation_path}/messages"
        self.question, self.reply = client.post(self.messages_path, {"text": text}, **ASYNC).json
        self.path = f"{self.messages_path}/{self.reply['id']}"

    def load(self, client):
        """Return the reply as it is stored."""
        return client.get(self.path).json

    def wait_for_words(self, client, count):
        """Wait until the stored reply has so many words."""
        wait_until(lambda: len(self.load(client)["text"].split()) >= count)


@on_sqlite
def test_interrupted_stream_is_resumed_at_other_server_by_another_session(model, model_servers, gate):
    model.script = ["One ", lambda handler: gate.wait(), "two ", "three"]
    with model_servers[0].create_logged_in_client("ada") as ada, model_servers[1].other_client(ada) as other:
        path = f"/api/conversations/{ada.create_conversation()}/messages"
        with model_servers[0].other_client(ada) as reader:
            received = list(islice(reader.stream("POST", path, {"text": "Hello"}), 2))
        assert [name for name, *_ in received] == ["start", "delta"]
        assert (other.post("/api/logout/1").status, other.login("ada").status) == (200, 200)
        events_path = f"{path}/{received[0][1][1]['id']}/events"
        with run_in_background(lambda: list(other.stream("GET", events_path, Last_Event_ID=received[-1][2]))) as [
            resuming
        ]:
            time.sleep(1)  # the reply goes on while the other server follows it
            gate.set()
        events = resuming.result()
        assert join_deltas(received) + join_deltas(events) == "One two three"
        assert events[-1][:2] == ("done", other.get(path).json)
        assert other.get(events_path, Last_Event_ID=events[-1][2]).status == 204


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
        stopped = response.json
        assert (response.status, stopped["status"], seconds < 10) == (200, "stopped", True)
        # The follower has received what was not stored yet.
        assert join_deltas(received + rest).startswith(stopped["text"])
        assert len(join_deltas(received)) - len(stopped["text"]) < len("word ") * 20
        assert rest[-1][:2] == ("done", [exchange.question, stopped])
        assert model.wait_for_hang_up()
        assert exchange.load(ada) == stopped


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


@pytest.mark.parametrize("is_account", [False, True], ids=["conversation", "account"])
@on_sqlite
def test_deletion_at_other_server_closes_connection_of_model(model, model_servers, is_account):
    model.script = ["word ", stall]
    with model_servers[0].create_logged_in_client("ada") as ada, model_servers[1].other_client(ada) as other:
        exchange = Exchange(ada, "Hello")
        exchange.wait_for_words(other, 1)
        with model_servers[0].other_client(ada) as follower:
            stream = follower.stream("GET", f"{exchange.path}/events")
            assert next(stream)[0] == "start"
            path = "/api/account" if is_account else exchange.conversation_path
            assert other.delete(path, {"password": PASSWORD}).status == 204
            seconds, is_closed = measure(model.wait_for_hang_up)
            assert list(stream)[-1][:2] == ("error", {"error": "Conversation not found"})
        assert (is_closed, seconds < 10) == (True, True)


@on_sqlite
def test_reply_whose_model_is_silent_for_long_is_not_taken_for_abandoned(model, model_servers):
    model.script = ["One ", lambda handler: time.sleep(42), "two"]
    with model_servers[0].create_logged_in_client("ada") as ada, model_servers[1].other_client(ada) as other:
        exchange = Exchange(ada, "Hello")
        for _ in range(40):
            assert exchange.load(other)["status"] == "in_progress"
            time.sleep(1)
        exchange.wait_for_words(other, 2)
        assert wait_until(lambda: "status" not in exchange.load(other))


def test_kill_9_keeps_question_and_text_and_fails_reply_within_a_minute(serve):
    servers = serve(**ONE_WORKER), serve(**ONE_WORKER)
    with servers[0].create_logged_in_client("ada") as ada, servers[1].other_client(ada) as other:
        exchange = Exchange(ada, "/slow 60")
        with servers[0].other_client(ada) as reader:
            received = list(islice(reader.stream("GET", f"{exchange.path}/events"), 6))
            servers[0].kill()
        question, reply = other.get(exchange.messages_path).json
        assert (question, reply["status"]) == (exchange.question, "in_progress")
        assert len(reply["text"].split()) >= len(join_deltas(received).split()) - 2  # one word a second
        deadline = threading.Timer(60, servers[1].kill)
        deadline.start()
        events = list(other.stream("GET", f"{exchange.path}/events"))  # no other request comes
        deadline.cancel()
        failed = {**reply, "status": "failed", "error": "The server was stopped"}
        assert other.get(exchange.messages_path).json == [question, failed]
        assert (join_deltas(events), events[-1][1]) == (reply["text"], {"error": "The server was stopped"})
        assert other.post(exchange.messages_path, {"text": "Again"}).status == 201
    assert "Traceback" not in servers[1].output


def check_integrity(database):
    """Check a SQLite database for damage and orphans."""
    if database.startswith("sqlite"):
        with closing(sqlite3.connect(database.removeprefix("sqlite:///"))) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert connection.execute("PRAGMA foreign_key_check").fetchall() == []


def test_acknowledged_messages_survive_kill_9(serve, database):
    server = serve(**SHARED_SESSIONS)
    client = server.create_logged_in_client("ada")
    returned = {client.create_conversation(): [] for _ in range(8)}

    def send_until_killed(conversation_id):
        """Send messages until the server is killed; note each exchange that it returned."""
        with server.other_client(client) as sender, suppress(OSError, HTTPException):
            while True:
                response = sender.send_message(conversation_id, f"Text {len(returned[conversation_id])}")
                assert response.status == 201
                returned[conversation_id].append(response.json)

    for number in range(1, 5):
        with run_in_background(*[partial(send_until_killed, id) for id in returned]) as sendings:
            wait_until(lambda count=40 * number: sum(map(len, returned.values())) > count)
            server.kill()
        assert [sending.result() for sending in sendings] == [None] * 8
        check_integrity(database)
        client.close()
        server = serve(**SHARED_SESSIONS)
        client = server.other_client(client)
        for conversation_id, exchanges in returned.items():
            messages = client.list_messages(conversation_id)
            stored = [messages[index : index + 2] for index in range(0, len(messages), 2)]
            assert {(question["sender"], reply["sender"]) for question, reply in stored} == {("user", "bot")}
            assert all(exchange in stored for exchange in exchanges)
    client.close()
