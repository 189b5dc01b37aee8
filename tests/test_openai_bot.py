"""The bot that asks a model, with servers that do everything that model servers do."""

import email.utils
import json
import socket
import ssl
import threading
import time
from contextlib import ExitStack, contextmanager
from functools import partial

import pytest

from app import create_app
from app.bot import BotBusy, BotError, BotMessageTooLong, BotTimeout, BotTruncated, create_bot
from app.openai_protocol import MAX_EVENT_BYTES, parse_retry_delay, skip_thinking
from config import ConfigError
from tests.helpers.bots import collect
from tests.helpers.model_server import (
    DONE,
    SILENCES,
    ModelServer,
    chunk,
    cut,
    cut_in_event,
    drip,
    end,
    event,
    running,
    stall,
)
from tests.helpers.server import TIMEOUT, find_free_port, measure, run_all, wait_until
from tests.helpers.tls import create_certificate

HISTORY = [("user", "Hello"), ("bot", "Hello!"), ("user", "How are you?")]
SECRET = "my secret words"
PROXY_VARIABLES = ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"]
STOP = chunk({}, "stop")


@pytest.fixture(autouse=True)
def short_finish_timeout(monkeypatch):
    monkeypatch.setattr("app.openai_bot.FINISH_TIMEOUT", 1)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for name in PROXY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def model():
    with running(ModelServer()) as server:
        yield server


def create_model_bot(model, **overrides):
    """Return a bot that asks a model server."""
    return create_bot_for(model.url, **overrides)


def create_bot_for(url, **overrides):
    """Return a bot that asks the model server at a URL."""
    defaults = {"OPENAI_API_KEY": "sk-secret", "BOT_SYSTEM_PROMPT": "", "BOT_OPTIONS": {}, "BOT_HISTORY_CHARS": 32_000}
    return create_bot(
        {"BOT_MODEL": "tiny", "OPENAI_BASE_URL": url, "BOT_TIMEOUT": TIMEOUT, **defaults, **overrides},
    )


def ask(model, history=HISTORY, **overrides):
    """Return the text of a model's reply, and the exception that it ended with or None."""
    return collect(create_model_bot(model, **overrides)(history))


def ask_one(script, func, options):
    with running(ModelServer(**options)) as model:
        model.script = script
        return func(model)


def ask_each(scripts, func, **options):
    """Call func(model) with a model server for each script, all at once; return the results by the scripts' names."""
    results = run_all(*(partial(ask_one, script, func, options) for script in scripts.values()))
    return dict(zip(scripts, results, strict=True))


def shorten(value):
    """Return an id for a parameter, which is the same in every process."""
    steps = [getattr(step, "__name__", step) for step in value] if isinstance(value, list) else value
    return ascii(steps)[:60]


# Requests


def test_request_has_history_prompt_options_and_key(model):
    assert ask(model, BOT_SYSTEM_PROMPT="Be kind.", BOT_OPTIONS={"temperature": 0.5, "stop": ["x"]}) == (
        "Hello there.",
        None,
    )
    assert model.requests == [
        {
            "model": "tiny",
            "stream": True,
            "temperature": 0.5,
            "stop": ["x"],
            "messages": [
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "Hello!"},
                {"role": "user", "content": "How are you?"},
            ],
        }
    ]
    assert model.headers[0]["Authorization"] == "Bearer sk-secret"
    assert model.paths == ["/v1/chat/completions"]


def test_request_without_key_has_no_authorization(model):
    assert ask(model, OPENAI_API_KEY="") == ("Hello there.", None)
    assert model.headers[0]["Authorization"] is None


def test_username_and_password_of_base_url_are_sent(model):
    bot = create_bot_for(model.url.replace("localhost", "us%65r:p%40ss@localhost"))
    assert collect(bot(HISTORY)) == ("Hello there.", None)
    assert model.headers[0]["Authorization"] == "Basic dXNlcjpwQHNz"
    assert model.headers[0]["Host"] == f"localhost:{model.server_port}"


def test_request_has_history_within_limit(model):
    assert ask(model, BOT_HISTORY_CHARS=14)[1] is None
    assert [message["content"] for message in model.requests[0]["messages"]] == ["How are you?"]


def test_base_url_may_have_a_query_and_a_final_slash(model):
    bot = create_bot_for(f"{model.url}/?api-version=2 b")
    assert collect(bot(HISTORY)) == ("Hello there.", None)
    assert model.paths == ["/v1/chat/completions?api-version=2%20b"]


