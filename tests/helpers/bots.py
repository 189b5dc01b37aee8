"""Bots for tests, the ways to ask for their replies, and what a stream tells of these."""

import threading

import pytest

from app.bot import BotError
from tests.helpers.server import TIMEOUT, parse_events, wait_until

STREAM = {"Accept": "text/event-stream"}
ASYNC = {"Prefer": "respond-async"}
KEY = {"Idempotency-Key": "key"}
WAYS = {"waiting": {}, "stream": STREAM, "async": ASYNC}
each_way = pytest.mark.parametrize("headers", WAYS.values(), ids=WAYS)
waiting_or_streaming = pytest.mark.parametrize("headers", [{}, STREAM], ids=["waiting", "stream"])


class Gate(threading.Event):
    """An event for which a bot waits in the middle of a reply, but not forever."""

    def wait(self, timeout=TIMEOUT):
        return super().wait(timeout)


class ScriptedBot:
    """A bot whose replies consist of steps: chunks to yield, exceptions to raise, functions to call.

    `scripts` has other steps for certain messages, `histories` the history of each call, and `closed` the number of
    replies that were closed before their end.
    """

    def __init__(self, *steps):
        self.steps = steps
        self.scripts = {}
        self.histories = []
        self.closed = 0

    @property
    def texts(self):
        """The user's new message of each call."""
        return [history[-1][1] for history in self.histories]

    def __call__(self, history, user_id, conversation_id):
        self.histories.append([tuple(message) for message in history])
        return self.reply(self.scripts.get(history[-1][1], self.steps))

    def reply(self, steps):
        """Yield the chunks of a reply."""
        try:
            for step in steps:
                if isinstance(step, BaseException):
                    raise step
                if callable(step):
                    step()
                else:
                    yield step
        except GeneratorExit:
            self.closed += 1
            raise


def start_reply(client, conversation_id, text="Hello"):
    """Send a message without waiting for the reply; return the two messages."""
    response = client.send_message(conversation_id, text, headers=ASYNC)
    assert response.status_code == 202
    return response.json


def wait_for_text(client, conversation_id, message_id, text):
    """Wait until a message has a text."""
    wait_until(lambda: client.get_message(conversation_id, message_id).json["text"] == text)


def wait_for_end(client, conversation_id):
    """Return the current messages of a conversation as soon as none is in progress."""

    def find_messages():
        messages = client.list_messages(conversation_id)
        return messages if all(message.get("status") != "in_progress" for message in messages) else None

    return wait_until(find_messages)


def read_events(response):
    """Return the server-sent events of a test client's response as (event, data, id), without comments."""
    assert response.mimetype == "text/event-stream", (response.status_code, response.text)
    return list(parse_events(line + b"\n" for line in response.data.split(b"\n")))


def collect(chunks):
    """Return the text of a reply, and the BotError that it ended with or None."""
    text = ""
    try:
        for chunk in chunks:
            text += chunk
    except BotError as error:
        return text, error
    return text, None


def join_deltas(events):
    """Return the text that the deltas of a stream have together."""
    return "".join(data["text"] for name, data, _ in events if name == "delta")
