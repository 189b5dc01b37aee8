"""The program when something breaks: killed processes, SIGTERM, a database that is away, read-only or full."""

import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, closing, contextmanager, suppress
from http.client import HTTPException
from pathlib import Path

import pytest

from tests.serving import PATIENCE, ROOT, Server, background, crowd, eventually, figure, free_port, pairs, timed

CUT_OFF = (OSError, HTTPException)
SHARED = {"SECRET_KEY": "shared", "SESSIONS_VALID_FROM": "2026-01-01T00:00:00Z"}  # sessions outlive the program
CHEAP = {"PASSWORD_HASH_METHOD": "pbkdf2:sha256:1"}


class Storm:
    """People, each with a conversation, who send until told to stop; what was acknowledged and what was refused."""

    def __init__(self, server, size):
        self.server = server
        self.people = [server.newcomer(f"user {number}") for number in range(size)]
        self.talks = [person.create() for person in self.people]
        self.acknowledged = [[] for _ in self.people]
        self.refusals = []  # (when asked, when answered, answer)
        self.cut_off = 0
        self.turn = 0
        self.done = threading.Event()

    def send(self, number, pause=0.0):
        """Send messages, never one twice, until `done`; reconnect when cut off."""
        with self.server.spare_client(self.people[number]) as client:
            turn = 0
            while not self.done.is_set():
                turn += 1
                text = f"<{self.turn}:{number}:{turn}>"
                asked = time.monotonic()
                try:
                    answer = client.send(self.talks[number], text)
                except CUT_OFF:
                    self.cut_off += 1
                    time.sleep(0.1)
                    continue
                if answer.status == 201:
                    self.acknowledged[number].append(text)
                else:
                    self.refusals.append((asked, time.monotonic(), answer))
                    time.sleep(0.05)
                time.sleep(pause)

    @contextmanager
    def blowing(self, pause=0.0):
        """Let everybody send while the block lasts."""
        self.turn += 1
        self.done.clear()
        acts = [lambda number=number: self.send(number, pause) for number in range(len(self.people))]
        with background(*acts) as sending:
            try:
                yield
            finally:
                self.done.set()
        for each in sending:
            each.result()

    def count(self):
        return sum(map(len, self.acknowledged))

    def move_to(self, server):
        """Go on with another server of the same database."""
        self.close()
        self.server = server
        self.people = [self.server.spare_client(person) for person in self.people]

    def check(self):
        """Every acknowledged message must be there, once, in a whole pair."""
        for person, talk, acknowledged in zip(self.people, self.talks, self.acknowledged, strict=True):
            said = pairs(person.messages(talk))
            assert len(set(said)) == len(said)
            assert set(acknowledged) <= set(said)

    def close(self):
        for person in self.people:
            person.close()


@pytest.mark.slow
def test_what_was_acknowledged_survives_kill_9(serve, database):
    rounds = 20 if database.startswith("sqlite") else 5
    server = serve(**SHARED)
    storm = Storm(server, 8)
    for number in range(rounds):
        before = storm.count()
        with storm.blowing():
            eventually(lambda before=before, number=number: storm.count() > before + 3 * number)
            server.kill()
        if database.startswith("sqlite"):
            with closing(sqlite3.connect(database.removeprefix("sqlite:///"))) as connection:
                assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
                assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        server = serve(**SHARED)
        storm.move_to(server)
        storm.check()
    assert not storm.refusals
    assert storm.cut_off
    figure("rounds", rounds)
    figure("messages acknowledged, all there", storm.count())
    storm.close()


def connections_of(pid, port):
    """Return the clients' ports of the connections to `port` that a process holds."""
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


@pytest.mark.slow
def test_kill_9_of_a_worker_breaks_only_its_own_requests(serve):
    server = serve()
    people = [server.newcomer(f"user {number}") for number in range(16)]
    done = threading.Event()
    broken, logged_out, flaps, served = [], [], [], []

    def use(number):
        person = people[number]
        while not done.is_set():
            own = person.connection.sock and person.connection.sock.getsockname()[1]
            try:
                if not person.is_logged_in():
                    logged_out.append(number)
                users = person.get("/api/users/status").json["users"]
                flaps.extend(user for user in users if user["status"] != "Online")
                served.append(number)
            except CUT_OFF:
                broken.append(own)

    with background(*[lambda number=number: use(number) for number in range(16)]) as using:
        try:
            for _ in range(3):
                time.sleep(1)
                broken.clear()
                victim, *others = server.all_workers()
                os.kill(victim, signal.SIGSTOP)
                held = connections_of(victim, server.port)
                os.kill(victim, signal.SIGKILL)
                eventually(lambda others=others: len(set(server.workers()) - set(others)) == 1)
                assert set(broken) <= held
                assert len(broken) == len(set(broken))
            time.sleep(1)
            served.clear()
            eventually(lambda: set(served) == set(range(16)))
        finally:
            done.set()
    for each in using:
        each.result()
    assert not logged_out
    assert not flaps
    for person in people:
        person.close()