def test_bot_is_given_user_and_conversation(model):
    assert collect(create_model_bot(model)(HISTORY, user_id=1, conversation_id=2))[0] == "Hello there."


def test_replies_reuse_a_connection(model):
    bot = create_model_bot(model)
    for _ in range(3):
        reply = bot(HISTORY)
        assert collect(reply) == ("Hello there.", None)
        reply.cancel()
    assert model.connection_count == 1


def test_connection_that_the_server_closed_is_replaced(model):
    bot = create_model_bot(model)
    model.ending = [STOP, DONE, lambda handler: setattr(handler, "close_connection", True)]
    for _ in range(3):
        assert collect(bot(HISTORY)) == ("Hello there.", None)
    assert model.connection_count == len(model.requests) == 3


# Responses


QUIET = (
    *({}, None, {"choices": []}, {"choices": None}, {"choices": {}}, {"choices": [None]}),
    *({"choices": [{"delta": None}]}, {"choices": [{"index": 0}]}, {"choices": [{"message": None}]}),
)
SECOND_CHOICE = {"index": 1, "delta": {"content": "No"}, "finish_reason": "stop"}
USAGE = event({"choices": [], "usage": {"total_tokens": 3}})
RAW = json.dumps({"choices": [{"delta": {"content": "naïve 🚂"}}]}, ensure_ascii=False).encode()
TEXT_PARTS = [{"type": "text", "text": "Hello"}, {"type": "thinking", "thinking": []}, {"type": "text", "text": "!"}]


@pytest.mark.parametrize(
    ("script", "text"),
    [
        (["Hello", " there."], "Hello there."),
        (["Hello", b": comment\n\n", b"data:\n\n", *map(event, QUIET), USAGE, "", "!"], "Hello!"),
        ([b": comment\nevent: message\nid: 1\nretry: 5\n" + chunk({"content": "Hello"})], "Hello"),
        ([bytes([byte]) for byte in b"data: " + RAW + b"\n\n"], "naïve 🚂"),
        ([b"data:" + RAW + b"\n\n"], "naïve 🚂"),
        ([b"data: " + RAW + b"\r\n\r\n"], "naïve 🚂"),
        ([b"\xef\xbb\xbfdata: " + RAW + b"\n\n"], "naïve 🚂"),
        ([b'data: {"choices":\ndata: [{"delta": {"content": "Hello"}}]}\n\n'], "Hello"),
        ([bytes([byte]) for byte in b'data: {"choices":\r\ndata: [{"delta": {"content": "Hello"}}]}\r\n\r\n'], "Hello"),
        ([event({"choices": [{"delta": {"content": text}}]}).replace(b"\n", b"\r") for text in "Hi"], "Hi"),
        ([event({"choices": [{"delta": {"content": text}}]}).replace(b"\n\n", b"\n") for text in "Hi"], "Hi"),
        ([b'data: {"choices": [{"delta": {"content": "a\xffb"}}]}\n\n'], "a\ufffdb"),
        ([b'data: {"choices": [{"delta": {"content": "a"}, "logprobs": NaN}]}\n\n'], "a"),
        ([b'data: {"choices": [{"delta": {"content": "a\\ud83d"}}]}\n\n'], "a\ud83d"),
        ([chunk({"content": TEXT_PARTS}), chunk({"content": ["Good", 5]}), chunk({"content": 5})], "Hello!Good"),
        ([chunk({"refusal": "I cannot "}), chunk({"content": None, "refusal": "help."})], "I cannot help."),
        ([chunk({"reasoning_content": "Hm"}), chunk({"reasoning": "Hm", "content": ""}), "Yes"], "Yes"),
        ([chunk({"tool_calls": [{"function": {"name": "x", "arguments": "y"}}]}), "Yes"], "Yes"),
        ([event({"choices": [SECOND_CHOICE]}), "Yes"], "Yes"),
        ([event({"choices": [SECOND_CHOICE, {"index": "0", "delta": {"content": "Yes"}}]})], "Yes"),
        ([event({"choices": [{"delta": None, "message": {"content": "Yes"}}]})], "Yes"),
        (["Hi", chunk({"content": "!"}, "stop"), event({"choices": [{"message": {"content": "Hi!"}}]})], "Hi!"),
        (["Hello", event({"choices": [{"message": {"content": "Hello"}, "finish_reason": "stop"}]})], "Hello"),
        ([chunk({"content": {"type": "text", "text": "Hello"}})], "Hello"),
        ([chunk({"content": "Hello"}, ""), chunk({"content": " there"}, "null")], "Hello there"),
        ([chunk({"content": "", "role": "assistant"}, "stop"), chunk({"content": "Hi"}, "stop"), "!"], "Hi!"),
        ([chunk({"content": "Hi"}, "stop"), chunk({}, "stop"), chunk({"content": "!"}, "stop")], "Hi!"),
        (
            [chunk({"reasoning": "Hm"}, "stop"), chunk({"content": "Hi"}, "stop"), chunk({"content": "!"}, "STOP")],
            "Hi!",
        ),
        ([event({"choices": [{"delta": {"content": "Hi"}}], "error": None})], "Hi"),
        (["Hello", "x" * 1_000_000], "Hello" + "x" * 1_000_000),
        ([], ""),
    ],
    ids=shorten,
)
def test_response_is_read_as_clients_do(model, script, text):
    model.script = script
    assert ask(model) == (text, None)


