"""The bot that asks a model, with servers that do everything that model servers do."""

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
from app.openai_protocol import MAX_EVENT_BYTES, skip_thinking
from config import ConfigError
from tests.helpers.bots import collect
from tests.helpers.model_server import (
    COMMENTS,
    DONE,
    SILENCES,
    ModelServer,
    choice,
    chunk,
    cut,
    cut_in_event,
    drip,
    end,
    event,
    running,
    stall,
    write_raw,
)
from tests.helpers.server import TIMEOUT, find_free_port, measure, run_all, run_in_background, wait_until
from tests.helpers.tls import create_certificate

HISTORY = [("user", "Hello"), ("bot", "Hello!"), ("user", "How are you?")]
REPLY = ("Hello there.", None)
SECRET = "my secret words"
PROXY_VARIABLES = ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"]
TLS_VARIABLES = ["SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE"]
STOP = chunk({}, "stop")


@pytest.fixture(autouse=True)
def clean_environment_and_short_finish_timeout(monkeypatch):
    monkeypatch.setattr("app.openai_bot.FINISH_TIMEOUT", 1)
    for name in [*PROXY_VARIABLES, *map(str.lower, PROXY_VARIABLES), *TLS_VARIABLES]:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def model():
    with running(ModelServer()) as server:
        yield server


def create_bot_for(url, **overrides):
    """Return a bot that asks the model server at a URL."""
    defaults = {"BOT_MODEL": "tiny", "OPENAI_BASE_URL": url, "OPENAI_API_KEY": "sk-secret", "BOT_TIMEOUT": TIMEOUT}
    return create_bot(
        {**defaults, "BOT_SYSTEM_PROMPT": "", "BOT_OPTIONS": {}, "BOT_HISTORY_CHARS": 32_000, **overrides}
    )


def ask(model, history=HISTORY, **overrides):
    """Return the text of a model's reply, and the exception that it ended with or None."""
    return collect(create_bot_for(model.url, **overrides)(history))


def ask_each(scripts, func, **options):
    """Call func(model) with a model server for each script, all at once; return the results by the scripts' names."""
    with ExitStack() as stack:
        models = [stack.enter_context(running(ModelServer(**options))) for _ in scripts]
        for model, script in zip(models, scripts.values(), strict=True):
            model.script = script
        return dict(zip(scripts, run_all(*(partial(func, model) for model in models)), strict=True))


# Requests


def test_request_has_history_prompt_and_options(model):
    bot = create_bot_for(model.url, BOT_SYSTEM_PROMPT="Be kind.", BOT_OPTIONS={"temperature": 0.5, "stop": ["x"]})
    assert collect(bot(HISTORY, user_id=1, conversation_id=2)) == REPLY
    messages = [("system", "Be kind."), ("user", "Hello"), ("assistant", "Hello!"), ("user", "How are you?")]
    messages = [{"role": role, "content": content} for role, content in messages]
    assert model.requests == [
        {"model": "tiny", "stream": True, "temperature": 0.5, "stop": ["x"], "messages": messages}
    ]


@pytest.mark.parametrize(
    ("base_url", "key", "path", "authorization"),
    [
        ("http://localhost:{}/v1", "sk-secret", "/v1/chat/completions", "Bearer sk-secret"),
        ("http://localhost:{}/v1", "", "/v1/chat/completions", None),
        ("http://us%65r:p%40ss@localhost:{}/v1", "sk-secret", "/v1/chat/completions", "Basic dXNlcjpwQHNz"),
        ("http://localhost:{}/?version=2 b", "sk-secret", "/chat/completions?version=2%20b", "Bearer sk-secret"),
    ],
)
def test_request_goes_to_the_base_url_with_its_credentials(model, base_url, key, path, authorization):
    assert ask(model, OPENAI_BASE_URL=base_url.format(model.server_port), OPENAI_API_KEY=key) == REPLY
    assert model.paths == [path]
    assert model.headers[0]["Authorization"] == authorization
    assert model.headers[0]["Host"] == f"localhost:{model.server_port}"


def test_request_has_history_within_limit(model):
    assert ask(model, BOT_HISTORY_CHARS=14) == REPLY
    assert [message["content"] for message in model.requests[0]["messages"]] == ["How are you?"]


@pytest.mark.parametrize(("ending", "count"), [([STOP, DONE], 1), ([STOP, DONE, end], 3)])
def test_replies_reuse_a_connection_until_the_server_closes_it(model, ending, count):
    bot = create_bot_for(model.url)
    model.ending = ending
    for _ in range(3):
        reply = bot(HISTORY)
        assert collect(reply) == REPLY
        reply.cancel()
    assert (model.connection_count, len(model.requests)) == (count, 3)