@pytest.mark.slow
@pytest.mark.parametrize("slow", ["hash", "bot"])
def test_sigterm_lets_requests_under_way_finish(serve, slow):
    server = serve(PASSWORD_HASH_METHOD="pbkdf2:sha256:2000000" if slow == "hash" else "pbkdf2:sha256:1")
    with ExitStack() as stack:
        ada = stack.enter_context(server.newcomer("ada"))
        talk = ada.create()
        clients = [stack.enter_context(server.spare_client(ada)) for _ in range(4)]
        assert all(client.is_logged_in() for client in clients)  # they are connected
        done, lost = threading.Event(), []

        def ask(number):
            client = clients[number]
            return timed(client.signup, f"user {number}") if slow == "hash" else timed(client.send, talk, "/slow 5")

        def hurry():
            with server.spare_client(ada) as client:
                while not done.is_set():
                    started = time.monotonic()
                    try:
                        assert client.get("/api/conversations").status == 200
                    except CUT_OFF:
                        lost.append(started)
                        time.sleep(0.05)

        with background(lambda: crowd(4, ask), hurry, hurry) as [asking, *hurrying]:
            try:
                time.sleep(0.4)
                assert not asking.done()
                terminated = time.monotonic()
                seconds, status = timed(server.terminate)
                asked = asking.result()
            finally:
                done.set()
        for each in hurrying:
            each.result()
    figure("seconds from SIGTERM to the end", seconds)
    assert status == 0
    assert seconds < 15
    assert [answer.status for _, answer in asked] == [201] * 4
    assert min(lost, default=terminated) >= terminated  # what was asked before was answered
    assert "Traceback" not in server.output


class Postgres:
    """A PostgreSQL server of its own, in a folder of its own."""

    def __init__(self, folder):
        found = [*Path("/usr/lib/postgresql").glob("*/bin/initdb"), shutil.which("initdb")]
        if not (initdb := next(filter(None, found), None)):
            pytest.skip("initdb is not installed")
        self.bin = Path(initdb).parent
        self.folder = folder
        self.user = "postgres" if os.getuid() == 0 else None
        self.port = free_port()
        if self.user:
            shutil.chown(folder, self.user)
        self.run("initdb", "-D", folder / "data", "-U", "chat", "-A", "trust", "-N", "-E", "UTF8")

    def run(self, program, *arguments):
        command = [self.bin / program, *map(str, arguments)]
        done = subprocess.run(command, user=self.user, cwd="/", stdout=subprocess.DEVNULL, timeout=2 * PATIENCE)
        assert done.returncode == 0

    def start(self):
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1"
        log = self.folder / "log"
        self.run("pg_ctl", "start", "-w", "-D", self.folder / "data", "-l", log, "-o", options)

    def stop(self, mode):
        self.run("pg_ctl", "stop", "-w", "-D", self.folder / "data", "-m", mode)


@pytest.fixture
def postgres():
    folder = Path(tempfile.mkdtemp(prefix="chat-pg-"))
    postgres = Postgres(folder)
    postgres.start()
    yield postgres
    with suppress(AssertionError):
        postgres.stop("immediate")
    shutil.rmtree(folder)


@pytest.mark.slow
def test_while_postgresql_restarts_people_get_503_and_lose_nothing(postgres):
    server = Server(**CHEAP, DATABASE_URL=f"postgresql://chat@127.0.0.1:{postgres.port}/postgres")
    try:
        storm = Storm(server, 8)
        for mode in ("fast", "immediate"):
            storm.refusals.clear()
            with storm.blowing(pause=0.01):
                time.sleep(1)
                postgres.stop(mode)
                time.sleep(2)
                with server.client() as client:
                    for refused in (client.login("user 0"), client.get("/api/users/status"), client.signup("bob")):
                        assert refused.status == 503
                        assert set(refused.json) == {"error"}
                    assert client.get("/api/test").status == 200
                postgres.start()
                back = time.monotonic()
                time.sleep(2)
                before = storm.count()
                eventually(lambda before=before: storm.count() > before + 20)
            assert storm.refusals
            for asked, _, answer in storm.refusals:
                assert answer.status == 503
                assert int(answer.headers["Retry-After"]) > 0
                assert set(answer.json) == {"error"}
                assert asked < back
            slowest = max(answered - asked for asked, answered, _ in storm.refusals)
            figure(f"{mode}: refusals", len(storm.refusals))
            figure(f"{mode}: most seconds until a refusal", slowest)
            storm.check()
        assert storm.cut_off == 0
        figure("messages acknowledged, all there once", storm.count())
        storm.close()
        assert "Traceback" not in server.output
    finally:
        server.kill()


@pytest.fixture
def bound():
    """A command that runs another bound by the permissions of files, as root is not."""
    if os.getuid() != 0:
        return []
    if not shutil.which("setpriv"):
        pytest.skip("root is not bound by permissions, and setpriv, which could bind it, is not installed")
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]


def last_words(prefix, url):
    """Run the program, which must not start; return what it prints."""
    command = [*prefix, sys.executable, "run.py"]
    settings = {**os.environ, "DATABASE_URL": url, "PORT": "0"}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1
    assert not done.stdout
    return done.stderr


