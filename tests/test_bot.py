"""The bot by itself: the simulated one, and one that asks a model, whatever that does."""

import re
import subprocess
import sys
import threading
from itertools import repeat
from types import SimpleNamespace

import openai
import pytest

from app.bot import REPLY_LENGTH, BotError, BotTimeout, openai_bot, simulated_bot, with_pauses
from tests.model_server import ModelServer, cut, cut_in_a_chunk, data, end, running, stall
from tests.serving import PATIENCE, ROOT, free_port, timed

TALK = [("user", "Hello"), ("bot", "Hello!"), ("user", "I like trains"), ("bot", "Tell me more."), ("user", "Do you?")]


def reply_to(text):
    return "".join(simulated_bot([("user", text)]))


def listen(pieces):
    """Return all that a bot says, and the error that it breaks off with, or None."""
    said = []
    try:
        for piece in pieces:
            said.append(piece)
    except BotError as error:
        return said, error
    return said, None


@pytest.fixture
def naps(monkeypatch):
    """The seconds that the bot slept, nap by nap; in truth it does not."""
    naps = []
    monkeypatch.setattr("app.bot.time", SimpleNamespace(sleep=naps.append))
    return naps


@pytest.mark.parametrize("length", [1, 3, 5])
def test_the_same_history_gets_the_same_reply(length):
    assert list(simulated_bot(TALK[:length])) == list(simulated_bot(TALK[:length]))


def test_the_reply_depends_on_what_was_said_before():
    assert "I like trains" in "".join(simulated_bot(TALK))
    assert "I like trains" not in reply_to("Do you?")


def test_small_talk_fits_what_was_said():
    assert reply_to("hello there").startswith("Hello!")
    assert reply_to("Good morning").startswith("Hello!")
    assert reply_to("What is a train?").startswith("You ask: “What is a train?”")
    assert reply_to("history matters").startswith("You say: “history matters”")


def test_a_reply_comes_in_pieces_of_a_word():
    pieces = list(simulated_bot([("user", "I like trains")]))
    assert len(pieces) > 3
    assert all(len(piece.split()) == 1 for piece in pieces)


def test_help_lists_every_command():
    listed = re.findall(r"^/(\w+)", reply_to("/help"), re.MULTILINE)
    assert sorted(listed) == ["drop", "fail", "help", "long", "slow"]


def test_slow_takes_as_many_seconds_piece_by_piece(naps):
    slept_before = [list(naps) for _ in simulated_bot([("user", "/slow 3")])]
    assert slept_before == [[1], [1, 1], [1, 1, 1]]


def test_long_is_as_many_words(naps):
    for number in (1, 500, 9999):
        assert len(reply_to(f"/long {number}").split()) == number
    assert naps == []


def test_fail_fails_before_the_first_piece():
    said, error = listen(simulated_bot([("user", "/fail")]))
    assert (said, type(error)) == ([], BotError)


def test_drop_breaks_off_after_as_many_words():
    said, error = listen(simulated_bot([("user", "/drop 3")]))
    assert (said, type(error)) == (["1 ", "2 ", "3 "], BotError)


def test_a_command_without_its_number_takes_ten(naps):
    assert len(reply_to("/long").split()) == 10
    assert reply_to("/slow")
    assert naps == [1] * 10


def test_blanks_around_a_command_do_not_matter():
    assert len(reply_to(" \n/long   7\t").split()) == 7


@pytest.mark.parametrize(
    "text",
    [
        *(
            "tell me of /long 9000 words",
            "/long 9000 please",
            "/long 99999",
            "/long -1",
            "/long x",
            "/long ٣",
            "/LONG 9000",
        ),
        *(
            "/slow x",
            "/slow5",
            "/unknown",
            "/",
            "//slow 5",
            "  blanks around  ",
            "🚂 ünïcödé \u202etfel",
            "?",
            "\x01",
            "“”",
        ),
        *("x" * 100_000, "word " * 20_000, "new\nlines\r\nand\u2028more"),
    ],
    ids=lambda text: ascii(text[:20]),
)
def test_any_other_text_gets_a_short_answer(text, naps):
    reply = reply_to(text)
    assert reply == reply_to(text)
    assert text.strip()[:79] in reply
    assert len(reply) < 200
    assert naps == []


