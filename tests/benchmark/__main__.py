"""`python -m tests.benchmark` measures the program beside the textbook version, and prints a Markdown table.

It needs wrk. PostgreSQL is measured too if TEST_DATABASE_URL names a server where databases may be created.
Both send into as many conversations as wrk has connections, in turn.
"""

import argparse
import sqlite3
import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path
from statistics import median

import psycopg

from tests.benchmark.driving import (
    CONNECTIONS,
    DATABASES,
    TIME,
    Filler,
    alternate,
    gunicorn,
    milliseconds,
    note,
    project,
    table,
    textbook,
    wrk,
)

CONVERSATIONS, MESSAGES_EACH, USERS = 50, 20, 200
SENDERS = (1, CONNECTIONS, 64)  # connections that send at once
LARGE = 100  # as many times the conversations of the ordinary reader
LIST, ME, STATUS, TEST = "/api/conversations", "/api/current_user", "/api/users/status", "/api/test"
LIMITED_LIST = f"{LIST}?limit=100"  # all of them, too


class Side:
    """The program or the textbook version, served on a database of its own, with people in it."""

    def __init__(self, stack, url, serve):
        self.url = url
        self.program = stack.enter_context(serve(url))
        self.reader = self.program.signup("reader")
        self.sender = self.program.signup("sender")
        with closing(Filler(url, serve is textbook)) as filler:
            filler.conversations(CONVERSATIONS, "1")
            filler.messages(1, CONVERSATIONS * MESSAGES_EACH, f"(i - 1) / {MESSAGES_EACH} + 1")
            filler.conversations(max(SENDERS), "2")
            filler.users(3, USERS)
            filler.analyze()
        first = CONVERSATIONS + 1
        self.sends = [f"{LIST}/{id}/messages" for id in range(first, first + max(SENDERS))]

    def add_large(self):
        """Add a user with very much to list."""
        self.program.signup("large")
        first = CONVERSATIONS + max(SENDERS) + 1
        with closing(Filler(self.url)) as filler:
            filler.conversations(CONVERSATIONS * LARGE, str(USERS + 1))
            filler.messages(1, CONVERSATIONS * MESSAGES_EACH * LARGE, f"(i - 1) / {MESSAGES_EACH} + {first}")
            filler.analyze()


def measure(name, rounds, seconds):
    """Yield the rows for one database: what, where, the program, the other, the ratio."""
    with ExitStack() as stack:
        ours, theirs = (Side(stack, stack.enter_context(DATABASES[name]()), serve) for serve in (project, textbook))
        compare(ours.reader, theirs.reader)

        def side_by_side(what, drive):
            note(f"{name}: {what}")
            rates = alternate(rounds, lambda: drive(ours), lambda: drive(theirs))
            return f"{what}, 1/s", name, *rates, f"{rates[0] / rates[1]:.1f}"

        def get(path):
            return lambda side: wrk(side.program.port, seconds, [path], side.reader.cookie)

        def send(connections):
            body = {"text": "Hello there, what do you make of this?"}
            return lambda side: wrk(
                side.program.port, seconds, side.sends[:connections], side.sender.cookie, body, connections=connections
            )

        def revalidate(side):
            etag = side.reader.get(LIST).headers.get("ETag")  # the textbook version has none, and lists again
            return wrk(side.program.port, seconds, [LIST], side.reader.cookie, etag=etag)

        yield side_by_side("list 1,000 messages", get(LIST))
        yield side_by_side("list 1,000 messages, on a page", get(LIMITED_LIST))
        yield side_by_side("list 1,000 messages, unchanged (304)", revalidate)
        for connections in SENDERS:
            yield side_by_side(f"send a message, {connections} at once", send(connections))
        yield side_by_side("who am I", get(ME))
        yield side_by_side(f"status of {USERS} users", get(STATUS))
        yield side_by_side("`/api/test`", get(TEST))
        memory = [side.program.memory() / 1e6 for side in (ours, theirs)]
        yield "memory of master and workers, MB", name, *memory, f"{memory[0] / memory[1]:.1f}"
        theirs.program.stop()

        ours.add_large()
        ours.program.stop()
        yield from large(name, ours.url, rounds)