WHOLE = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}]}
CUT_AT_LENGTH = {"choices": [{"message": {"content": "Hello"}, "finish_reason": "length"}]}


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (WHOLE, type(None)),
        (json.dumps(WHOLE, indent=2).encode(), type(None)),
        (b"\xef\xbb\xbf\r\n" + json.dumps(WHOLE).encode(), type(None)),
        ({"choices": [{"message": {"content": "Hello"}}]}, type(None)),
        (CUT_AT_LENGTH, BotTruncated),
    ],
)
def test_response_without_streaming_is_read(model, body, error):
    model.refuse = lambda request: (200, body, {})
    text, raised = ask(model)
    assert (text, type(raised)) == ("Hello", error)


TRUNCATED_REASONS = [
    *("length", "model_length", "model_context_window_exceeded", "sensitive", "PROHIBITED_CONTENT", "blocklist"),
    *("SPII", "content_filter: RECITATION"),
]
ERROR_REASONS = ["error", "error_finish", "abort", "network_error"]
BUSY = [
    *({"code": 429}, {"code": "429"}, {"status_code": 503}, {"type": "overloaded_error"}),
    *({"code": "rate_limit_exceeded"}, {"status": "RESOURCE_EXHAUSTED"}),
]


@pytest.mark.parametrize(
    ("script", "ending", "text", "error"),
    [
        (["Hello"], [chunk({}, "length"), DONE], "Hello", BotTruncated),
        (["Hello"], [chunk({}, "content_filter"), cut], "Hello", BotTruncated),
        ([], [chunk({"content": "Hello"}, "MAX_TOKENS"), DONE], "Hello", BotTruncated),
        (["Hello"], [chunk({}, "length"), stall], "Hello", BotTruncated),
        (["Hello"], [chunk({}, "stop"), cut], "Hello", None),
        (["Hello"], [chunk({}, "stop"), end], "Hello", None),
        (["Hello"], [chunk({}, "stop"), stall], "Hello", None),
        (["Hello"], [chunk({}, "stop"), drip(b"3\r\n:\n\n\r\n")], "Hello", None),
        (["Hello"], [chunk({}, "length"), drip(b"3\r\n:\n\n\r\n")], "Hello", BotTruncated),
        (["Hello"], [chunk({}, "stop"), event({"error": {"message": SECRET, "code": 500}})], "Hello", None),
        (["Hello"], [chunk({}, "stop"), event({"error": {"type": "exceed_context_size_error"}})], "Hello", None),
        (["Hello"], [chunk({}, "length"), b"data: {]\n\n"], "Hello", BotTruncated),
        ([], [chunk({"content": "Hello"}, "stop"), cut_in_event], "Hello", None),
        ([chunk({"content": "Hel"}, "stop")], [chunk({"content": "lo"}, "stop"), cut], "Hello", BotError),
        (["Hello"], [event({"choices": [{"index": 0, "content_filter_results": {}}]}), cut], "Hello", BotError),
        ([], [chunk({}, "tool_calls"), DONE], "", BotTruncated),
        (["Hello"], [DONE], "Hello", None),
        (["Hello"], [DONE, stall], "Hello", None),
        (["Hello"], [b"data: [DONE]", end], "Hello", None),
        ([], [DONE], "", BotError),
        (["Hello"], [end], "Hello", BotError),
        (["Hello"], [cut], "Hello", BotError),
        (["Hello"], [cut_in_event], "Hello", BotError),
        ([chunk({"content": "Hello"}, "")], [end], "Hello", BotError),
        *((["Hello"], [chunk({}, reason), DONE], "Hello", BotTruncated) for reason in TRUNCATED_REASONS),
        *((["Hello"], [chunk({}, reason), DONE], "Hello", BotError) for reason in ERROR_REASONS),
        (["Hello"], [event({"error": {"message": SECRET, "code": 500}}), DONE], "Hello", BotError),
        (
            ["Hello"],
            [event({"error": {"message": SECRET, "type": "exceed_context_size_error"}})],
            "Hello",
            BotTruncated,
        ),
        *(([], [event({"error": {"message": SECRET, **fields}})], "", BotBusy) for fields in BUSY),
        ([], [event({"error": SECRET})], "", BotError),
        ([], [event({"object": "error", "message": SECRET, "code": 400})], "", BotError),
        (["Hello"], [b'data: {"cut\n\n'], "Hello", BotError),
        (["Hello"], [b"data: [5]\n\n"], "Hello", BotError),
        (["Hello"], [b"data: " + b"[" * 100_000 + b"\n\n"], "Hello", BotError),
        (["Hello"], [b"<html>", end], "Hello", BotError),
    ],
    ids=shorten,
)
def test_end_of_reply_is_judged_by_all_signs(model, script, ending, text, error):
    model.script, model.ending = script, ending
    collected, raised = ask(model)
    assert (collected, type(raised)) == (text, error or type(None))
    assert SECRET not in str(raised)