def test_silence_is_shown_by_none():
    speak = threading.Event()

    def bot():
        speak.wait(PATIENCE)
        yield "Hello"

    pieces = with_pauses(bot(), 0.01)
    assert [next(pieces), next(pieces)] == [None, None]
    speak.set()
    assert [piece for piece in pieces if piece is not None] == ["Hello"]


def test_who_waits_gets_the_pieces_in_order_and_no_none():
    assert list(with_pauses(simulated_bot([("user", "/long 1000")]), PATIENCE)) == [f"{n} " for n in range(1, 1001)]


def test_an_error_comes_after_the_pieces_before_it():
    said, error = listen(with_pauses(simulated_bot([("user", "/drop 2")]), PATIENCE))
    assert (said, str(error)) == (["1 ", "2 "], "asked to break off")


def test_a_bot_that_is_given_up_is_stopped_and_closed():
    closed = threading.Event()

    def bot():
        try:
            yield from repeat("word ")
        finally:
            closed.set()

    pieces = with_pauses(bot(), PATIENCE)
    assert next(pieces) == "word "
    pieces.close()
    assert closed.wait(PATIENCE)


@pytest.fixture
def model():
    with running(ModelServer()) as model:
        yield model


def ask(model, history=TALK[:1], **settings):
    """Ask the model; return all that it says, and the error."""
    return listen(openai_bot({"BOT_PROMPT": "", "BOT_TIMEOUT": PATIENCE, **model.settings(**settings)})(history))


def test_the_model_of_these_tests_speaks_the_protocol(model):
    with openai.OpenAI(base_url=model.url, api_key="sk-secret", max_retries=0) as client:
        messages = [{"role": "user", "content": "Hello"}]
        whole = client.chat.completions.create(model="tiny", messages=messages)
        chunks = list(client.chat.completions.create(model="tiny", messages=messages, stream=True))
    assert whole.choices[0].message.content == "Hello there."
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["Hello", " there.", None]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, "stop"]


def test_a_reply_comes_as_the_model_says_it(model):
    assert ask(model) == (["Hello", " there."], None)


def test_the_model_is_told_the_prompt_and_who_said_what(model):
    ask(model, TALK[:3], BOT_PROMPT="Be kind.")
    assert model.asked == [
        {
            "model": "tiny",
            "stream": True,
            "messages": [
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "Hello!"},
                {"role": "user", "content": "I like trains"},
            ],
        }
    ]


def test_without_a_prompt_the_model_is_told_none(model):
    ask(model)
    assert [message["role"] for message in model.asked[0]["messages"]] == ["user"]


def test_the_key_is_sent_as_a_bearer_token(model):
    ask(model)
    ask(model, OPENAI_API_KEY="")
    assert [headers["Authorization"] for headers in model.headers] == ["Bearer sk-secret", "Bearer none"]


@pytest.mark.parametrize("status", [302, 400, 401, 404, 429, 500, 503])
def test_a_refusal_is_an_error_and_is_not_repeated(model, status):
    model.status = status
    said, error = ask(model)
    assert (said, type(error)) == ([], BotError)
    assert str(status) in str(error)
    assert len(model.asked) == 1


def test_the_reason_of_an_error_keeps_the_key_secret_and_fits_a_line_of_the_log(model):
    model.status = 401
    _, error = ask(model)
    assert "sk-secret" not in str(error)
    assert "\n" not in str(error)


def test_a_model_that_is_not_there_is_an_error(model):
    said, error = ask(model, OPENAI_BASE_URL=f"http://127.0.0.1:{free_port()}/v1")
    assert (said, type(error)) == ([], BotError)


