"""Replies of the served program that outlive connections, sessions and processes, seen from another process.

What two processes do by way of the database, tests/test_replies.py tests on both databases; the tests here that take
long use one of them.
"""

import os
import signal
import sqlite3
import threading
import time
from contextlib import closing, contextmanager, suppress
from http.client import HTTPException
from itertools import islice
from pathlib import Path

import pytest

from tests.conftest import SHARED_SESSIONS, on_sqlite
from tests.helpers.bots import ASYNC, join_deltas
from tests.helpers.model_server import ModelServer, running, stall
from tests.helpers.server import (
    PASSWORD,
    TIMEOUT,
    measure,
    record_measurement,
    run_concurrently,
    run_in_background,
    wait_until,
)

CONNECTION_LOST = (OSError, HTTPException)
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


def lose_connection(client):
    """Do nothing more than what happened before."""


def log_out(client):
    assert client.post("/api/logout/1").status == 200


def change_password(client):
    passwords = {"current_password": PASSWORD, "new_password": f"{PASSWORD}!"}
    assert client.put("/api/password", passwords).status == 200


@pytest.mark.parametrize("interrupt", [lose_connection, log_out, change_password])
@on_sqlite
def test_interrupted_stream_is_resumed_at_other_server(model, model_servers, gate, interrupt):
    model.script = ["One ", lambda handler: gate.wait(), "two ", "three"]
    with model_servers[0].create_logged_in_client("ada") as ada, model_servers[1].other_client(ada) as other:
        conversation_id = ada.create_conversation()
        path = f"/api/conversations/{conversation_id}/messages"
        with model_servers[0].other_client(ada) as reader:
            stream = reader.stream("POST", path, {"text": "Hello"})
            received = list(islice(stream, 2))
            stream.close()
        interrupt(other)
        if not other.is_logged_in():
            assert other.login("ada").status == 200
        assert [name for name, *_ in received] == ["start", "delta"]
        reply_path = f"{path}/{received[0][1][1]['id']}"
        assert other.get(reply_path).json["status"] == "in_progress"
        headers = {"Last-Event-ID": received[-1][2]}
        with run_in_background(lambda: list(other.stream("GET", f"{reply_path}/events", **headers))) as [resuming]:
            time.sleep(1)  # the reply goes on while the other server follows it
            gate.set()
        events = resuming.result()
        assert join_deltas(received) + join_deltas(events) == "One two three"
        assert events[-1][:2] == ("done", other.get(path).json)
        assert other.get(f"{reply_path}/events", Last_Event_ID=events[-1][2]).status == 204


@on_sqlite
def test_other_server_shows_reply_grow_within_seconds(servers):
    with servers[0].create_logged_in_client("ada") as ada, servers[1].other_client(ada) as other:
        exchange = Exchange(ada, "/slow 10")
        exchange.wait_for_words(ada, 1)
        lags = []
        with servers[0].other_client(ada) as reader:
            for _, data, _ in islice(reader.stream("GET", f"{exchange.path}/events"), 2, 8):
                seconds, _ = measure(lambda word=data["text"]: wait_until(lambda: word in exchange.load(other)["text"]))
                lags.append(seconds)
        record_measurement("most seconds until the other server shows a word", max(lags))
        assert max(lags) < 10
        assert other.get(f"/api/conversations/{exchange.conversation_id}").json["messages"][0] == exchange.question


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


def test_sends_with_one_key_at_both_servers_ask_model_once(model, model_servers):
    model.script = [step for number in range(10) for step in (f"{number} ", lambda handler: time.sleep(0.1))]
    with model_servers[0].create_logged_in_client("ada") as ada:
        conversation_id = ada.create_conversation()
        path = f"/api/conversations/{conversation_id}/messages"

        def send(number):
            """Send the message, as a stream or not, to one server or the other; return the stored pair."""
            with model_servers[number % 2].other_client(ada) as client:
                if number % 4 < 2:
                    return list(client.stream("POST", path, {"text": "Hello"}, Idempotency_Key="key"))[-1][1]
                response = client.send_message(conversation_id, "Hello", Idempotency_Key="key")
                assert response.status == 201
                return response.json

        pairs = run_concurrently(16, send)
        assert pairs == [ada.get(path).json] * 16
    assert len(model.requests) == 1


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