@pytest.mark.parametrize("rest", [stall, drip(b"3\r\n:\n\n\r\n")])
def test_stop_with_the_only_text_is_a_whole_reply_after_the_timeout(model, rest):
    model.script, model.ending = [], [chunk({"content": "Hello"}, "stop"), rest]
    assert ask(model, BOT_TIMEOUT=0.3) == ("Hello", None)


def test_stop_with_the_first_text_leaves_time_for_more(model, monkeypatch):
    model.script = [
        chunk({"content": "Hello"}, "stop"),
        lambda handler: time.sleep(0.3),
        chunk({"content": "!"}, "stop"),
    ]
    assert ask(model) == ("Hello!", None)


@pytest.mark.parametrize("first", [chunk({"role": "assistant"}, "stop"), chunk({"reasoning": "Hm"}, "stop")])
def test_stop_before_the_first_text_leaves_time_for_it(model, monkeypatch, first):
    model.script = [first, lambda handler: time.sleep(0.3), chunk({"content": "Hello"}, "stop")]
    assert ask(model) == ("Hello", None)


def test_stop_with_every_chunk_leaves_time_for_the_next_one(model, monkeypatch):
    hello = [chunk({"content": text}, "stop") for text in ("Hel", "lo")]
    model.script = [*hello, lambda handler: time.sleep(0.6), chunk({"content": "!"}, "stop")]
    assert ask(model) == ("Hello!", None)


def test_stop_ends_reply_at_once(model, monkeypatch):
    model.ending = [STOP, stall]
    seconds, result = measure(ask, model)
    assert result == ("Hello there.", None)
    assert seconds < TIMEOUT / 2


def test_long_line_ends_response(model):
    model.ending = [b"data: " + b"x" * MAX_EVENT_BYTES, b"x", stall]
    text, error = ask(model)
    assert (text, str(error)) == ("Hello there.", "the model's response is too long")


def test_endless_response_is_ended(model, monkeypatch):
    monkeypatch.setattr("app.openai_bot.MAX_RESPONSE_BYTES", 1_000_000)
    model.script = [b": comment\n" * 10_000] * 1000
    text, error = ask(model)
    assert (text, str(error)) == ("", "the model's response is too long")
    assert model.wait_for_hang_up()


@pytest.mark.parametrize(
    ("script", "text"),
    [
        (["<think>Hm</think>Yes"], "Yes"),
        (["\n <think>\nHm", " <b>", "</think>\n", "\nYes", "\n"], "Yes\n"),
        (list("<think>Hm</think>\n\nYes"), "Yes"),
        (["<think>a</think> <think>b</think> Yes"], "Yes"),
        (["<thi", "s>"], "<this>"),
        (["<th"], "<th"),
        (["Yes <think>b</think>"], "Yes <think>b</think>"),
        (["<think>endless"], ""),
        ([" ", "\n", "Yes"], "Yes"),
        ([], ""),
    ],
)
def test_thinking_at_the_beginning_is_left_out(script, text):
    texts = list(skip_thinking(script))
    assert "".join(texts).lstrip() == text
    assert len(texts) >= len(script)  # an empty text is a sign of life


def test_text_after_thinking_is_not_delayed():
    source = iter(["<think>a", "</think>Yes", " sir"])
    texts = skip_thinking(source)
    assert [next(texts), next(texts), next(source)] == ["", "Yes", " sir"]


