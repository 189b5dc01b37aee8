"""The simulated bot, and the history that a bot is given."""

import re
from types import SimpleNamespace

import pytest

from app.bot import BotError, BotTruncated, create_bot, fit_history, simulated_bot

HISTORY = [
    ("user", "Hello"),
    ("bot", "Hello!"),
    ("user", "I like trains"),
    ("bot", "Tell me more."),
    ("user", "Do you?"),
]


def get_reply(text):
    """Return the simulated bot's whole reply to a text."""
    return "".join(simulated_bot([("user", text)]))


def collect(chunks):
    """Return the chunks of a reply, and the exception that it ended with or None."""
    collected = []
    try:
        for chunk in chunks:
            collected.append(chunk)
    except BotError as error:
        return collected, error
    return collected, None


@pytest.fixture
def sleeps(monkeypatch):
    """Replace the simulated bot's sleep; return the list of the seconds it was called with."""
    sleeps = []
    monkeypatch.setattr("app.bot.time", SimpleNamespace(sleep=sleeps.append))
    return sleeps


def test_create_bot_without_model_returns_simulated_bot():
    bot = create_bot({"BOT_MODEL": ""})
    assert "".join(bot(HISTORY, user_id=1, conversation_id=2)) == "".join(simulated_bot(HISTORY))


@pytest.mark.parametrize("length", [1, 3, 5])
def test_same_history_returns_same_reply(length):
    assert list(simulated_bot(HISTORY[:length])) == list(simulated_bot(HISTORY[:length]))


def test_reply_quotes_previous_message_of_user():
    assert "I like trains" in "".join(simulated_bot(HISTORY))
    assert "I like trains" not in get_reply("Do you?")


@pytest.mark.parametrize(
    ("text", "beginning"),
    [
        ("hello there", "Hello!"),
        ("Good morning", "Hello!"),
        ("What is a train?", "You ask: “What is a train?”"),
        ("history matters", "You say: “history matters”"),
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


@pytest.mark.parametrize("count", [1, 500, 9999])
def test_long_returns_as_many_words_without_sleeping(count, sleeps):
    assert len(get_reply(f"/long {count}").split()) == count
    assert sleeps == []


@pytest.mark.parametrize(
    ("command", "chunks", "error"),
    [
        ("/fail", [], BotError),
        ("/drop 3", ["1 ", "2 ", "3 "], BotError),
        ("/truncate 2", ["1 ", "2 "], BotTruncated),
    ],
)
def test_failing_command_raises_after_its_words(command, chunks, error):
    collected, raised = collect(simulated_bot([("user", command)]))
    assert (collected, type(raised)) == (chunks, error)


@pytest.mark.parametrize(
    ("command", "count"),
    [
        *(("/long", 10), (" \n/long   7\t", 7), ("/long 7 hello", 7), ("/long 7\n\nhello\nyou", 7), ("/long\t7", 7)),
        *(("/long hello", 10), ("/long hello 7", 10), ("/long 99999", 10), ("/long -1", 10), ("/long ٣", 10)),
    ],
)
def test_command_allows_missing_number_white_space_and_more_text(command, count):
    assert len(get_reply(command).split()) == count


@pytest.mark.parametrize(
    "text",
    [
        *("explain /long 9000", "/LONG 9000"),
        *("/slow5", "/unknown", "/", "//slow 5", "  white space  ", "🚂 ünïcödé \u202etfel", "?", "\x01"),
        *("“”", "x" * 100_000, "word " * 20_000, "new\nlines\r\nand\u2028more"),
    ],
    ids=lambda text: ascii(text[:20]),
)
def test_any_other_text_returns_short_reply(text, sleeps):
    reply = get_reply(text)
    assert text.strip()[:79] in reply
    assert len(reply) < 200
    assert sleeps == []


U, B = "user", "bot"


@pytest.mark.parametrize(
    ("history", "max_chars", "expected"),
    [
        ([(U, "new")], 100, [(U, "new")]),
        ([(U, "new")], 1, [(U, "new")]),
        ([(U, "a"), (B, "b"), (U, "new")], 5, [(U, "a"), (B, "b"), (U, "new")]),
        ([(U, "a"), (B, "b"), (U, "new")], 4, [(U, "new")]),
        ([(U, "a"), (B, "b"), (U, "c"), (B, "d"), (U, "new")], 6, [(U, "c"), (B, "d"), (U, "new")]),
        ([(U, "a"), (B, "b"), (U, "long"), (B, "long"), (U, "new")], 6, [(U, "new")]),
        ([(B, "b"), (U, "new")], 100, [(U, "new")]),
        ([(B, "b"), (U, "a"), (B, "b"), (U, "new")], 100, [(U, "a"), (B, "b"), (U, "new")]),
        ([(U, "a"), (U, "new")], 100, [(U, "a\n\nnew")]),
        ([(U, "a"), (B, ""), (U, "new")], 100, [(U, "a\n\nnew")]),
        ([(U, "a"), (U, "new")], 5, [(U, "new")]),
        ([(U, "a"), (B, "b"), (B, "c"), (U, "new")], 100, [(U, "a"), (B, "b\n\nc"), (U, "new")]),
        ([(U, ""), (B, "b"), (U, "a"), (B, "c"), (U, "new")], 100, [(U, "a"), (B, "c"), (U, "new")]),
    ],
    ids=repr,
)
def test_fit_history_returns_whole_exchanges_that_alternate(history, max_chars, expected):
    assert fit_history(history, max_chars) == expected


def test_fit_history_with_many_short_exchanges_keeps_the_latest():
    history = [(sender, f"{number:04}") for number in range(5000) for sender in (U, B)] + [(U, "new")]
    fitted = fit_history(history, 800)
    assert sum(len(text) for _, text in fitted) <= 800
    assert fitted == history[-len(fitted) :]
    assert len(fitted) == 199
