"""What the benchmarks share: databases and what fills them, programs that serve, wrk that drives them, tables."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from sqlalchemy import create_engine, text

from tests.conftest import SERVER_URL, create_postgresql_database
from tests.helpers.server import ROOT, TIMEOUT, HttpClient

CONNECTIONS = 8
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")  # a second of CPU time in /proc
TIME = "2026-01-31T12:00:00.123456Z"  # when everything happened that a database is filled with
NUMBERS = "WITH RECURSIVE n(i) AS (SELECT CAST(:first AS BIGINT) UNION ALL SELECT i + 1 FROM n WHERE i < :last)"


@contextmanager
def sqlite_database():
    """Hand on the URL of a SQLite database yet to be made."""
    with tempfile.TemporaryDirectory() as folder:
        yield f"sqlite:///{folder}/chat.db"


DATABASES = {"SQLite": sqlite_database}
if SERVER_URL:
    DATABASES["PostgreSQL"] = create_postgresql_database


def psycopg_url(url):
    """Return the URL as SQLAlchemy wants it; SQLite's as it is."""
    return re.sub("^postgres(ql)?:", "postgresql+psycopg:", url)


class Filler:
    """A way to fill a database, of the program or of the textbook, with rows that the database makes itself."""

    def __init__(self, url, textbook=False):
        self.engine = create_engine(psycopg_url(url))
        self.sqlite = self.engine.dialect.name == "sqlite"
        self.textbook = textbook
        # The time as each has it in its column, and the number that the textbook gives a user itself.
        self.time = TIME.replace("T", " ").rstrip("Z") if textbook else TIME

    def _insert(self, into, select, first, last, **values):
        with self.engine.begin() as connection:
            if self.sqlite:
                connection.exec_driver_sql("PRAGMA cache_size=-1000000")
            statement = f"INSERT INTO {into} {NUMBERS} SELECT {select} FROM n WHERE i <= :last"
            connection.execute(text(statement), {"first": first, "last": last, **values})

    def users(self, first, last):
        """Add users by number; they cannot log in."""
        self._insert(
            '"user" (user_id, username, password_hash, is_logged_in, last_login, last_logout)',
            f"i, 'user' || i, '!', i % 2 = 0, '{self.time}', '{self.time}'",
            first,
            last,
        )

    def conversations(self, count, owner):
        """Add conversations; `owner` is SQL that makes the key of a user from their number i."""
        columns, values = ("", "") if self.textbook else (", updated_at", f", '{self.time}'")
        into = f"conversation (name, user_id, created_at{columns})"
        self._insert(into, f"'Conversation ' || i, {owner}, '{self.time}'{values}", 1, count)

    def messages(self, first, last, conversation):
        """Add messages by number; `conversation` is SQL that makes the key of a conversation from their number i."""
        message_text = "' messages were sent before this one, and some more words make it as long as messages are.'"
        self._insert(
            "message (sender, text, conversation_id, created_at)",
            f"CASE i % 2 WHEN 1 THEN 'user' ELSE 'bot' END, i || {message_text}, {conversation}, '{self.time}'",
            first,
            last,
        )

    def analyze(self):
        """Have the database note what is in it, as it does by and by; it is fit to be measured then."""
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)" if self.sqlite else "VACUUM ANALYZE")

    def size(self):
        """Return how many bytes the database has."""
        if self.sqlite:
            return os.path.getsize(self.engine.url.database)
        with self.engine.connect() as connection:
            return connection.exec_driver_sql("SELECT pg_database_size(current_database())").scalar()

    def close(self):
        self.engine.dispose()


