"""`python -m tests.benchmark.replies` measures what replies in progress cost, a tenth of them with a follower.

The program has the bot of tests/benchmark/ticking.py, so that no model server is measured with it.
"""

import argparse
import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from statistics import median

from tests.benchmark.driving import DATABASES, Filler, Program, milliseconds, note, table
from tests.helpers.server import TIMEOUT, HttpClient

TEXT_OF_A_SECOND = "token " * 10
FOLLOWED = 10  # one reply in so many
CORES = 2
FOLLOWERS_START = 3  # seconds until all follow
FIGURES = (
    f"CPU of the workers, % of {CORES} cores",
    "written to the database, MB/s",
    "memory of master and workers, MB",
    "who am I, ms",
)


@contextmanager
def follow(port, cookie, paths, text, timeout):
    """Follow replies in a process of its own; at the end of the block, make sure that each had the whole text."""
    with multiprocessing.Pool(1) as pool:
        result = pool.apply_async(count_whole_replies, (port, cookie, paths, text))
        yield
        assert result.get(timeout) == len(paths), "a follower missed a part of its reply"


def count_whole_replies(port, cookie, paths, text):
    """Follow replies to their ends, and return how many of them had the whole text."""

    def follow_reply(path):
        with HttpClient(port) as client:
            client.cookie = cookie
            *_, (name, exchange, _) = client.stream("GET", path)
            return name == "done" and exchange[1]["text"] == text

    with ThreadPoolExecutor(len(paths)) as executor:
        return sum(executor.map(follow_reply, paths))


class Meter:
    """What the program uses and writes."""

    def __init__(self, program, filler):
        self.program, self.filler = program, filler

    def read(self):
        """Return seconds of CPU of the workers, and bytes written to the database."""
        pids = self.program.workers()
        if self.filler.sqlite:
            written = sum(
                int(Path(f"/proc/{pid}/io").read_text().split("\nwrite_bytes: ")[1].split()[0]) for pid in pids
            )
        else:
            with self.filler.engine.connect() as connection:
                written = connection.exec_driver_sql("SELECT pg_current_wal_lsn() - '0/0'").scalar()
        return self.program.cpu_seconds(), float(written)

    def measure(self, client, seconds):
        """Return percent of CORES, megabytes written a second, of memory, and the milliseconds of who am I."""
        start, before = time.monotonic(), self.read()
        delays = []
        while (elapsed := time.monotonic() - start) < seconds:
            delays.append(milliseconds(client, "GET", "/api/current_user"))
            time.sleep(0.1)
        cpu, written = (now - then for now, then in zip(self.read(), before, strict=True))
        return 100 * cpu / elapsed / CORES, written / elapsed / 1e6, self.program.memory() / 1e6, median(delays)


def start_replies(client, count, text):
    """Send a message into each conversation without waiting; return the paths of every tenth reply's events."""
    paths = []
    for id in range(1, count + 1):
        response = client.send_message(id, text, Prefer="respond-async")
        assert response.status == 202, response.body
        paths.append(f"/api/conversations/{id}/messages/{response.json[1]['id']}/events")
    return paths[::FOLLOWED]


def measure(name, count, seconds):
    """Yield the rows for one database."""
    settings = {"MAX_CONCURRENT_REPLIES": str(count)}
    duration = seconds + 10 + count // 20  # of a reply: all are still in progress when the last one was measured
    with ExitStack() as stack:
        url = stack.enter_context(DATABASES[name]())
        program = stack.enter_context(Program("-m", "tests.benchmark.ticking", DATABASE_URL=url, **settings))
        client = program.signup("reader")
        filler = stack.enter_context(closing(Filler(url)))
        filler.conversations(count, "1")
        meter = Meter(program, filler)
        idle = meter.measure(client, seconds)
        note(f"{name}: starting {count:,} replies")
        paths = start_replies(client, count, str(duration))
        text = TEXT_OF_A_SECOND * duration
        with follow(program.port, client.cookie, paths, text, duration + TIMEOUT):
            note(f"{name}: measuring")
            time.sleep(FOLLOWERS_START)
            busy = meter.measure(client, seconds)
            with filler.engine.connect() as connection:
                query = "SELECT count(*) FROM message WHERE status = 'in_progress'"
                assert connection.exec_driver_sql(query).scalar() == count, "some replies are over already"
    for what, *values in zip(FIGURES, busy, idle, strict=True):
        yield what, name, *values


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark.replies", description=__doc__.splitlines()[0])
    parser.add_argument("--replies", type=int, default=1000, help="how many are in progress (%(default)s)")
    parser.add_argument("--seconds", type=int, default=20, help="how long it is measured (%(default)s)")
    options = parser.parse_args()
    rows = [("", "database", f"{options.replies:,} replies", "none")]
    for name in DATABASES:
        rows.extend(measure(name, options.replies, options.seconds))
    table(*rows)


if __name__ == "__main__":
    main()
