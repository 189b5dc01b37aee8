"""`python -m tests.benchmark.scale` fills a database as far as asked and measures it beside one of 1,000 messages.

With TEST_DATABASE_URL it does so on PostgreSQL too. Both databases have the same reader, whose thousand messages lie
scattered over all others. Ten million messages take a few minutes and 2 GB of disk for each database.
"""

import argparse
import sys
import time
from contextlib import ExitStack, closing
from statistics import median

from tests.benchmark.driving import DATABASES, Filler, alternate, milliseconds, note, number, project, table

CONVERSATIONS, MESSAGES_EACH = 50, 20  # the reader's
PER_CONVERSATION, PER_USER = 50, 1000  # everybody else's messages
LIST = "/api/conversations"


class Side:
    """The program, served on a database with so many messages."""

    def __init__(self, stack, url, messages):
        self.program = stack.enter_context(project(url))
        self.program.signup("reader")
        others = messages - CONVERSATIONS * MESSAGES_EACH
        users, conversations = others // PER_USER, others // PER_CONVERSATION
        began = time.monotonic()
        with closing(Filler(url)) as filler:
            filler.users(2, users + 1)
            filler.conversations(CONVERSATIONS, "1")
            filler.conversations(conversations, f"(i - 1) % {users or 1} + 2")
            for part in range(MESSAGES_EACH):
                first, last = (others * step // MESSAGES_EACH + 1 for step in (part, part + 1))
                # Successive messages belong to different conversations, as if all users were active at once.
                filler.messages(first, last - 1, f"i * 7919 % {conversations or 1} + {CONVERSATIONS + 1}")
                filler.messages(1, CONVERSATIONS, "i")
                note(f"{last - 1:,} messages after {time.monotonic() - began:.0f} s")
            filler.analyze()
            self.size = filler.size()
        self.users = users + 1
        self.reader = self.program.login("reader")

    def list(self):
        """List all conversations on a page."""
        return milliseconds(self.reader, "GET", f"{LIST}?limit=100")

    def list_recent(self):
        """List all conversations by last activity, without their messages."""
        return milliseconds(self.reader, "GET", f"{LIST}?order=recent&limit=100&messages=0")

    def list_unchanged(self):
        """Ask for a page that has not changed, which is answered by 304."""
        etag = self.reader.get(f"{LIST}?limit=100").headers["ETag"]
        return milliseconds(self.reader, "GET", f"{LIST}?limit=100", If_None_Match=etag)

    def search(self):
        """Search the reader's messages for a word that none of them has."""
        return milliseconds(self.reader, "GET", "/api/messages?q=engine")

    def search_conversations(self):
        """Search the conversations for such a word."""
        return milliseconds(self.reader, "GET", f"{LIST}?q=engine&limit=100")

    def send(self):
        return milliseconds(self.reader, "POST", f"{LIST}/7/messages", {"text": "Hello there, what do you make of it?"})

    def delete(self):
        """Delete a conversation of twenty messages."""
        id = self.reader.create_conversation()
        for _ in range(MESSAGES_EACH // 2):
            self.reader.send_message(id)
        return milliseconds(self.reader, "DELETE", f"{LIST}/{id}")

    def get_current_user(self):
        return milliseconds(self.reader, "GET", "/api/current_user")

    def status(self):
        return milliseconds(self.reader, "GET", "/api/users/status")


def measure(name, messages, rounds):
    """Yield the rows for one database."""
    with ExitStack() as stack:
        few, many = (Side(stack, stack.enter_context(DATABASES[name]()), count) for count in (1000, messages))
        for what, func in (
            ("list 1,000 messages, on a page, ms", Side.list),
            ("list 50 conversations by last activity, on a page, ms", Side.list_recent),
            ("list 1,000 messages, unchanged (304), ms", Side.list_unchanged),
            ("search the messages, nothing found, ms", Side.search),
            ("search the conversations, nothing found, ms", Side.search_conversations),
            ("send a message, ms", Side.send),
            ("delete a conversation of 20 messages, ms", Side.delete),
            ("who am I, ms", Side.get_current_user),
            (f"status of {many.users:,} users, against {few.users:,}, ms", Side.status),
        ):

            def repeat(side, func=func):
                return median(func(side) for _ in range(5))

            figures = alternate(rounds, lambda: repeat(many), lambda: repeat(few))
            yield what, name, *figures, f"{figures[0] / figures[1]:.2f}"
        yield "size of the database, MB", name, many.size / 1e6, few.size / 1e6, number(many.size / few.size)


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark.scale", description=__doc__.splitlines()[0])
    parser.add_argument("--messages", type=int, default=10_000_000, help="how many to fill in (%(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=11, help="how often each is measured; medians count (%(default)s)"
    )
    options = parser.parse_args()
    rows = [("", "database", f"{options.messages:,} messages", "1,000", "ratio")]
    for name in DATABASES:
        for row in measure(name, options.messages, options.rounds):
            note(row)
            rows.append(row)
    sys.stdout.write(f"One client, 2 workers; medians of {options.rounds} rounds of five, taken in turn\n\n")
    table(*rows)


main()
