"""POST /api/conversations/<id>/title: a conversation is named after its first exchange."""

from contextlib import contextmanager

import pytest

from app.bot import BotError
from tests.conftest import create_logged_in_client, create_other_client
from tests.helpers.bots import ScriptedBot
from tests.helpers.server import run_in_background, wait_until

FIRST_WORDS = "Which of these old maps of the coast shows the harbour best"  # 59 characters


class TitleBot(ScriptedBot):
    """A bot that also makes titles: it calls `make_title`."""

    def __init__(self, make_title):
        super().__init__("Hello")
        self.make_title = make_title
        self.title_histories = []

    def create_title(self, history):
        self.title_histories.append(list(history))
        return self.make_title()


def fail():
    raise BotError("no title")


@pytest.fixture
def chat(make_app):
    """A function that returns a bot with titles, its logged-in client, and a conversation with one exchange."""

    def start(make_title, **settings):
        bot = TitleBot(make_title)
        client = create_logged_in_client(make_app(bot, **settings), "ada")
        id = client.create_conversation("New chat")
        assert client.send_message(id, "Hello, bot").status_code == 201
        return bot, client, id

    return start


def request_title(client, id):
    """Return the status and the name or the error."""
    response = client.post(f"/api/conversations/{id}/title")
    return response.status_code, response.json.get("name", response.json.get("error"))


@contextmanager
def request_in_background(chat, gate):
    """Let a bot generate a title during the block; yield the bot, the client, the id and the result."""
    bot, client, id = chat(lambda: gate.wait() and "Maps")
    with run_in_background(lambda: request_title(create_other_client(client), id)) as [title]:
        wait_until(lambda: bot.title_histories)
        yield bot, client, id, title
        gate.set()


def get_name(client, id):
    return client.get(f"/api/conversations/{id}").json["name"]


@pytest.mark.parametrize(
    ("text", "title"),
    [
        *(("  Hello,\n\n\tbot! ", "Hello, bot!"), ("x" * 61, "x" * 59 + "…")),
        (f"{FIRST_WORDS} of all", f"{FIRST_WORDS}…"),
    ],
)
def test_title_without_a_bot_that_makes_titles_is_the_beginning_of_the_first_message(ada, text, title):
    id = ada.create_conversation("New chat")
    ada.send_message(id, text)
    ada.send_message(id, "Another message")
    response = ada.post(f"/api/conversations/{id}/title")
    assert (response.status_code, response.json) == (200, {"id": id, "name": title})
    assert get_name(ada, id) == title


@pytest.mark.parametrize(
    ("make_title", "title"),
    [
        *((lambda: "Old\0 maps\n", "Old maps"), (lambda: "maps " * 20, "maps " * 11 + "maps…")),
        *((lambda: " \u200b", "Hello, bot"), (fail, "Hello, bot"), (lambda: 1 / 0, "Hello, bot")),
    ],
)
def test_title_of_a_bot_is_one_short_line_or_the_first_message_if_it_has_none(chat, make_title, title):
    bot, client, id = chat(make_title)
    client.send_message(id, "Another message")
    assert request_title(client, id) == (200, title)
    assert get_name(client, id) == title
    assert bot.title_histories == [[("user", "Hello, bot"), ("bot", "Hello")]]


def test_title_of_an_empty_conversation_returns_409(ada, conversation_id):
    assert request_title(ada, conversation_id) == (409, "The conversation has no message")


def test_name_that_is_changed_while_a_title_is_generated_stays(chat, gate):
    with request_in_background(chat, gate) as (_, client, id, title):
        client.put(f"/api/conversations/{id}", json={"name": "Mine"})
    assert title.result() == (200, "Mine")
    assert get_name(client, id) == "Mine"


def test_second_request_while_a_title_is_generated_returns_409_and_does_not_call_the_bot(chat, gate):
    with request_in_background(chat, gate) as (bot, client, id, title):
        assert request_title(client, id) == (409, "A title of this conversation is being generated")
    assert title.result() == (200, "Maps")
    assert len(bot.title_histories) == 1
    assert request_title(client, id) == (200, "Maps")


def test_title_of_a_conversation_that_is_deleted_meanwhile_returns_404(chat, gate):
    with request_in_background(chat, gate) as (_, client, id, title):
        assert client.delete(f"/api/conversations/{id}").status_code == 204
    assert title.result() == (404, "Conversation not found")


def test_title_that_is_refused_by_a_limit_can_be_requested_later(chat):
    _, client, id = chat(lambda: "Maps", SEND_RATE_LIMIT="1 per hour")
    for status, error in (request_title(client, id), request_title(client, id)):
        assert (status, error[:31]) == (429, "You may send 1 message per hour")
    assert get_name(client, id) == "New chat"
