"""The program with a bot that yields ten chunks a second, for as many seconds as the user's message says."""

import time

from app import create_app

CHUNKS_PER_SECOND = 10
WORD = "token "


def tick(history, **kwargs):
    """Yield the chunks of a reply."""
    for _ in range(int(history[-1][1]) * CHUNKS_PER_SECOND):
        time.sleep(1 / CHUNKS_PER_SECOND)
        yield WORD


app = create_app(bot=tick)
