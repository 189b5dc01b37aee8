"""The served program while its database fails, is silent, read-only or full: 503, nothing lost, and recovery."""

import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from app import create_app, db
from tests.conftest import on_sqlite
from tests.helpers.bots import ASYNC, join_deltas
from tests.helpers.data import execute
from tests.helpers.server import PASSWORD, ROOT, TIMEOUT, measure, parse_events, run_all, run_in_background, wait_until
from tests.slow.conftest import run_server

MAX_SECONDS = 15  # until a silent database is a 503


def is_unavailable(response):
    """Return whether a response says, in the way of the API, to try again later."""
    assert response.status == 503, response.body
    assert int(response.headers["Retry-After"]) > 0
    assert list(response.json) == ["error"]
    return True


def is_healthy(server, client, conversation_id):
    """Return whether reading and writing work, through several connections to the database at once."""
    with ExitStack() as stack:
        clients = [stack.enter_context(server.other_client(client)) for _ in range(12)]
        responses = run_all(*(partial(client.send_message, conversation_id, "Healthy?") for client in clients))
        return {response.status for response in responses} == {201} and client.get("/api/conversations").status == 200


class Sender:
    """A user who sends messages, never one twice, until an event is set."""

    def __init__(self, server, number):
        self.client = server.create_logged_in_client(f"user {number}")
        self.conversation_id = self.client.create_conversation()
        self.acknowledged, self.refusals, self.sent = [], [], 0

    def send(self, is_over):
        """Send messages; note what is acknowledged, and when what is refused was sent and answered."""
        while not is_over.is_set():
            self.sent += 1
            sent_at = time.monotonic()
            response = self.client.send_message(self.conversation_id, f"Message {self.sent}")
            if response.status == 201:
                self.acknowledged.append(tuple(response.json))
            else:
                assert is_unavailable(response)
                self.refusals.append((sent_at, time.monotonic()))
            time.sleep(0.02)


@contextmanager
def run_senders(server):
    """Let six users send messages during the block, in which all are refused sometimes, and a while longer; yield them.

    What was acknowledged must be stored then, and nothing twice.
    """
    senders, is_over = [Sender(server, number) for number in range(6)], threading.Event()

    def wait_until_acknowledged():
        counts = [len(sender.acknowledged) for sender in senders]
        wait_until(lambda: all(len(s.acknowledged) > n for s, n in zip(senders, counts, strict=True)))

    with run_in_background(*(partial(sender.send, is_over) for sender in senders)) as sending:
        try:
            wait_until_acknowledged()
            yield senders
            wait_until_acknowledged()
        finally:
            is_over.set()
    for sender, future in zip(senders, sending, strict=True):
        future.result()
        messages = sender.client.list_messages(sender.conversation_id)
        exchanges = list(zip(messages[::2], messages[1::2], strict=True))
        assert len({question["text"] for question, _ in exchanges}) == len(exchanges)
        assert [exchange for exchange in sender.acknowledged if exchange not in exchanges] == []
        sender.client.close()
    refusals = [answered_at - sent_at for sender in senders for sent_at, answered_at in sender.refusals]
    assert max(refusals) < MAX_SECONDS
    assert "Traceback" not in server.output


def follow_to_the_end(server, user, path):
    """Follow a reply, and resume while the database is unavailable; return the text and the last event's data."""
    events = []
    with server.other_client(user) as client:
        while not events or events[-1][0] != "done":
            ids = [id for *_, id in events if id]
            response = client.get(path, Last_Event_ID=ids[-1] if ids else "")
            if response.status == 200:
                events += parse_events(response.body.splitlines(keepends=True))
            else:
                assert is_unavailable(response)
            time.sleep(0.1)
    return join_deltas(events), events[-1][1]


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_restart_of_postgresql_loses_no_message_and_no_reply(postgresql, mode):
    with run_server(postgresql.url) as server, server.create_logged_in_client("ada") as ada:
        conversation_id = ada.create_conversation()
        question, reply = ada.send_message(conversation_id, "/slow 12", **ASYNC).json
        path = f"/api/conversations/{conversation_id}/messages"
        follow = partial(follow_to_the_end, server, ada, f"{path}/{reply['id']}/events")
        with run_in_background(follow) as [follower], run_senders(server) as senders:
            postgresql.stop(mode)
            time.sleep(2)
            with server.client() as client:
                for response in (client.login("ada"), client.signup("bob"), client.get("/api/users/status")):
                    assert is_unavailable(response)
                assert client.get("/api/test").status == 200
            postgresql.start()
            started_at = time.monotonic()
            time.sleep(2)
        assert max(sent_at for sender in senders for sent_at, _ in sender.refusals) < started_at + 1
        text, messages = follower.result()
        assert text == messages[1]["text"] == "".join(f"{number} " for number in range(1, 13))
        assert messages == ada.get(path).json
        assert (messages[0], "status" in messages[1]) == (question, False)


