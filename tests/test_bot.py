"""The simulated bot, and the history that a bot is given."""

import re
from types import SimpleNamespace

import pytest

from app.bot import BotError, BotTruncated, create_bot, fit_history, simulated_bot
from tests.helpers.bots import collect

HISTORY = [
    *(("user", "Hello"), ("bot", "Hello!"), ("user", "I like trains"), ("bot", "Tell me more."), ("user", "Do you?"))
]


def get_reply(text):
    """Return the simulated bot's whole reply to a text."""
    return "".join(simulated_bot([("user", text)]))


@pytest.fixture
def sleeps(monkeypatch):
    """Replace the simulated bot's sleep; return the list of the seconds it was called with."""
    sleeps = []
    monkeypatch.setattr("app.bot.time", SimpleNamespace(sleep=sleeps.append))
    return sleeps


def test_bot_without_model_returns_same_reply_to_same_history():
    replies = [list(create_bot({"BOT_MODEL": ""})(HISTORY, user_id=id, conversation_id=id)) for id in (1, 2)]
    assert replies[0] == replies[1] == list(simulated_bot(HISTORY))


def test_reply_quotes_previous_message_of_user():
    assert "I like trains" in "".join(simulated_bot(HISTORY))
    assert "I like trains" not in get_reply("Do you?")


@pytest.mark.parametrize(
    ("text", "beginning"),
    [
        *(("hello there", "Hello!"), ("Good morning", "Hello!"), ("history matters", "You say: “history matters”")),
        ("What is a train?", "You ask: “What is a train?”"),
    ],
)
def test_reply_depends_on_kind_of_message(text, beginning):
    assert get_reply(text).startswith(beginning)


def test_reply_consists_of_words():
    chunks = list(simulated_bot([("user", "I like trains")]))
    assert len(chunks) > 3
    assert all(len(chunk.split()) == 1 for chunk in chunks)


def test_help_lists_every_command():
    commands = re.findall(r"^/(\w+)", get_reply("/help"), re.MULTILINE)
    assert sorted(commands) == ["drop", "fail", "help", "long", "slow", "truncate"]


def test_slow_sleeps_one_second_before_each_word(sleeps):
    assert [list(sleeps) for _ in simulated_bot([("user", "/slow 3")])] == [[1], [1, 1], [1, 1, 1]]


@pytest.mark.parametrize(
    ("command", "text", "error"),
    [("/fail", "", BotError), ("/drop 3", "1 2 3 ", BotError), ("/truncate 2", "1 2 ", BotTruncated)],
)
def test_failing_command_raises_after_its_words(command, text, error):
    collected, raised = collect(simulated_bot([("user", command)]))
    assert (collected, type(raised)) == (text, error)


@pytest.mark.parametrize(
    ("command", "count"),
    [
        *(("/long 1", 1), ("/long 9999", 9999), ("/long 7 hello", 7), ("/long 7\n\nhello\nyou", 7), ("/long\t7", 7)),
        *(("/long", 10), ("/long hello", 10), ("/long 99999", 10), ("/long -1", 10), (" \n/long   7\t", 7)),
        *(("/long hello 7", 10), ("/long ٣", 10)),
    ],
)
def test_long_returns_as_many_words_without_sleeping_and_ten_without_a_number(command, count, sleeps):
    assert len(get_reply(command).split()) == count
    assert sleeps == []


@pytest.mark.parametrize(
    "text",
    [
        *("explain /long 9000", "/LONG 9000", "/slow5", "/unknown", "/", "//slow 5", "  white space  ", "?", "\x01"),
        *("🚂 ünïcödé \u202etfel", "“”", "x" * 100_000, "word " * 20_000, "new\nlines\r\nand\u2028more"),
    ],
    ids=lambda text: ascii(text[:20]),
)
def test_any_other_text_returns_short_reply(text, sleeps):
    reply = get_reply(text)
    assert text.strip()[:79] in reply
    assert len(reply) < 200
    assert sleeps == []


U, B = "user", "bot"
NEW = (U, "new")


@pytest.mark.parametrize(
    ("history", "max_chars", "expected"),
    [
        ([NEW], 1, [NEW]),
        ([(U, "a"), (B, "b"), NEW], 5, [(U, "a"), (B, "b"), NEW]),
        ([(U, "a"), (B, "b"), NEW], 4, [NEW]),
        ([(U, "a"), (B, "b"), (U, "c"), (B, "d"), NEW], 6, [(U, "c"), (B, "d"), NEW]),
        ([(U, "a"), (B, "b"), (U, "long"), (B, "long"), NEW], 6, [NEW]),
        ([(B, "b"), NEW], 100, [NEW]),
        ([(B, "b"), (U, "a"), (B, "b"), NEW], 100, [(U, "a"), (B, "b"), NEW]),
        *(([(U, "a"), *empty, NEW], 100, [(U, "a\n\nnew")]) for empty in ([], [(B, "")])),
        ([(U, "a"), NEW], 5, [NEW]),
        ([(U, "a"), (B, "b"), (B, "c"), NEW], 100, [(U, "a"), (B, "b\n\nc"), NEW]),
        ([(U, ""), (B, "b"), (U, "a"), (B, "c"), NEW], 100, [(U, "a"), (B, "c"), NEW]),
    ],
    ids=repr,
)
def test_fit_history_returns_whole_exchanges_that_alternate(history, max_chars, expected):
    assert fit_history(history, max_chars) == expected


def test_fit_history_with_many_short_exchanges_keeps_the_latest():
    history = [(sender, f"{number:04}") for number in range(5000) for sender in (U, B)] + [NEW]
    assert fit_history(history, 800) == history[-199:]