class LoadGenerator:
    """Users, each with a conversation, who send messages until they are stopped, never one twice."""

    def __init__(self, server, size):
        self.server = server
        self.clients = [server.create_logged_in_client(f"user {number}") for number in range(size)]
        self.conversation_ids = [client.create_conversation() for client in self.clients]
        self.acknowledged = [[] for _ in self.clients]
        self.lost_connections = 0
        self.is_over = threading.Event()
        self.round = 0

    def send(self, number):
        """Send messages as a user; connect again when the connection is lost."""
        with self.server.other_client(self.clients[number]) as client:
            count = 0
            while not self.is_over.is_set():
                count += 1
                text = f"<{self.round}:{number}:{count}>"
                try:
                    response = client.send_message(self.conversation_ids[number], text)
                except CONNECTION_LOST:
                    self.lost_connections += 1
                    time.sleep(0.1)
                    continue
                assert response.status == 201
                self.acknowledged[number].append(response.json)

    @contextmanager
    def run(self):
        """Let all users send while the block is executed."""
        self.round += 1
        self.is_over.clear()
        with run_in_background(
            *(lambda number=number: self.send(number) for number in range(len(self.clients)))
        ) as sending:
            try:
                yield
            finally:
                self.is_over.set()
        for future in sending:
            future.result()

    def count(self):
        """Return the number of acknowledged messages."""
        return sum(map(len, self.acknowledged))

    def use(self, server):
        """Use another server of the same database."""
        self.close()
        self.server = server
        self.clients = [server.other_client(client) for client in self.clients]

    def check(self):
        """Check that every acknowledged exchange is stored as it was returned, and that all exchanges are whole."""
        for client, conversation_id, pairs in zip(self.clients, self.conversation_ids, self.acknowledged, strict=True):
            messages = client.list_messages(conversation_id)
            assert [message["sender"] for message in messages] == ["user", "bot"] * (len(messages) // 2)
            stored = list(zip(messages[::2], messages[1::2], strict=True))
            assert len({question["text"] for question, _ in stored}) == len(stored)
            assert all(tuple(pair) in stored for pair in pairs)

    def close(self):
        for client in self.clients:
            client.close()


def check_integrity(database):
    """Check a SQLite database for damage and orphans."""
    if database.startswith("sqlite"):
        with closing(sqlite3.connect(database.removeprefix("sqlite:///"))) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert connection.execute("PRAGMA foreign_key_check").fetchall() == []


def test_acknowledged_messages_survive_kill_9(serve, database):
    rounds = 6 if database.startswith("sqlite") else 3
    server = serve(**SHARED_SESSIONS)
    load = LoadGenerator(server, 8)
    for number in range(rounds):
        count = load.count()
        with load.run():
            wait_until(lambda count=count, number=number: load.count() > count + 10 * number)
            server.kill()
        check_integrity(database)
        server = serve(**SHARED_SESSIONS)
        load.use(server)
        load.check()
    assert load.lost_connections
    record_measurement("rounds", rounds)
    record_measurement("acknowledged messages, all of them stored", load.count())
    load.close()


def find_client_ports(pid, port):
    """Return the clients' ports of the connections to a port that a process has."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            inodes.add(os.readlink(link))
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {
        int(row[2].split(":")[1], 16)
        for row in rows
        if int(row[1].split(":")[1], 16) == port and f"socket:[{row[9]}]" in inodes
    }


class PollingClient:
    """A client that asks for its user and the status list again and again."""

    def __init__(self, server, number):
        self.client = server.create_logged_in_client(f"user {number}")
        self.lost_ports = []
        self.count = 0

    def poll(self, is_over):
        """Poll until an event is set; note the ports of lost connections."""
        while not is_over.is_set():
            socket = self.client.connection.sock
            port = socket and socket.getsockname()[1]
            try:
                assert self.client.is_logged_in()
                users = self.client.get("/api/users/status").json["users"]
                assert {user["status"] for user in users} == {"Online"}
                self.count += 1
            except CONNECTION_LOST:
                self.lost_ports.append(port)
            time.sleep(0.02)


@on_sqlite
def test_kill_9_of_worker_ends_only_its_own_connections(serve):
    server = serve()
    clients = [PollingClient(server, number) for number in range(16)]
    is_over = threading.Event()
    with run_in_background(*(lambda client=client: client.poll(is_over) for client in clients)) as polling:
        try:
            for _ in range(3):
                time.sleep(1)
                for client in clients:
                    client.lost_ports.clear()
                victim, other = server.all_workers()
                os.kill(victim, signal.SIGSTOP)
                ports = find_client_ports(victim, server.port)
                os.kill(victim, signal.SIGKILL)
                wait_until(lambda other=other: len(set(server.workers()) - {other}) == 1)
                lost_ports = [port for client in clients for port in client.lost_ports]
                assert set(lost_ports) <= ports
                assert len(lost_ports) == len(set(lost_ports))
            counts = [client.count for client in clients]
            wait_until(
                lambda: all(client.count > count for client, count in zip(clients, counts, strict=True)), TIMEOUT
            )
        finally:
            is_over.set()
    for future in polling:
        future.result()
    for client in clients:
        client.client.close()