# Errors


def get_exception_texts(error):
    """Return all that a traceback of an exception would show of it and its causes."""
    texts = []
    while error:
        texts.append(repr(error))
        error = error.__cause__ or error.__context__
    return "\n".join(texts)


CONTEXT_EXCEEDED = [
    {"error": {"message": SECRET, "code": "context_length_exceeded"}},
    {"error": {"message": SECRET, "type": "exceed_context_size_error"}},
    {"error": {"message": SECRET, "code": "model_max_prompt_tokens_exceeded"}},
    {"object": "error", "message": f"This model's maximum context length is 4096 tokens. {SECRET}", "code": 400},
    {"error": {"message": f"The decoder prompt (length 9) is longer than the maximum model length of 8. {SECRET}"}},
    {"error": {"message": f"litellm.ContextWindowExceededError: {SECRET}"}},
    {"error": {"message": f"Requested tokens (9) exceed context window of 8 {SECRET}"}},
    {"error": {"message": f"This model's maximum prompt length is 8 but the request contains 9 tokens. {SECRET}"}},
    {"error": {"message": f"prompt is too long: 9 tokens > 8 maximum {SECRET}"}},
    {"error": {"message": f"Invalid request: Your request exceeded model token limit: 8 {SECRET}"}},
    {"error": {"message": f"prompt token count of 9 exceeds the limit of 8 {SECRET}"}},
    {"error": {"message": f"Range of input length should be [1, 8] {SECRET}"}},
    {"error": {"message": f"Prompt exceeds max length {SECRET}", "code": "1261"}},
    {"error": {"message": f"Prompt length 9 is greater than max_seq_len 8 {SECRET}"}},
    {"error": f"Input validation error: `inputs` must have less than 8 tokens. Given: 9 {SECRET}"},
    {"error": f"Input validation error: `inputs` tokens + `max_new_tokens` must be <= 8 {SECRET}"},
    {"error": f"Cannot truncate prompt with n_keep (9) >= n_ctx (8) {SECRET}"},
    {"error": {"message": f"max_tokens must be at least 1, got -1. {SECRET}"}},
    {"error": {"message": f"Input length 9 exceeds the maximum length 8 {SECRET}"}},
    {"error": {"message": f"the input token count is 9 but model only supports up to 8. {SECRET}"}},
    {"errors": [{"message": f"the number of input tokens 9 cannot exceed 8 {SECRET}"}], "success": False},
    {"errors": [], "message": f"too many tokens {SECRET}"},
    {"error": {"message": "Provider returned error", "metadata": {"raw": f"context length {SECRET}"}}},
    {"detail": f"the context size is exceeded {SECRET}"},
    [{"error": {"message": f"The input token count exceeds the maximum number of tokens allowed {SECRET}"}}],
]


ERRORS = [
    (400, {"error": {"message": SECRET, "type": "invalid_request_error"}}, BotError, "400 invalid_request_error"),
    (400, {"error": {"message": SECRET, "type": SECRET, "code": "sk-secret"}}, BotError, "400,"),
    (401, {"error": {"message": SECRET + " sk-secret"}}, BotError, "401,"),
    (404, {"error": SECRET}, BotError, "404,"),
    (404, {"detail": SECRET}, BotError, "404,"),
    (404, b"\x00\x1b[31m" + SECRET.encode() * 2_000_000, BotError, "404,"),
    (404, b"", BotError, "404, 0 bytes"),
    (422, {"detail": [{"input": "the context length " + SECRET}]}, BotError, "422,"),
    (500, [SECRET], BotError, "500,"),
    (307, b"", BotError, "307,"),
    (429, {"error": {"message": SECRET, "code": "rate_limit_exceeded"}}, BotBusy, "429 rate_limit_exceeded"),
    (503, b"Loading model", BotBusy, "503,"),
    (413, SECRET.encode(), BotMessageTooLong, "413,"),
    *((400, body, BotMessageTooLong, "400") for body in CONTEXT_EXCEEDED),
    *((status, CONTEXT_EXCEEDED[0], BotMessageTooLong, f"{status} context_length") for status in (413, 422, 500)),
    (500, CONTEXT_EXCEEDED[-2], BotMessageTooLong, "500,"),
    (200, {"error": {"code": 400, "type": "exceed_context_size_error"}}, BotMessageTooLong, "400 exceed_context_size"),
    (200, {"error": {"code": 503, "message": SECRET}}, BotBusy, "503,"),
    (200, [{"error": {"code": 429, "message": SECRET}}], BotBusy, "429,"),
    (500, {"error": {"type": "overloaded_error", "message": SECRET}}, BotBusy, "500 overloaded_error,"),
    (200, {"error": {"code": "rate_limit_exceeded", "message": "token limit"}}, BotBusy, "200 rate_limit_exceeded"),
    (200, {"error": {"code": "1261", "message": f"Prompt exceeds max length {SECRET}"}}, BotMessageTooLong, "200,"),
    (401, {"error": {"message": "context length " + SECRET}}, BotError, "401,"),
    (429, {"error": {"message": f"Request too large for tiny {SECRET}"}}, BotMessageTooLong, "429,"),
    (200, {"error": {"message": f"429: Too many tokens, please wait {SECRET}"}}, BotBusy, "429,"),
    (500, {"detail": f"ThrottlingException: Too many tokens, please wait {SECRET}"}, BotBusy, "500,"),
    (200, {"error": {"code": "5021", "message": SECRET}}, BotError, "200,"),
    (400, {"error": {"message": SECRET, "metadata": SECRET}}, BotError, "400,"),
    (400, {"error": {}}, BotError, "400,"),
    (400, [], BotError, "400,"),
]


