"""`python -m tests.benchmark.pooler` measures what a request costs PostgreSQL: directly and through PgBouncer.

It runs PostgreSQL servers of its own, one of them with a synchronous replica, and needs pgbouncer and wrk.
"""

import argparse
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from statistics import median

from tests.benchmark.driving import CLOCK_TICKS, CONNECTIONS, Filler, note, number, project, table, wrk
from tests.helpers.postgresql import PostgreSQLServer, run_pgbouncer

CONVERSATIONS, MESSAGES_EACH, USERS = 50, 20, 200
REPLIES = 15  # that grow at the same time
LIST = "/api/conversations"
POOL_SIZE = 4
CASES = ("direct", "PgBouncer", "replica", "PgBouncer and replica")


@contextmanager
def run_postgresql(**options):
    """Create a PostgreSQL server for the time of the block; yield it, not started yet."""
    folder = Path(tempfile.mkdtemp(prefix="chat-postgresql-"))
    try:
        server = PostgreSQLServer(folder, **options)
        yield server
        server.stop("immediate")
    finally:
        shutil.rmtree(folder)


class Case:
    """The program on a PostgreSQL server of its own, perhaps with a synchronous replica, perhaps through PgBouncer."""

    def __init__(self, stack, name):
        self.postgresql = stack.enter_context(run_postgresql())
        self.postgresql.start(**({"synchronous_standby_names": "'*'"} if "replica" in name else {}))
        if "replica" in name:
            stack.enter_context(run_postgresql(primary=self.postgresql)).start()
        url, self.pooler = self.postgresql.url, None
        if "PgBouncer" in name:
            url, self.pooler = stack.enter_context(run_pgbouncer(self.postgresql, POOL_SIZE))
            url += "?prepare_threshold=none"
        self.program = stack.enter_context(project(url))
        self.reader = self.program.signup("reader")
        with closing(Filler(self.postgresql.url)) as filler:
            filler.conversations(CONVERSATIONS, "1")
            filler.messages(1, CONVERSATIONS * MESSAGES_EACH, f"(i - 1) / {MESSAGES_EACH} + 1")
            filler.users(2, USERS)
            filler.analyze()

    def drive(self, seconds, paths, body=None):
        """Return requests a second, and the milliseconds of CPU of PostgreSQL and of PgBouncer for each."""
        before = self.measure_cpu()
        rate = wrk(self.program.port, seconds, paths, self.reader.cookie, body)
        return rate, *self.count_cpu_since(before, rate * seconds)

    def grow(self, seconds):
        """Return how many replies grow by a word a second, and the milliseconds of CPU for each of these words."""
        for id in range(1, REPLIES + 1):
            response = self.reader.send_message(id, f"/slow {seconds + 3}", Prefer="respond-async")
            assert response.status == 202, response.body
        time.sleep(1)
        before = self.measure_cpu()
        time.sleep(seconds)
        spent = self.count_cpu_since(before, REPLIES * seconds)
        time.sleep(4)  # until the replies are over
        return REPLIES, *spent

    def count_cpu_since(self, before, count):
        """Return the milliseconds of CPU that each of so many requests took since measure_cpu() was called."""
        return [1000 * (now - then) / count for now, then in zip(self.measure_cpu(), before, strict=True)]

    def measure_cpu(self):
        """Return the seconds of CPU that PostgreSQL and PgBouncer have taken."""
        main, *children = self.postgresql.list_processes()
        # What the children that have ended took is counted with the main process.
        ticks = sum(read_ticks(main)) + sum(sum(read_ticks(pid)[:2]) for pid in children)
        return ticks / CLOCK_TICKS, sum(read_ticks(self.pooler)) / CLOCK_TICKS if self.pooler else 0


def read_ticks(pid):
    """Return the CPU time of a process, as user and system, and those of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return [int(field) for field in fields[11:15]]


def measure(rounds, seconds):
    """Yield the rows."""
    sends = [f"{LIST}/{id}/messages" for id in range(1, CONNECTIONS + 1)]
    with ExitStack() as stack:
        cases = [Case(stack, name) for name in CASES]
        for what, func, *request in (
            ("who am I", Case.drive, ["/api/current_user"]),
            ("status of 200 users", Case.drive, ["/api/users/status"]),
            ("the newest 50 messages", Case.drive, [f"{LIST}/{CONVERSATIONS}/messages"]),
            ("send a message", Case.drive, sends, {"text": "Hello there, what do you make of it?"}),
            ("a second of a growing reply", Case.grow),
        ):
            note(what)
            turns = [[func(case, seconds, *request) for case in cases] for _ in range(rounds)]
            for name, runs in zip(CASES, zip(*turns, strict=True), strict=True):
                rate, database, pooler = (median(column) for column in zip(*runs, strict=True))
                yield what, name, rate, f"{database:.2f}", f"{pooler:.2f}" if pooler else "", number(1000 / database)


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark.pooler", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured; medians count (%(default)s)")
    parser.add_argument("--seconds", type=int, default=5, help="how long one round of one takes (%(default)s)")
    options = parser.parse_args()
    head = ("", "PostgreSQL", "1/s", "its CPU, ms", "PgBouncer's CPU, ms", "1/s on one core of PostgreSQL")
    rows = [head, *measure(options.rounds, options.seconds)]
    sys.stdout.write(f"{CONNECTIONS} connections, 2 workers; medians of {options.rounds} rounds, taken in turn\n\n")
    table(*rows)


main()