# Responses


RAW = json.dumps({"choices": [{"delta": {"content": "naïve 🚂"}}]}, ensure_ascii=False).encode()
SPLIT = b'data: {"choices":\r\ndata: [{"delta": {"content": "Hello"}}]}\r\n\r\n'
TEXT_PARTS = [{"type": "text", "text": "Hello"}, {"type": "thinking", "thinking": []}, {"type": "text", "text": "!"}]
THINKING_PARTS = [{"type": "thinking", "text": "Hm"}, {"type": "text", "text": "Yes"}]
NO_TEXT = [
    *({"reasoning_content": "Hm"}, {"reasoning": "Hm", "content": ""}),
    {"tool_calls": [{"function": {"name": "x", "arguments": "y"}}]},
]


@pytest.mark.parametrize(
    ("script", "text"),
    [
        (["Hello", "", " there."], "Hello there."),
        ([b"event: message\nid: 1\nretry: 5\n" + chunk({"content": "Hello"})], "Hello"),
        ([bytes([byte]) for byte in b"data: " + RAW + b"\n\n"], "naïve 🚂"),
        *(([line], "naïve 🚂") for line in (b"data:" + RAW + b"\n\n", b"data: " + RAW + b"\r\n\r\n")),
        ([b"\xef\xbb\xbfdata: " + RAW + b"\n\n"], "naïve 🚂"),
        *(([SPLIT.replace(b"\r", b"")], "Hello"), ([bytes([byte]) for byte in SPLIT], "Hello")),
        ([choice(delta={"content": text}).replace(b"\n", b"\r") for text in "Hi"], "Hi"),
        ([choice(delta={"content": text}).replace(b"\n\n", b"\n") for text in "Hi"], "Hi"),
        ([b'data: {"choices": [{"delta": {"content": "a\xffb"}}]}\n\n'], "a\ufffdb"),
        ([b'data: {"choices": [{"delta": {"content": "a"}, "logprobs": NaN}]}\n\n'], "a"),
        ([b'data: {"choices": [{"delta": {"content": "a\\ud83d"}}]}\n\n'], "a\ud83d"),
        ([chunk({"content": content}) for content in (TEXT_PARTS, ["Good", 5], 5)], "Hello!Good"),
        ([chunk({"content": THINKING_PARTS})], "Yes"),
        ([chunk({"content": {"type": "text", "text": "Hello"}})], "Hello"),
        ([chunk({"refusal": "I cannot "}), chunk({"content": None, "refusal": "help."})], "I cannot help."),
        *(([chunk(delta), "Yes"], "Yes") for delta in NO_TEXT),
        ([event({"choices": [{"index": 1, "delta": {"content": "No"}}, {"index": "0", "delta": {}}]}), "Yes"], "Yes"),
        *(([choice(message={"content": text}) for text in texts], "".join(texts)) for texts in (["ha", "ha"], "Hi")),
        *(
            ([choice(delta=delta, message={"content": text}) for text in "Hi"], "Hi")
            for delta in (None, {}, {"content": ""}, {"role": "assistant"})
        ),
        (["Hi", chunk({"content": "!"}, "stop"), choice(message={"content": "Hi!"})], "Hi!"),
        (["Hello", choice(message={"content": "Hello"}, finish_reason="stop")], "Hello"),
        ([chunk({"content": "Hello"}, ""), chunk({"content": " there"}, "null")], "Hello there"),
        ([chunk({"content": "", "role": "assistant"}, "stop"), chunk({"content": "Hi"}, "stop"), "!"], "Hi!"),
        ([chunk({"content": "Hi"}, "stop"), STOP, chunk({"content": "!"}, "STOP")], "Hi!"),
        (
            [chunk({"reasoning": "Hm"}, "stop"), chunk({"content": "Hi"}, "stop"), chunk({"content": "!"}, "stop")],
            "Hi!",
        ),
        pytest.param(["Hello", "x" * 1_000_000], "Hello" + "x" * 1_000_000, id="long"),
        ([], ""),
    ],
)
def test_response_is_read_as_clients_do(model, script, text):
    model.script = script
    assert ask(model) == (text, None)


WHOLE = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}]}