@pytest.mark.parametrize(("status", "body", "error", "message"), ERRORS, ids=lambda value: ascii(value)[:40])
def test_error_response_raises_without_its_words(model, status, body, error, message):
    model.refuse = lambda request: (status, body, {"X-Request-Id": SECRET})
    text, raised = ask(model, [("user", SECRET)])
    assert (text, type(raised)) == ("", error)
    assert message in str(raised)
    assert len(str(raised)) < 120
    assert SECRET not in get_exception_texts(raised)
    assert "sk-secret" not in get_exception_texts(raised)


def test_status_line_that_is_no_http_raises_without_its_words():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def respond():
            connection = listener.accept()[0]
            with connection:
                connection.recv(65536)
                connection.sendall(SECRET.encode() + b"\r\n\r\n")

        threading.Thread(target=respond, daemon=True).start()
        text, error = collect(create_bot_for(f"http://127.0.0.1:{listener.getsockname()[1]}/v1")(HISTORY))
    assert (text, str(error)) == ("", "the connection to the model failed: BadStatusLine")
    assert SECRET not in get_exception_texts(error)


def test_refused_connection_raises():
    text, error = collect(create_bot_for(f"http://127.0.0.1:{find_free_port()}/v1")(HISTORY))
    assert (text, str(error)) == ("", "the connection to the model failed: ConnectionRefusedError")


def test_redirect_is_not_followed(model):
    model.refuse = lambda request: (307, b"", {"Location": f"{model.url}/elsewhere"})
    assert type(ask(model)[1]) is BotError
    assert len(model.requests) == 1


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        *(("7", 7), (" 7 ", 7), ("1.2", 2), ("0", 1), ("99999999", 3600), ("9" * 30, 5), ("-1", 5), ("nan", 5)),
        *(("", 5), (None, 5), ("soon", 5), ("Mon, 99 Foo 2026", 5), ("Fri, 31 Dec 1999 23:59:59 GMT", 1)),
        ("Fri, 31 Dec 2150 23:59:59 GMT", 3600),
        ("Fri, 31 Dec 99999999999999 23:59:59 GMT", 5),
    ],
)
def test_retry_after_is_bounded(value, seconds):
    assert (parse_retry_delay({"Retry-After": value or ""}, "") or 5) == seconds


def test_retry_after_may_be_a_date():
    date = email.utils.formatdate(time.time() + 600, usegmt=True)
    assert 500 < parse_retry_delay({"Retry-After": date}, "") <= 600


def test_busy_model_raises_with_its_retry_after(model):
    model.refuse = lambda request: (429, {}, {"Retry-After": "7"})
    assert ask(model)[1].retry_after == 7


@pytest.mark.parametrize("rest", [[b""], [stall], [drip(b" ")]])
def test_busy_model_whose_body_is_cut_or_never_ends_raises_busy(model, rest):
    def respond(handler):
        handler.wfile.write(b"HTTP/1.1 429 Slow Down\r\nContent-Length: 100000\r\nRetry-After: 7\r\n\r\n{")
        for step in rest:
            step(handler) if callable(step) else cut(handler)

    model.script = [respond]
    assert ask(model, BOT_TIMEOUT=2)[1].retry_after == 7


LONG_HISTORY = [(sender, f"{number:03}" * 10) for number in range(8) for sender in ("user", "bot")] + [("user", "new")]