@pytest.fixture
def cluster(create_postgresql):
    """A PostgreSQL server and its synchronous replica."""
    primary = create_postgresql()
    primary.start(synchronous_standby_names="'*'")
    replica = create_postgresql(primary=primary)
    replica.start()
    return primary, replica


def test_failover_to_a_synchronous_replica_loses_no_acknowledged_message_and_needs_no_restart(cluster):
    primary, replica = cluster
    hosts = ",".join(f"127.0.0.1:{server.port}" for server in cluster)
    url = f"postgresql://chat@{hosts}/postgres?target_session_attrs=read-write"
    with run_server(url) as server, server.client() as client:
        workers = server.all_workers()
        with run_senders(server) as senders:
            primary.send_signal(signal.SIGKILL)
            for response in (client.login("user 0"), client.get("/api/health"), client.get("/api/users/status")):
                assert is_unavailable(response)
            wait_until(lambda: all(sender.refusals for sender in senders))
            replica.promote()
        assert server.workers() == workers


def list_requests(server, user, conversation_id):
    """Return functions that each send a request for which the database is needed, and measure it."""
    path = f"/api/conversations/{conversation_id}"
    paths = ("/api/health", "/api/current_user", "/api/users/status", "/api/conversations", "/api/messages?q=a", path)
    requests = [
        lambda client: client.signup("bob"),
        lambda client: client.login("ada"),
        lambda client: client.post("/api/conversations", {"name": "New"}),
        lambda client: client.put(path, {"name": "New"}),
        lambda client: client.delete(path),
        lambda client: client.delete("/api/account", {"password": PASSWORD}),
        *[lambda client: client.send_message(conversation_id)] * 3,
        *[lambda client, path=path: client.get(path) for path in paths],
    ]

    def send(request):
        with server.other_client(user) as client:
            return measure(request, client)

    return [partial(send, request) for request in requests]


def test_silent_postgresql_gives_503_in_time_and_recovers(postgresql):
    with run_server(postgresql.url) as server, server.create_logged_in_client("ada") as ada:
        conversation_id = ada.create_conversation()
        _, reply = ada.send_message(conversation_id, "/slow 8", **ASYNC).json
        with run_senders(server) as senders:
            postgresql.send_signal(signal.SIGSTOP)
            try:
                for _ in range(2):
                    results = run_all(*list_requests(server, ada, conversation_id))
                    assert all(is_unavailable(response) for _, response in results)
                    assert max(seconds for seconds, _ in results) < MAX_SECONDS
                wait_until(lambda: all(sender.refusals for sender in senders))  # a request that was under way, too
            finally:
                postgresql.send_signal(signal.SIGCONT)
            wait_until(lambda: is_healthy(server, ada, conversation_id))
        path = f"/api/conversations/{conversation_id}/messages/{reply['id']}"
        stored = wait_until(lambda: "status" not in (reply := ada.get(path).json) and reply)
        assert stored["text"].split()[-1] == "8"


def test_host_that_answers_is_used_after_silent_ones(postgresql):
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        ports = [first.getsockname()[1], second.getsockname()[1], postgresql.port]
        hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
        with run_server(f"postgresql://chat@{hosts}/postgres") as server, server.client() as client:
            assert client.signup("ada").status == 201


def test_second_address_of_a_host_is_used_if_the_first_is_silent(postgresql, monkeypatch):
    addresses = [
        socket.getaddrinfo(ip, postgresql.port, proto=socket.IPPROTO_TCP)[0] for ip in ("127.0.0.2", "127.0.0.1")
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: addresses)
    app = create_app({"DATABASE_URL": f"postgresql://chat@db.example:{postgresql.port}/postgres"})
    with socket.create_server(("127.0.0.2", postgresql.port)):
        assert execute(app, "SELECT 1") == [(1,)]
    with app.app_context():
        db.engine.dispose()