@pytest.mark.parametrize(
    ("body", "error"),
    [
        *((WHOLE, type(None)), (json.dumps(WHOLE, indent=2).encode(), type(None))),
        (b"\xef\xbb\xbf\r\n" + json.dumps(WHOLE).encode(), type(None)),
        ({"choices": [{"message": {"content": "Hello"}}]}, type(None)),
        ({"choices": [{"message": {"content": "Hello"}, "finish_reason": "length"}]}, BotTruncated),
    ],
)
def test_response_without_streaming_is_read(model, body, error):
    model.refuse = lambda request: (200, body, {})
    text, raised = ask(model)
    assert (text, type(raised)) == ("Hello", error)


LENGTH = chunk({}, "length")
STOPPED = chunk({"content": "Hello"}, "stop")
CRASH = event({"error": {"message": SECRET, "code": 500}})
EXCEEDED = event({"error": {"message": SECRET, "type": "exceed_context_size_error"}})
ENDS = {
    type(None): [
        *(["Hello", STOP, rest] for rest in (cut, end, stall, COMMENTS, CRASH, EXCEEDED)),
        *([STOPPED, rest] for rest in (cut_in_event, stall, COMMENTS)),
        *(["Hello", DONE], ["Hello", DONE, stall], ["Hello", b"data: [DONE]", end]),
    ],
    BotTruncated: [
        *(["Hello", LENGTH, rest] for rest in (DONE, cut, stall, COMMENTS, b"data: {]\n\n")),
        *(["Hello", chunk({}, "content_filter"), cut], [chunk({"content": "Hello"}, "MAX_TOKENS"), DONE]),
        ["Hello", EXCEEDED],
    ],
    BotError: [
        [chunk({"content": "Hel"}, "stop"), chunk({"content": "lo"}, "stop"), cut],
        *(["Hello", rest] for rest in (end, cut, cut_in_event)),
        *(["Hello", choice(index=0, content_filter_results={}), cut], [chunk({"content": "Hello"}, ""), end]),
        *(["Hello", CRASH, DONE], ["Hello", b"<html>", end]),
    ],
}


@pytest.mark.parametrize(("script", "error"), [(script, error) for error in ENDS for script in ENDS[error]])
def test_end_of_reply_is_judged_by_all_signs(model, script, error):
    model.script, model.ending = script, []
    seconds, (text, raised) = measure(ask, model)
    assert (text, type(raised)) == ("Hello", error)
    assert SECRET not in str(raised)
    assert seconds < TIMEOUT / 2


@pytest.mark.parametrize(
    "chunks",
    [
        *([STOPPED, chunk({"content": "!"}, "stop")], [chunk({"role": "assistant"}, "stop"), "Hello!"]),
        *([chunk({"reasoning": "Hm"}, "stop"), "Hello!"], ["Hel", chunk({"content": "lo"}, "stop"), "!"]),
    ],
)
def test_stop_with_a_chunk_leaves_time_for_the_next_one(model, chunks):
    model.script = [*chunks[:-1], lambda handler: time.sleep(0.3), chunks[-1]]
    assert ask(model) == ("Hello!", None)


def test_long_line_ends_response(model):
    model.ending = [b"data: " + b"x" * MAX_EVENT_BYTES, b"x", stall]
    text, error = ask(model)
    assert (text, str(error)) == ("Hello there.", "the model's response is too long")


THINK_TAGS = [
    *("<think> </think>", "<thinking> </thinking>", "<thought> </thought>", "[THINK] [/THINK]", "<Think> </THINK>"),
    *("\u200b<think> </think>", "◁think▷ ◁/think▷", "<thoughts> </thoughts>"),
]


@pytest.mark.parametrize(
    ("script", "text"),
    [
        *(([f"{start}Hm", f"{end}\n", "\n    code"], "    code") for start, end in map(str.split, THINK_TAGS)),
        *((["<think>Hm</think>Yes"], "Yes"), (["\n <think>\nHm", " <b>", "</think>\n", "\nYes", "\n"], "Yes\n")),
        *((list("<think>Hm</think>\n\nYes"), "Yes"), (["<think>a</think> <think>b</think>Yes"], "Yes")),
        *((["<thi", "s>"], "<this>"), (["<th"], "<th"), (["Yes <think>b</think>"], "Yes <think>b</think>")),
        *((["<think>endless"], ""), (["\n", "\n", "Yes"], "Yes"), ([], "")),
    ],
)
def test_thinking_at_the_beginning_is_left_out_and_indentation_stays(script, text):
    texts = list(skip_thinking(script))
    assert "".join(texts).lstrip("\n") == text
    assert len(texts) >= len(script)  # an empty text is a sign of life