def refuse_more_than(max_chars):
    """Return a function that refuses requests whose messages have more characters."""

    def refuse(request):
        if sum(len(message["content"]) for message in request["messages"]) > max_chars:
            return 400, {"error": {"code": "context_length_exceeded"}}, {}
        return None

    return refuse


@pytest.mark.parametrize(("max_chars", "counts"), [(483, [17]), (250, [17, 7]), (100, [17, 7, 3]), (3, [17, 7, 3, 1])])
def test_exceeded_context_is_asked_again_with_half_the_history(model, max_chars, counts):
    model.refuse = refuse_more_than(max_chars)
    assert ask(model, LONG_HISTORY) == ("Hello there.", None)
    assert [len(request["messages"]) for request in model.requests] == counts
    assert all(request["messages"][0]["role"] == "user" for request in model.requests)
    assert all(request["messages"][-1]["content"] == "new" for request in model.requests)


def test_exceeded_context_in_stream_is_asked_again(model):
    model.refuse = lambda request: (200, {"error": {"code": 400, "type": "exceed_context_size_error"}}, {})
    assert type(ask(model, LONG_HISTORY)[1]) is BotMessageTooLong
    assert [len(request["messages"]) for request in model.requests] == [17, 7, 3, 1]


def test_new_message_alone_that_exceeds_context_raises(model):
    model.refuse = refuse_more_than(2)
    text, error = ask(model, LONG_HISTORY)
    assert (text, type(error)) == ("", BotMessageTooLong)


def test_unanswered_messages_before_the_new_one_are_left_out_too(model):
    model.refuse = refuse_more_than(3)
    assert ask(model, [("user", "unanswered"), ("user", "new")]) == ("Hello there.", None)


# Deadlines and cancellation