@pytest.mark.parametrize("script", [[stall], ["Hello", stall]], ids=["before the first piece", "in the middle"])
def test_a_model_that_falls_silent_is_a_timeout(model, script):
    model.script = script
    seconds, (said, error) = timed(ask, model, BOT_TIMEOUT=0.5)
    assert (said, type(error)) == (script[:-1], BotTimeout)
    assert 0.4 < seconds < PATIENCE / 2
    assert model.saw_hang_up()


DEEP = b'data: {"choices": %b%b}\n\n' % (b"[" * 100_000, b"]" * 100_000)


@pytest.mark.parametrize(
    "last",
    [
        *(cut, cut_in_a_chunk, end, b"data: no JSON\n\n", b"data: \xff\n\n", b"data: " + b"9" * 10_000 + b"\n\n", DEEP),
        *(data({"error": {"message": "overloaded"}}), data({"error": "overloaded"})),
        *map(data, (5, None, "x", [], {"choices": 5}, {"choices": [5]}, {"choices": [{"delta": 5}]})),
        data({"choices": [{"delta": {"content": 5}}]}),
    ],
    ids=lambda last: last.__name__ if callable(last) else last[6:46].decode(errors="replace"),
)
def test_a_model_that_breaks_off_or_talks_nonsense_is_an_error(model, last):
    model.script = ["Hello", last]
    said, error = ask(model)
    assert (said, type(error)) == (["Hello"], BotError)


def test_what_brings_no_text_is_passed_over(model):
    quiet = ({}, {"choices": []}, {"choices": None}, {"choices": [{"delta": None}]}, {"choices": [{"delta": {}}]})
    model.script = ["Hello", b": a comment\n\n", *map(data, quiet), "", " there."]
    assert ask(model) == (["Hello", " there."], None)


def test_a_model_may_say_nothing(model):
    model.script = []
    assert ask(model) == ([], None)


def test_what_no_database_can_hold_is_left_out(model):
    model.script = ["\0", "Hel\0lo", "\ud83d", "\udc00 the\ud800re", "🚂"]
    assert ask(model) == (["Hello", " there", "🚂"], None)


def test_a_model_that_does_not_come_to_an_end_is_cut_off(model):
    model.script = ["x", *repeat("word " * 200, 2 * REPLY_LENGTH // 1000), stall]
    said, error = ask(model)
    assert error is None
    assert len("".join(said)) == REPLY_LENGTH
    assert model.saw_hang_up()


def test_a_bot_that_is_given_up_hangs_up(model):
    model.script = ["Hello", *repeat("word ", 100), stall]
    pieces = openai_bot({"BOT_PROMPT": "", "BOT_TIMEOUT": PATIENCE, **model.settings()})(TALK[:1])
    assert next(pieces) == "Hello"
    pieces.close()
    assert model.saw_hang_up()


def test_the_package_openai_is_imported_only_for_a_model():
    program = """if True:
        import sys
        from app import create_app
        create_app({"DATABASE_URL": "sqlite:///unused.db"})
        assert "openai" not in sys.modules
        create_app({"DATABASE_URL": "sqlite:///unused.db", "BOT_MODEL": "tiny"})
        assert "openai" in sys.modules
    """
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=PATIENCE)


@pytest.mark.parametrize(
    ("limit", "shown"), [(1, ["4"]), (2, ["Hello there.", "4"]), (3, ["3", "Hello there.", "4"]), (100, None)]
)
@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_the_bot_is_shown_the_last_messages_the_new_one_among_them(make_app, model, limit, shown):
    client = make_app(BOT_HISTORY=limit, **model.settings()).test_client()
    client.signup("ada")
    client.login("ada")
    talk = client.create()
    for text in "1234":
        assert client.send(talk, text).status_code == 201
    told = [message["content"] for message in model.asked[-1]["messages"]]
    assert told == (shown or ["1", "Hello there.", "2", "Hello there.", "3", "Hello there.", "4"])