class Program:
    """`python` with arguments, serving on a free port until it is stopped; `start` is the seconds to its first answer.

    What it prints goes to a file, which costs it what a log costs. {port} in an argument is the port.
    """

    def __init__(self, *arguments, **settings):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (it lives as long as the process)
        began = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, *(argument.format(port=self.port) for argument in arguments)],
            cwd=ROOT,
            env={**os.environ, "PORT": str(self.port), "WEB_CONCURRENCY": "2", **settings},
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > began + TIMEOUT:
                self.stop()
                self.log.seek(0)
                raise SystemExit(f"{arguments} does not serve:\n{self.log.read()}")
            time.sleep(0.005)
        self.start = time.monotonic() - began

    def _answers(self):
        try:
            with HttpClient(self.port) as client:
                return client.get("/api/test").status == 200
        except OSError:
            return False

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.stop()

    def stop(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(TIMEOUT)

    def login(self, username):
        """Return the client of a user, with a session."""
        client = HttpClient(self.port)
        assert client.login(username).status == 200
        return client

    def signup(self, username):
        """Make a user; return their client, with a session."""
        with HttpClient(self.port) as client:
            assert client.signup(username).status == 201
        return self.login(username)

    def workers(self):
        """Return the process ids of the workers."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    def cpu_seconds(self):
        """Return the CPU time that the workers have used."""
        fields = (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in self.workers())
        return sum(int(ticks) for values in fields for ticks in values[11:13]) / CLOCK_TICKS  # of user and of system

    def memory(self):
        """Return the bytes that master and workers take, what they share counted once (PSS)."""
        rollups = (Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in [self.process.pid, *self.workers()])
        return sum(int(re.search(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE)[1]) for rollup in rollups) * 1024


def project(url):
    """Serve the program on a database as its users do, but that one user may send at 64 connections at once."""
    return Program("run.py", DATABASE_URL=url, MAX_CONCURRENT_REPLIES="64")


def gunicorn(target, *options, **settings):
    """Serve a module's `app`."""
    options = ("--workers=2", "--bind=127.0.0.1:{port}", "--no-control-socket", *options)
    return Program("-m", "gunicorn", *options, target, **settings)


def textbook(url):
    """Serve the textbook version on a database."""
    name, url = "tests.benchmark.textbook", psycopg_url(url)
    subprocess.run(
        [sys.executable, "-m", "flask", "--app", name, "init"],
        cwd=ROOT,
        env={**os.environ, "DATABASE_URL": url},
        check=True,
    )
    return gunicorn(f"{name}:app", DATABASE_URL=url)


def wrk(port, seconds, paths, cookie=None, body=None, etag=None, connections=CONNECTIONS):
    """Return how many requests a second are answered, over so many seconds, taking the paths in turn; all must be."""
    script = [f"local paths, turn = {{{', '.join(map(json.dumps, paths))}}}, 0", "local threads = 0"]
    if cookie:
        script.append(f'wrk.headers["Cookie"] = {json.dumps(cookie)}')
    if etag:
        script.append(f'wrk.headers["If-None-Match"] = {json.dumps(etag)}')
    if body:
        script.append('wrk.method = "POST"; wrk.headers["Content-Type"] = "application/json"')
        script.append(f"wrk.body = [==[{json.dumps(body)}]==]")
    script.append(
        "function setup(thread) thread:set('offset', threads * math.floor(#paths / 2)); threads = threads + 1 end"
    )
    script.append("function init(args) turn = offset end")
    script.append("function request() turn = turn + 1; return wrk.format(nil, paths[turn % #paths + 1]) end")
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as file:
        file.write("\n".join(script))
        file.flush()
        command = [
            "wrk",
            f"-t{min(2, connections)}",
            f"-c{connections}",
            f"-d{seconds}s",
            "--timeout=30s",
            "-s",
            file.name,
        ]
        output = subprocess.run([*command, f"http://127.0.0.1:{port}"], capture_output=True, text=True, check=True)
    rate = re.search(r"Requests/sec:\s+([\d.]+)", output.stdout)
    if not rate or float(rate[1]) == 0 or "Non-2xx" in output.stdout or "Socket errors" in output.stdout:
        raise SystemExit(f"{paths[0]} was not always answered well:\n{output.stdout}{output.stderr}")
    return float(rate[1])


def milliseconds(client, method, path, body=None, **headers):
    """Return how long one answer takes, read to its end; it must be a good one, 304 with If_None_Match."""
    began = time.perf_counter()
    answer = client.request(method, path, body, **headers)
    taken = (time.perf_counter() - began) * 1000
    assert answer.status == 304 if headers else answer.status < 300, (
        f"{method} {path}: {answer.status} {answer.body[:200]}"
    )
    return taken


def number(value):
    """Return a figure as people read it: three digits that matter, thousands apart."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(*rows):
    """Print a Markdown table; the first row is its head."""
    head, *rows = ([cell if isinstance(cell, str) else number(cell) for cell in row] for row in rows)
    for row in (head, ["---", *["---:"] * (len(head) - 1)], *rows):
        sys.stdout.write(f"| {' | '.join(row)} |\n")
    sys.stdout.flush()


def note(message):
    """Say how far the benchmark is."""
    sys.stderr.write(f"{message}\n")


def alternate(rounds, *measures):
    """Return the median of each of several measures, taken in turn so that a noisy machine harms all alike."""
    turns = [[measure() for measure in measures] for _ in range(rounds)]
    return [median(column) for column in zip(*turns, strict=True)]