sqlite_only = pytest.mark.parametrize("database", ["sqlite"], indirect=True)


@pytest.mark.slow
def test_a_database_that_cannot_be_made_stops_the_start_with_one_line(tmp_path, bound):
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(0o555)
    for url in (f"sqlite:///{folder}/chat.db", f"sqlite:///{tmp_path}/nowhere/chat.db", f"sqlite:///{tmp_path}"):
        assert re.fullmatch("Error: the database of DATABASE_URL cannot be used: .+\n", last_words(bound, url))
    (tmp_path / "empty.db").touch(0o444)
    (tmp_path / "nonsense.db").write_text("nonsense" * 1000)
    for name in ("empty.db", "nonsense.db"):
        words = last_words(bound, f"sqlite:///{tmp_path / name}")
        assert re.fullmatch("Error: the database of DATABASE_URL cannot be used: .+\n", words)


@contextmanager
def serving(url, prefix=()):
    server = Server(prefix=prefix, DATABASE_URL=url, **SHARED, **CHEAP)
    try:
        yield server
    finally:
        server.kill()


def is_refused(answer):
    assert answer.status == 503
    assert int(answer.headers["Retry-After"]) > 0
    assert set(answer.json) == {"error"}
    return True


def is_well(person, talk):
    """Tell whether reading and writing both work, through several connections to the database at once."""
    with ExitStack() as stack:
        clients = [stack.enter_context(type(person)(person.connection.port)) for _ in range(12)]
        for client in clients:
            client.cookie = person.cookie
        answers = crowd(12, lambda number: clients[number].send(talk, f"well {number}"))
        return {answer.status for answer in answers} == {201} and person.get("/api/conversations").status == 200


@pytest.mark.slow
@sqlite_only
def test_a_database_file_that_turns_read_only_is_read_and_recovers(database, bound):
    path = Path(database.removeprefix("sqlite:///"))
    with serving(database) as server, server.newcomer("ada") as ada:
        talk, cookie = ada.create(), ada.cookie
        assert ada.send(talk).status == 201
    path.chmod(0o444)
    with serving(database, bound) as server, server.client() as ada:
        ada.cookie = cookie
        for _ in range(3):
            assert ada.get("/api/conversations").json[0]["messages"][0]["text"] == "Hello"
            assert is_refused(ada.send(talk))
            assert is_refused(ada.signup("bob"))
        path.chmod(0o644)
        seconds, _ = timed(eventually, lambda: is_well(ada, talk), 10)
        figure("seconds until writing works again", seconds)
        assert "Traceback" not in server.output


@pytest.mark.slow
@sqlite_only
def test_a_folder_that_turns_read_only_refuses_and_recovers(database, tmp_path, bound):
    path = Path(database.removeprefix("sqlite:///"))
    folder = tmp_path / "folder"
    folder.mkdir()
    path = path.rename(folder / "chat.db")
    with serving(f"sqlite:///{path}", bound) as server, server.newcomer("ada") as ada:
        talk = ada.create()
        folder.chmod(0o555)
        try:
            for answer in (ada.get("/api/conversations"), ada.send(talk), ada.signup("bob")):
                assert answer.status in (200, 201) or is_refused(answer)
            assert ada.get("/api/test").status == 200
        finally:
            folder.chmod(0o755)
        eventually(lambda: is_well(ada, talk), 10)
        assert "Traceback" not in server.output


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 3 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("may not mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
def test_on_a_full_disk_reads_go_on_and_writes_do_when_there_is_room(small_disk):
    filler = small_disk / "filler"

    def fill():
        with filler.open("ab", buffering=0) as file, suppress(OSError):
            while True:
                file.write(b"x" * 4096)

    url = f"sqlite:///{small_disk / 'chat.db'}"
    with serving(url) as server, server.newcomer("ada") as ada:
        talk = ada.create()
        text = "x" * 50_000
        acknowledged = 0
        while (answer := ada.send(talk, text)).status == 201:
            acknowledged += 1
            if acknowledged == 3:
                fill()
            assert acknowledged < 100
        for _ in range(3):
            assert is_refused(ada.send(talk, text))
            assert len(ada.messages(talk)) == 2 * acknowledged
        filler.unlink()
        assert ada.send(talk, text).status == 201
        assert pairs(ada.messages(talk)) == [text] * (acknowledged + 1)
        assert is_refused(answer)
        fill()
        assert is_refused(ada.send(talk, text))
        assert "Traceback" not in server.output
        cookie = ada.cookie
    small_disk.joinpath("other").mkdir()
    words = last_words([], f"sqlite:///{small_disk / 'other' / 'chat.db'}")
    assert re.fullmatch("Error: the database of DATABASE_URL cannot be used: .+\n", words)
    filler.unlink()
    with serving(url) as server, server.client() as ada:
        ada.cookie = cookie
        assert pairs(ada.messages(talk)) == [text] * (acknowledged + 1)
        assert is_well(ada, talk)
    with closing(sqlite3.connect(small_disk / "chat.db")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
