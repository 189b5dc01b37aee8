"""`python -m tests.benchmark.ticking` serves the program with a bot that yields ten chunks a second.

It does so for as many seconds as the user's message says.
"""

if __name__ == "__main__":
    from gevent import monkey

    monkey.patch_all()  # before anything else is imported

import time

from app import create_app
from app.server import Server

CHUNKS_PER_SECOND = 10
WORD = "token "


def tick(history, **kwargs):
    """Yield the chunks of a reply."""
    for _ in range(int(history[-1][1]) * CHUNKS_PER_SECOND):
        time.sleep(1 / CHUNKS_PER_SECOND)
        yield WORD


if __name__ == "__main__":
    Server(create_app(bot=tick)).run()