# Errors


def get_exception_texts(error):
    """Return all that a traceback of an exception would show of it and its causes."""
    texts = []
    while error:
        texts.append(repr(error))
        error = error.__cause__ or error.__context__
    return "\n".join(texts)


CONTEXT_EXCEEDED = [
    *({"error": {"message": SECRET, "type": "exceed_context_size_error"}}, {"detail": f"context size {SECRET}"}),
    {"error": {"message": SECRET, "code": "model_max_prompt_tokens_exceeded"}},
    {"object": "error", "message": f"This model's maximum context length is 4096 tokens. {SECRET}", "code": 400},
    {"error": f"Cannot truncate prompt with n_keep (9) >= n_ctx (8) {SECRET}"},
    *({"errors": [{"message": f"too many tokens {SECRET}"}]}, {"errors": [], "message": f"too many tokens {SECRET}"}),
    {"error": {"message": "Provider returned error", "metadata": {"raw": f"context length {SECRET}"}}},
    [{"error": {"message": f"too many tokens {SECRET}"}}],
]
CONTEXT_CODE = {"error": {"message": SECRET, "code": "context_length_exceeded"}}
ERRORS = [
    (400, {"error": {"message": SECRET, "type": "invalid_request_error"}}, BotError, "400 invalid_request_error"),
    (400, {"error": {"message": SECRET, "type": SECRET, "code": "sk-secret"}}, BotError, "400,"),
    (400, {"error": {"message": SECRET, "metadata": SECRET}}, BotError, "400,"),
    *((400, body, BotError, "400,") for body in ({"error": {}}, [])),
    (401, {"error": {"message": SECRET + " sk-secret"}}, BotError, "401,"),
    *((404, body, BotError, "404,") for body in ({"error": SECRET}, {"detail": SECRET})),
    pytest.param(404, b"\x00\x1b[31m" + SECRET.encode() * 2_000_000, BotError, "404,", id="long"),
    (404, b"", BotError, "404, 0 bytes"),
    *((422, {"detail": [{"input": "context length " + SECRET}]}, BotError, "422,"), (500, [SECRET], BotError, "500,")),
    (307, b"", BotError, "307,"),
    (500, {"error": {"type": "overloaded_error", "message": SECRET}}, BotBusy, "500 overloaded_error,"),
    *((503, b"Loading model", BotBusy, "503,"), (413, SECRET.encode(), BotMessageTooLong, "413,")),
    *((400, body, BotMessageTooLong, "400") for body in CONTEXT_EXCEEDED),
    *((status, CONTEXT_CODE, BotMessageTooLong, f"{status} context_length") for status in (400, 413, 422, 500)),
    (200, {"error": {"code": 400, "type": "exceed_context_size_error"}}, BotMessageTooLong, "400 exceed_context_size"),
    (200, {"error": {"code": "1261", "message": f"Prompt exceeds max length {SECRET}"}}, BotMessageTooLong, "200,"),
    (200, {"error": {"code": 503, "message": SECRET}}, BotBusy, "503,"),
    (200, [{"error": {"code": 429, "message": SECRET}}], BotBusy, "429,"),
    (200, {"error": {"code": "rate_limit_exceeded", "message": "token limit"}}, BotBusy, "200 rate_limit_exceeded"),
    (200, {"error": {"code": "5021", "message": SECRET}}, BotError, "200,"),
]


@pytest.mark.parametrize(("status", "body", "error", "message"), ERRORS)
def test_error_response_or_redirect_raises_without_its_words(model, status, body, error, message):
    model.refuse = lambda request: (status, body, {"X-Request-Id": SECRET, "Location": f"{model.url}/elsewhere"})
    text, raised = ask(model, [("user", SECRET)])
    assert (text, type(raised), len(model.requests)) == ("", error, 1)
    assert message in str(raised)
    assert len(str(raised)) < 120
    assert SECRET not in get_exception_texts(raised)
    assert "sk-secret" not in get_exception_texts(raised)


def test_connection_that_is_refused_or_no_http_raises_without_words_of_the_server(model):
    model.script = [write_raw(SECRET.encode() + b"\r\n\r\n"), cut]
    for port, cause in ((model.server_port, "BadStatusLine"), (find_free_port(), "ConnectionRefusedError")):
        text, error = ask(model, OPENAI_BASE_URL=f"http://127.0.0.1:{port}/v1")
        assert (text, str(error)) == ("", f"the connection to the model failed: {cause}")
        assert SECRET not in get_exception_texts(error)