@pytest.fixture
def obey_permissions():
    """A command that runs another one bound by the permissions of files, as root is not."""
    if os.getuid() != 0:
        return []
    if not shutil.which("setpriv"):
        pytest.skip("root ignores permissions, and setpriv is not installed")
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]


def run_expecting_failure(prefix, url):
    """Run the program, which must not start; return what it prints."""
    process = subprocess.run(
        [*prefix, sys.executable, "run.py"],
        cwd=ROOT,
        env={**os.environ, "DATABASE_URL": url, "PORT": "0"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert process.returncode == 1
    return process.stdout + process.stderr


UNUSABLE = r"\[.+ Starting gunicorn .+\nError: the database of DATABASE_URL cannot be used: .+\n"


@pytest.mark.parametrize("path", ["read-only/chat.db", "read-only.db"])
def test_database_file_that_cannot_be_written_stops_start_with_one_line(tmp_path, obey_permissions, path):
    (tmp_path / "read-only").mkdir(0o555)
    (tmp_path / "read-only.db").touch(0o444)
    assert re.fullmatch(UNUSABLE, run_expecting_failure(obey_permissions, f"sqlite:///{tmp_path / path}"))


@on_sqlite
def test_read_only_database_file_can_be_read(database, obey_permissions):
    path = Path(database.removeprefix("sqlite:///"))
    with run_server(database) as server, server.create_logged_in_client("ada") as ada:
        conversation_id, cookie = ada.create_conversation(), ada.cookie
        assert ada.send_message(conversation_id).status == 201
    path.chmod(0o444)
    with run_server(database, obey_permissions) as server, server.client() as ada:
        ada.cookie = cookie
        for _ in range(3):
            assert ada.list_messages(conversation_id)[0]["text"] == "Hello"
            assert is_unavailable(ada.send_message(conversation_id))
            assert is_unavailable(ada.signup("bob"))
        assert "Traceback" not in server.output


@on_sqlite
def test_read_only_database_folder_recovers(database, tmp_path, obey_permissions):
    folder = tmp_path / "folder"
    folder.mkdir()
    path = Path(database.removeprefix("sqlite:///")).rename(folder / "chat.db")
    with run_server(f"sqlite:///{path}", obey_permissions) as server, server.create_logged_in_client("ada") as ada:
        conversation_id = ada.create_conversation()
        folder.chmod(0o555)
        try:
            for response in (ada.get("/api/conversations"), ada.send_message(conversation_id), ada.signup("bob")):
                assert response.status in (200, 201) or is_unavailable(response)
            assert ada.get("/api/test").status == 200
        finally:
            folder.chmod(0o755)
        wait_until(lambda: is_healthy(server, ada, conversation_id))
        assert "Traceback" not in server.output


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 3 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no permission to mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(path):
    """Write to a file until the disk is full."""
    with path.open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x" * 4096)


def test_full_disk_refuses_writes_and_loses_nothing(small_disk):
    filler, url = small_disk / "filler", f"sqlite:///{small_disk / 'chat.db'}"
    text = "x" * 50_000
    with run_server(url) as server, server.create_logged_in_client("ada") as ada:
        conversation_id, cookie = ada.create_conversation(), ada.cookie
        acknowledged = []
        while (response := ada.send_message(conversation_id, text)).status == 201:
            acknowledged += response.json
            if len(acknowledged) == 6:
                fill(filler)
            assert len(acknowledged) < 200
        assert is_unavailable(response)
        for _ in range(3):
            assert is_unavailable(ada.send_message(conversation_id, text))
            assert ada.list_messages(conversation_id)[: len(acknowledged)] == acknowledged
        filler.unlink()
        wait_until(lambda: ada.send_message(conversation_id, text).status == 201)
        wait_until(lambda: all("status" not in message for message in ada.list_messages(conversation_id)))
        messages = ada.list_messages(conversation_id)
        assert messages[: len(acknowledged)] == acknowledged
        fill(filler)
        assert is_unavailable(ada.send_message(conversation_id, text))
        assert "Traceback" not in server.output
    (small_disk / "other").mkdir()
    assert re.fullmatch(UNUSABLE, run_expecting_failure([], f"sqlite:///{small_disk / 'other' / 'chat.db'}"))
    filler.unlink()
    with run_server(url) as server, server.client() as ada:
        ada.cookie = cookie
        assert ada.list_messages(conversation_id)[: len(messages)] == messages
        assert is_healthy(server, ada, conversation_id)
    with closing(sqlite3.connect(small_disk / "chat.db")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