def compare(ours, theirs):
    """Make sure that the two do equal work."""
    conversations, other_conversations = (reader.get(LIST).json for reader in (ours, theirs))
    assert conversations == other_conversations, "the two lists differ"
    assert [len(conversation["messages"]) for conversation in conversations] == [MESSAGES_EACH] * CONVERSATIONS
    assert conversations[0]["messages"][0]["created_at"] == TIME
    assert ours.get(ME).json == theirs.get(ME).json
    users, other_users = ([sorted(user) for user in reader.get(STATUS).json["users"]] for reader in (ours, theirs))
    assert users == other_users
    assert len(users) == USERS


def large(name, url, rounds):
    """Yield how long a start takes, and what a hundred times the messages cost in time and memory."""
    note(f"{name}: start, and list {CONVERSATIONS * MESSAGES_EACH * LARGE:,} messages")
    starts, growths = [], []
    for _ in range(rounds):
        with project(url) as program:
            starts.append(program.start)
            with program.login("large") as reader:
                # The first such answer of a worker: its memory at the peak over what it had before.
                pids = program.workers()
                before = [resident(pid, "VmRSS") for pid in pids]
                assert len(reader.get(LIST).json) == CONVERSATIONS * LARGE
                growths.append(max(resident(pid, "VmHWM") - was for pid, was in zip(pids, before, strict=True)))
    yield "start on a migrated database, s", name, median(starts)
    yield "peak of a worker that lists 100,000 messages, MB more", name, median(growths)

    with project(url) as program, program.login("large") as much, program.login("reader") as little:

        def listing(reader):
            return milliseconds(reader, "GET", LIST)

        slow, quick = alternate(rounds * 2, lambda: listing(much), lambda: median(listing(little) for _ in range(9)))
        yield "list 100,000 messages against 1,000, ms", name, slow, quick, f"{slow / quick:.0f}"


def resident(pid, field):
    """Return a process's memory, now (VmRSS) or at its peak (VmHWM), in MB."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status[field].removesuffix("kB")) / 1000


def against_bare_flask(rounds, seconds):
    """Yield the rows that set `/api/test` beside the least that Flask can do on the same server."""
    note("/api/test beside bare Flask")
    with DATABASES["SQLite"]() as url, project(url) as ours, bare("--access-logfile=-") as logged, bare() as silent:
        programs = ours, logged, silent
        rates = alternate(rounds, *(lambda port=program.port: wrk(port, seconds, [TEST]) for program in programs))
    yield "`/api/test` against bare Flask with an access log, 1/s", "-", *rates[:2], f"{rates[0] / rates[1]:.2f}"
    yield "`/api/test` against bare Flask without, 1/s", "-", *rates[::2], f"{rates[0] / rates[2]:.2f}"


def bare(*options):
    """Serve bare Flask as the program is served."""
    return gunicorn("tests.benchmark.bare:app", "--worker-class=gevent", *options)


def connect(url):
    """Return a connection of the driver alone to a database, set up as the program's."""
    if not url.startswith("sqlite"):
        return psycopg.connect(url.replace("postgres://", "postgresql://"), autocommit=True)
    connection = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    return connection


def ceiling(name, rounds, seconds):
    """Yield how many pairs of messages a database can take from one connection, in a transaction each."""
    note(f"what {name} can take")
    with DATABASES[name]() as url, closing(connect(url)) as connection:
        connection.execute("CREATE TABLE message (sender TEXT, text TEXT)")

        def pairs():
            began, count = time.monotonic(), 0
            while time.monotonic() < began + seconds:
                connection.execute("BEGIN IMMEDIATE" if name == "SQLite" else "BEGIN")
                for sender in ("user", "bot"):
                    connection.execute(f"INSERT INTO message (sender, text) VALUES ('{sender}', 'Hello there')")
                connection.execute("COMMIT")
                count += 1
            return count / seconds

        yield "bare BEGIN, INSERT twice, COMMIT, 1/s", name, *alternate(rounds, pairs)


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured; medians count (%(default)s)")
    parser.add_argument("--seconds", type=int, default=3, help="how long one round of one takes (%(default)s)")
    options = parser.parse_args()
    rows = [("", "database", "program", "other", "ratio")]
    for name in DATABASES:
        rows.extend(measure(name, options.rounds, options.seconds))
    rows.extend(against_bare_flask(options.rounds, options.seconds))
    for name in DATABASES:
        rows.extend(ceiling(name, options.rounds, options.seconds))
    sys.stdout.write(f"{CONNECTIONS} connections, 2 workers; medians of {options.rounds} rounds, taken in turn\n\n")
    table(*((*row, *[""] * (5 - len(row))) for row in rows))


if __name__ == "__main__":
    main()