@pytest.mark.parametrize("rest", [cut, stall, drip(b" ")])
def test_busy_model_whose_body_is_cut_or_never_ends_raises_busy(model, rest):
    model.script = [write_raw(b"HTTP/1.1 429 Slow Down\r\nContent-Length: 100000\r\nRetry-After: 7\r\n\r\n{"), rest]
    assert ask(model, BOT_TIMEOUT=2)[1].retry_after == 7


LONG_HISTORY = [(sender, f"{number:03}" * 10) for number in range(8) for sender in ("user", "bot")] + [("user", "new")]


@pytest.mark.parametrize(
    ("history", "max_chars", "counts", "error"),
    [
        *((LONG_HISTORY, 483, [17], type(None)), (LONG_HISTORY, 250, [17, 7], type(None))),
        *((LONG_HISTORY, 100, [17, 7, 3], type(None)), (LONG_HISTORY, 3, [17, 7, 3, 1], type(None))),
        (LONG_HISTORY, 2, [17, 7, 3, 1], BotMessageTooLong),
        ([("user", "unanswered"), ("user", "new")], 3, [1, 1], type(None)),
    ],
)
@pytest.mark.parametrize("status", [400, 200])
def test_exceeded_context_is_asked_again_with_half_the_history(model, status, history, max_chars, counts, error):
    def refuse(request):
        if sum(len(message["content"]) for message in request["messages"]) > max_chars:
            return status, {"error": {"code": "context_length_exceeded"}}, {}
        return None

    model.refuse = refuse
    assert type(ask(model, history)[1]) is error
    requested = [request["messages"] for request in model.requests]
    assert [len(messages) for messages in requested] == counts
    assert {messages[0]["role"] for messages in requested} == {"user"}
    assert all(messages[-1]["content"].endswith("new") for messages in requested)


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


def cancel_reply(model):
    """Cancel a reply, which must end without an error, and wait until the connection is closed."""
    reply = create_bot_for(model.url)(HISTORY)
    with run_in_background(lambda: collect(reply)) as [result]:
        wait_until(lambda: model.requests)
        time.sleep(0.2)
        reply.cancel()
        text, error = result.result(TIMEOUT / 2)
    assert error is None
    assert model.wait_for_hang_up()
    return text


@pytest.mark.parametrize("end_reply", [wait_for_timeout, cancel_reply])
def test_silence_is_ended_by_timeout_and_cancel_and_the_connection_closed(end_reply):
    texts = {name: "Hello" if "Hello" in script else "" for name, script in SILENCES.items()}
    assert ask_each(SILENCES, end_reply) == texts


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_unresponsive_server_raises_timeout(scheme):
    with unresponsive_address(scheme) as url:
        assert type(collect(create_bot_for(url, BOT_TIMEOUT=0.5)(HISTORY))[1]) is BotTimeout


SIGNS_OF_LIFE = [
    *({"reasoning_content": "Hm"}, {"reasoning_details": [{"data": "Hm"}]}, {"content": "", "reasoning": "Hm"}),
    *({"content": [{"type": "thinking"}]}, {"content": "x"}),
]


def test_reasoning_and_text_are_signs_of_life():
    scripts = {str(delta): [chunk(delta), lambda handler: time.sleep(0.4)] * 5 for delta in SIGNS_OF_LIFE}
    assert ask_each(scripts, lambda model: ask(model, BOT_TIMEOUT=1.6)[1]) == dict.fromkeys(scripts)


def test_reply_cancelled_before_reading_is_empty(model):
    model.script = [stall]
    reply = create_bot_for(model.url)(HISTORY)
    reply.cancel()
    assert (list(reply), list(reply)) == ([], [])


def test_close_of_unfinished_replies_closes_connections_and_leaves_no_thread(model):
    threads = set(threading.enumerate())
    model.script = ["Hello", stall]
    bot = create_bot_for(model.url)
    replies = [iter(bot(HISTORY)) for _ in range(20)]
    for reply in replies:
        assert next(reply) == "Hello"
        reply.close()
        assert model.wait_for_hang_up()
    wait_until(lambda: set(threading.enumerate()) <= threads)


def test_text_is_yielded_as_it_arrives_and_thinking_as_a_sign_of_life(model):
    proceed = threading.Semaphore(0)
    parts = ["<think>a", "b</think>0 ", "1 ", "2 "]
    model.script = [step for part in parts for step in (part, lambda handler: proceed.acquire())]
    chunks = iter(create_bot_for(model.url)(HISTORY))
    for text in ("", "0 ", "1 ", "2 "):
        assert next(chunks) == text
        proceed.release()
    assert list(chunks) == []