@contextmanager
def unresponsive_address(scheme):
    """Yield the URL of a server that accepts connections (https) or does not even do that (http)."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(0 if scheme == "https" else 3):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield f"{scheme}://127.0.0.1:{listener.getsockname()[1]}/v1"


def wait_for_timeout(model):
    """Return the text of a reply that a time-out ends, once the connection is closed."""
    text, error = ask(model, BOT_TIMEOUT=1.5)
    assert type(error) is BotTimeout
    assert model.wait_for_hang_up()
    return text


def test_silence_raises_timeout_and_closes_connection():
    texts = {name: "Hello" if "Hello" in script else "" for name, script in SILENCES.items()}
    assert ask_each(SILENCES, wait_for_timeout) == texts


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_unresponsive_server_raises_timeout(scheme):
    with unresponsive_address(scheme) as url:
        assert type(collect(create_bot_for(url, BOT_TIMEOUT=0.5)(HISTORY))[1]) is BotTimeout


SIGNS_OF_LIFE = [
    *({"reasoning_content": "Hm"}, {"reasoning": "Hm"}, {"reasoning_details": [{"data": "Hm"}]}, {"content": "x"}),
    *({"content": [{"type": "thinking"}]}, {"content": "", "reasoning": "Hm"}),
]


def test_reasoning_and_text_are_signs_of_life():
    scripts = {str(delta): [chunk(delta), lambda handler: time.sleep(0.4)] * 5 for delta in SIGNS_OF_LIFE}
    assert ask_each(scripts, lambda model: ask(model, BOT_TIMEOUT=1.6)[1]) == dict.fromkeys(scripts)


def cancel_while_reading(reply, is_waiting=lambda: True):
    """Cancel a reply while another thread reads it; return what that thread read."""
    results = []
    thread = threading.Thread(target=lambda: results.append(collect(reply)), daemon=True)
    thread.start()
    wait_until(is_waiting)
    time.sleep(0.2)
    reply.cancel()
    thread.join(TIMEOUT / 2)
    assert not thread.is_alive()
    return results[0]


def cancel_reply(model):
    """Cancel a reply, which must end without an error, and wait until the connection is closed."""
    reply = create_model_bot(model)(HISTORY)
    assert cancel_while_reading(reply, lambda: model.requests)[1] is None
    assert model.wait_for_hang_up()


def test_cancel_ends_reply_and_closes_connection():
    ask_each(SILENCES, cancel_reply)


def test_reply_cancelled_before_reading_is_empty(model):
    model.script = [stall]
    reply = create_model_bot(model)(HISTORY)
    reply.cancel()
    assert list(reply) == []
    assert list(reply) == []


def test_close_of_unfinished_reply_closes_connection(model):
    model.script = ["Hello", stall]
    reply = create_model_bot(model)(HISTORY)
    chunks = iter(reply)
    assert next(chunks) == "Hello"
    chunks.close()
    assert model.wait_for_hang_up()


def test_ended_replies_leave_no_thread(model):
    threads = set(threading.enumerate())
    model.script = ["Hello", stall]
    bot = create_model_bot(model)
    replies = [bot(HISTORY) for _ in range(20)]
    for reply, chunks in [(reply, iter(reply)) for reply in replies]:
        assert next(chunks) == "Hello"
        reply.cancel()
    wait_until(lambda: set(threading.enumerate()) <= threads)


def test_text_is_yielded_as_it_arrives(model):
    proceed = threading.Semaphore(0)
    model.script = [step for number in range(5) for step in (f"{number} ", lambda handler: proceed.acquire())]
    chunks = iter(create_model_bot(model)(HISTORY))
    for number in range(5):
        assert next(chunks) == f"{number} "
        proceed.release()
    assert list(chunks) == []


# The environment


@pytest.fixture
def certificate(tmp_path, monkeypatch):
    """The path of a certificate for localhost, which SSL_CERT_FILE names, with its key."""
    path = create_certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    return path


def create_server_context(certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


def tls_model(certificate, **options):
    return running(ModelServer(create_server_context(certificate), **options))


def test_https_with_trusted_certificate_returns_reply(certificate):
    with tls_model(certificate) as model:
        bot = create_model_bot(model)
        assert collect(bot(HISTORY)) == ("Hello there.", None)
        assert collect(bot(HISTORY)) == ("Hello there.", None)
        assert model.connection_count == 1


def test_https_with_unknown_certificate_raises(certificate, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    with tls_model(certificate) as model:
        assert str(ask(model)[1]) == "the connection to the model failed: SSLCertVerificationError"


@pytest.mark.parametrize("end_reply", [wait_for_timeout, cancel_reply])
def test_https_silence_and_cancel_end_reply(certificate, end_reply):
    silences = {name: SILENCES[name] for name in ("before the head", "dripping head", "after text")}
    ask_each(silences, end_reply, tls_context=create_server_context(certificate))


def test_proxy_of_environment_is_used_for_http(model, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", model.url.replace("localhost", "us%65r:p%40ss@127.0.0.1").removesuffix("/v1"))
    bot = create_bot_for("http://model.invalid:8080/v1")
    assert collect(bot(HISTORY)) == ("Hello there.", None)
    assert model.paths == ["http://model.invalid:8080/v1/chat/completions"]
    assert model.headers[0]["Host"] == "model.invalid:8080"
    assert model.headers[0]["Proxy-Authorization"] == "Basic dXNlcjpwQHNz"


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
def test_proxy_of_environment_is_used_for_https(certificate, monkeypatch, variable):
    with tls_model(certificate, is_proxy=True) as proxy:
        monkeypatch.setenv(variable, f"user:pass@127.0.0.1:{proxy.server_port}")
        assert collect(create_bot_for("https://localhost:1/v1")(HISTORY)) == ("Hello there.", None)
        assert proxy.paths == ["localhost:1", "/v1/chat/completions"]
        assert proxy.headers[0]["Proxy-Authorization"] == "Basic dXNlcjpwYXNz"
        assert proxy.headers[1]["Proxy-Authorization"] is None


@pytest.mark.parametrize("no_proxy", ["localhost", "*", "example.com, localhost"])
def test_no_proxy_is_respected(model, monkeypatch, no_proxy):
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", no_proxy)
    assert ask(model) == ("Hello there.", None)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ALL_PROXY", "socks5://user:secret@localhost:1080"),
        ("HTTPS_PROXY", "http://secret:port"),
        ("HTTPS_PROXY", "http://"),
        ("SSLKEYLOGFILE", "/missing/secret"),
    ],
)
def test_unusable_environment_raises_value_error_that_names_it(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=f"^{variable} must [^\n]*$") as raised:
        create_bot_for("https://localhost/v1")
    assert "secret" not in str(raised.value)


def test_app_with_unusable_environment_raises_config_error(monkeypatch, tmp_path):
    monkeypatch.setenv("ALL_PROXY", "socks5://localhost:1080")
    with pytest.raises(ConfigError, match=r"^ALL_PROXY must be the http:// URL of a proxy$"):
        create_app(
            {
                "BOT_MODEL": "tiny",
                "OPENAI_BASE_URL": "https://localhost/v1",
                "DATABASE_URL": f"sqlite:///{tmp_path}/chatbot.db",
            }
        )


def test_certificates_are_needed_for_https_only(model, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", "/missing.pem")
    assert ask(model) == ("Hello there.", None)
