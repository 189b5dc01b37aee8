"""`python -m tests.benchmark.lists` lengthens the lists without `limit` tenfold, again and again, until they break.

PostgreSQL is measured too if TEST_DATABASE_URL names a server where databases may be created.
"""

import argparse
import time
from contextlib import closing
from pathlib import Path

from tests.benchmark.__main__ import resident
from tests.benchmark.driving import DATABASES, Filler, note, project, table
from tests.helpers.server import HttpClient

CONVERSATION_MESSAGES = 100


def fill_messages(filler, first, last):
    """Give the first user messages first..last, in conversations of CONVERSATION_MESSAGES."""
    filler.conversations((last - first + 1) // CONVERSATION_MESSAGES, "1")
    filler.messages(first, last, f"(i - 1) / {CONVERSATION_MESSAGES} + 1")


def fill_users(filler, first, last):
    """Add users first..last, beside the one who is there already."""
    filler.users(first + 1, last + 1)


LISTS = {
    "messages in `/api/conversations`": ("/api/conversations", fill_messages),
    "users in `/api/users/status`": ("/api/users/status", fill_users),
}


def get(program, cookie, path):
    """Return the status of a response, its seconds, its megabytes, and by how many megabytes the workers grew."""
    with HttpClient(program.port) as client:
        client.cookie = cookie
        client.get("/api/current_user")
        pids = program.workers()
        for pid in pids:
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak of its memory begins anew
        before = [resident(pid, "VmHWM") for pid in pids]
        began = time.monotonic()
        response = client.get(path)
        seconds = time.monotonic() - began
        growth = max(resident(pid, "VmHWM") - was for pid, was in zip(pids, before, strict=True))
        return response.status, seconds, len(response.body) / 1e6, growth


def measure(database, largest):
    """Yield the rows for one database."""
    for what, (path, fill) in LISTS.items():
        with DATABASES[database]() as url:
            with project(url) as program:
                program.signup("reader").close()
            count, size = 0, 1000
            while size <= largest:
                note(f"{database}: {size:,} {what}")
                with closing(Filler(url)) as filler:
                    fill(filler, count + 1, size)
                    filler.analyze()
                count, size = size, size * 10
                with project(url) as program:
                    cookie = program.login("reader").cookie
                    status, *figures = get(program, cookie, path)
                yield f"{count:,} {what}", database, str(status), *figures
                if status != 200:
                    break


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark.lists", description=__doc__.splitlines()[0])
    parser.add_argument("--largest", type=int, default=1_000_000, help="the length at which to stop (%(default)s)")
    options = parser.parse_args()
    rows = [("", "database", "status", "s", "MB of JSON", "MB more in the worker")]
    for database in DATABASES:
        rows.extend(measure(database, options.largest))
    table(*rows)


if __name__ == "__main__":
    main()