# The environment


@pytest.fixture
def tls_context(tmp_path, monkeypatch):
    """The TLS context of a server on localhost whose certificate SSL_CERT_FILE names."""
    certificate = create_certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


def test_https_with_trusted_certificate_returns_replies_of_one_connection(tls_context):
    with running(ModelServer(tls_context)) as model:
        bot = create_bot_for(model.url)
        assert [collect(bot(HISTORY)), collect(bot(HISTORY))] == [REPLY, REPLY]
        assert model.connection_count == 1


def test_https_with_unknown_certificate_raises(tls_context, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    with running(ModelServer(tls_context)) as model:
        assert str(ask(model)[1]) == "the connection to the model failed: SSLCertVerificationError"


@pytest.mark.parametrize("end_reply", [wait_for_timeout, cancel_reply])
def test_https_silence_and_cancel_end_reply(tls_context, end_reply):
    silences = {name: SILENCES[name] for name in ("before the head", "dripping head", "after text")}
    ask_each(silences, end_reply, tls_context=tls_context)


def test_proxy_of_environment_is_used_for_http(model, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", model.url.replace("localhost", "us%65r:p%40ss@127.0.0.1").removesuffix("/v1"))
    assert ask(model, OPENAI_BASE_URL="http://model.invalid:8080/v1") == REPLY
    assert model.paths == ["http://model.invalid:8080/v1/chat/completions"]
    assert model.headers[0]["Host"] == "model.invalid:8080"
    assert model.headers[0]["Proxy-Authorization"] == "Basic dXNlcjpwQHNz"


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
def test_proxy_of_environment_is_used_for_https(tls_context, monkeypatch, variable):
    with running(ModelServer(tls_context, is_proxy=True)) as proxy:
        monkeypatch.setenv(variable, f"user:pass@127.0.0.1:{proxy.server_port}")
        assert ask(proxy, OPENAI_BASE_URL="https://localhost:1/v1") == REPLY
        assert proxy.paths == ["localhost:1", "/v1/chat/completions"]
        assert [head["Proxy-Authorization"] for head in proxy.headers] == ["Basic dXNlcjpwYXNz", None]


@pytest.mark.parametrize(
    ("host", "no_proxy"),
    [
        *(("localhost", no_proxy) for no_proxy in ("localhost", "*", "example.com, localhost")),
        *(("127.0.0.1", no_proxy) for no_proxy in ("127.0.0.0/8", "10.0.0.0/8, 127.0.0.1/32", "127.0.0.1")),
    ],
)
def test_no_proxy_is_respected(model, monkeypatch, host, no_proxy):
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", no_proxy)
    assert ask(model, OPENAI_BASE_URL=model.url.replace("localhost", host)) == REPLY


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ALL_PROXY", "socks5://user:secret@localhost:1080"),
        *(("HTTPS_PROXY", "http://secret:port"), ("HTTPS_PROXY", "http://")),
    ],
)
def test_app_with_unusable_proxy_raises_config_error_that_names_its_variable(monkeypatch, tmp_path, variable, value):
    monkeypatch.setenv(variable, value)
    database = f"sqlite:///{tmp_path}/chatbot.db"
    with pytest.raises(ConfigError, match=f"^{variable} must be the http:// URL of a proxy$"):
        create_app({"BOT_MODEL": "tiny", "OPENAI_BASE_URL": "https://localhost/v1", "DATABASE_URL": database})


@pytest.mark.parametrize(
    ("variable", "value", "url"),
    [
        ("SSLKEYLOGFILE", "/missing/secret", "https://localhost/v1"),
        ("HTTPS_PROXY", "http://u:%E2%82%AC@proxy:1", "https://localhost/v1"),
        ("UNUSED", "", "http://%E2%82%AC:secret@localhost/v1"),
        ("UNUSED", "", "http://[::1]x/v1"),
    ],
)
def test_app_with_unusable_url_raises_config_error_without_its_password(monkeypatch, tmp_path, variable, value, url):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match="OPENAI_BASE_URL") as raised:
        create_app({"BOT_MODEL": "m", "OPENAI_BASE_URL": url, "DATABASE_URL": f"sqlite:///{tmp_path}/chatbot.db"})
    assert "secret" not in str(raised.value)


def test_certificates_are_needed_for_https_only(model, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", "/missing.pem")
    assert ask(model) == REPLY
