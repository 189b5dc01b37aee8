"""The dialects of model servers: what may accompany a reply, what says that it failed, and what an error means."""

import socket

import pytest

from app.bot import BotBusy, BotError, BotMessageTooLong, BotRefused, BotTruncated
from tests.helpers.model_server import DONE, ModelServer, chunk, event, running
from tests.test_openai_bot import ask, create_model_bot, unresponsive_address

STOP = chunk({}, "stop")
FAILURES = [
    b'error: {"code":500,"message":"x"}\n\n',
    b'event: error\ndata: {"message":"x"}\n\n',
    b"event: error\n\n",
    event({"detail": "x"}),
    event({"errors": [{"message": "x"}]}),
    event({"code": "InternalError", "message": "x"}),
    event({"type": "error"}),
    event({"choices": [{"index": 0, "delta": {}, "error": {"message": "x"}}]}),
    event({"choices": [{"delta": {"error": "x"}}]}),
    event({"message": "x"}),
    event({"status": "error"}),
    event({"success": False}),
    event({"base_resp": {"status_code": 1004, "status_msg": "x"}, "choices": None}),
    event("boom"),
    event([]),
    event([{"error": "x"}]),
    event(5),
    b"Internal Server Error\n\n",
    b"<html>\n",
    b"upstream connect error or disconnect: x\n\n",
    b"Error: x\n\n",
    b"event: error\r\ndata: x\r\n\r\n",
    b'data: {"message":"x"}\nevent: error\n\n',
    event({"choices": [], "code": 500}),
    event({"choices": ["x"]}),
    event({"error": True}),
    event({"error": ["x"]}),
    b'event: exception\ndata: {"x":1}\n\n',
    b"data: Internal Server Error\n\n",
    event({"object": "error", "message": "x"}),
    event({"usage": None, "error": "x"}),
    event({"usage": {}, "detail": "x"}),
    event({"choices": [], "error_code": 336000, "error_msg": "x"}),
    b"event: failure\ndata: {}\n\n",
    event({"choices": [{"finish_reason": "error", "delta": {}}]}),
    event({"choices": [], "usage": {}, "base_resp": {"status_code": 1004}}),
    event({"choices": [{"delta": {"content": ""}}], "type": "error"}),
    b"event: error\ndata:\n\n",
    b"event:error\n",
    event({"object": "chat.completion.chunk", "choices": [], "exception": "x"}),
    event({"FailedReason": "x"}),
    event({"choices": [], "message": {"x": 1}}),
    event({"choices": [], "status": "failed"}),
    event({"choices": [], "success": False}),
    event({"choices": [], "event": "error"}),
    event({"choices": "error"}),
    event({"choices": {"error": "x"}}),
    event({"choices": [{"errors": ["x"], "delta": {}}]}),
    event({"choices": [{"message": {"error": "x"}}]}),
    b"event: timeout\ndata: {}\n\n",
    b"event: error\ndata: overloaded\n\n",
]
HARMLESS = [
    b": ping\n\n",
    b": OPENROUTER PROCESSING\n\n",
    event({"type": "ping"}),
    b'event: ping\ndata: {"type":"ping"}\n\n',
    b"event: ping\ndata: 2026\n\n",
    b"event: ping\n\n",
    b"data:\n\n",
    b"data: null\n\n",
    event({"choices": [], "prompt_filter_results": [{"prompt_index": 0}], "id": "", "model": "", "object": ""}),
    event({"choices": [], "usage": {"total_tokens": 3}}),
    event({"choices": [], "timings": {"x": 1}}),
    event({"timings": {"x": 1}}),
    event({"usage": {}}),
    event({"x_groq": {"id": "x"}, "choices": [{"index": 0, "delta": {}}]}),
    event({"choices": [{"index": 0, "content_filter_results": {}, "content_filter_offsets": {}}]}),
    event({"obfuscation": "x", "choices": [{"delta": {}}]}),
    b"id: 5\nretry: 3\n\n",
    b"retry\n\n",
    b"event: done\ndata: {}\n\n",
    event({"choices": None, "usage": {}}),
    event({"object": "chat.completion.chunk", "id": "x", "model": "m"}),
    b":\r\n\r\n",
    event({"choices": [{"delta": {}}], "error": None, "code": 0, "message": "ok"}),
    event({"choices": [{"delta": {"role": "assistant", "content": None}, "logprobs": None}], "service_tier": "x"}),
    b"event: heartbeat\ndata: {}\n\n",
    b"data: ping\n\n",
    b"event: keep-alive\ndata:\n\n",
    event({"choices": [{"delta": {}, "error": None}], "errors": []}),
    event({"choices": [], "base_resp": {"status_code": 0, "status_msg": ""}, "usage": {}}),
    b"\xef\xbb\xbf: x\n\n",
    b"event: completion\n\n",
    event({"choices": [], "citations": ["x"]}),
    event({"choices": [], "usage": {}, "status_code": 0, "code": "", "message": ""}),
    event({"choices": [], "usage": {}, "code": 0, "message": "success"}),
    event({"choices": [], "code": 200, "message": "OK", "usage": {}}),
    event({"type": "chat.completion.chunk", "choices": [], "usage": {}}),
    event({"event": "ping"}),
    b"event: keep-alive\ndata: 2026\n\n",
    b"data: keep-alive\n\n",
    b"data: [PING]\n\n",
    event("ping"),
    event({"type": "keep-alive"}),
]


@pytest.fixture
def model():
    with running(ModelServer()) as server:
        yield server


@pytest.mark.parametrize("failure", FAILURES, ids=ascii)
def test_failure_after_text_fails_whatever_follows(model, failure):
    model.script, model.ending = ["Hello", failure], [DONE]
    text, error = ask(model)
    assert text == "Hello"
    assert isinstance(error, BotError)


@pytest.mark.parametrize("harmless", HARMLESS, ids=ascii)
def test_harmless_event_fails_no_reply(model, harmless):
    model.script, model.ending = [harmless, "Hello", harmless], [STOP, harmless, DONE]
    assert ask(model) == ("Hello", None)


NATURAL = [
    *("stop", "STOP", "FinishReason.STOP", "eos", "end_turn", "COMPLETE", "stop_sequence", ""),
    *("stop-sequence", "EndTurn", "StopReason.END_TURN", "<|im_end|>", "stopped"),
]
CUT = [
    *("MALFORMED_FUNCTION_CALL", "max_output_tokens", "max_length", "time_limit", "content_filtered", "refusal"),
    *("cancelled", "timeout", "incomplete", "repetition_truncation", "tool_calls", "anything"),
]


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        *(({"finish_reason": reason}, type(None)) for reason in NATURAL),
        *(({"finish_reason": reason}, BotTruncated) for reason in CUT),
        ({"finish_reason": "stop", "native_finish_reason": "network_error"}, BotError),
        ({"finish_reason": "stop", "native_finish_reason": "insufficient_system_resource"}, BotError),
        ({"finish_reason": "stop", "native_finish_reason": "MAX_TOKENS"}, BotTruncated),
        ({"finish_reason": "stop", "native_finish_reason": "PROHIBITED_CONTENT"}, BotTruncated),
        ({"finish_reason": {"reason": "length"}}, BotTruncated),
        ({"done_reason": "length"}, BotTruncated),
        ({"finish_reason": "stop", "native_finish_reason": "<|im_end|>"}, type(None)),
    ],
    ids=str,
)
def test_only_natural_finish_reason_is_complete(model, fields, error):
    model.ending = [event({"choices": [{"delta": {}, **fields}]}), DONE]
    text, raised = ask(model)
    assert (text, type(raised)) == ("Hello there.", error)


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (b'error: {"message": "the request exceeds the available context size", "code": 400}\n\n', BotMessageTooLong),
        (b'error: {"code": 503, "message": "Loading model"}\n\n', BotBusy),
        (b'event: error\ndata: {"error": {"type": "overloaded_error", "message": "x"}}\n\n', BotBusy),
        (event({"choices": [{"delta": {}, "error": {"code": 429, "message": "x"}}]}), BotBusy),
        (chunk({}, "content_filter"), BotRefused),
        (b"event: error\n\n", BotError),
        (event({"code": "InternalError", "message": "x"}), BotError),
    ],
    ids=ascii,
)
def test_failure_before_text_is_that_of_an_error_response(model, failure, error):
    model.script, model.ending = [failure], [DONE]
    text, raised = ask(model)
    assert (text, type(raised)) == ("", error)


CONTEXT_OF_9 = "This model's maximum context length is 9 tokens."


@pytest.mark.parametrize(
    ("status", "message", "error"),
    [
        (400, "max_tokens is too large: 5. This model supports at most 4 completion tokens", BotError),
        (400, "Invalid max_tokens value, the valid range of max_tokens is [1, 8192]", BotError),
        (400, "`max_tokens` must be less than or equal to `9`: less than the `context_window`", BotError),
        (400, f"'max_tokens' or 'max_completion_tokens' is too large: 5000. {CONTEXT_OF_9}", BotError),
        (400, f"{CONTEXT_OF_9} However, you requested 59 tokens (9 in the messages, 50 in the completion)", BotError),
        (
            400,
            f"{CONTEXT_OF_9} However, you requested 59 tokens (51 in the messages, 8 in the completion)",
            BotMessageTooLong,
        ),
        (422, "`max_new_tokens` must be <= 1024", BotError),
        (402, "Insufficient credits", BotError),
        (429, "You exceeded your current quota, please check your plan and billing details.", BotError),
        (400, "filtered due to the prompt triggering Azure OpenAI's content management policy", BotRefused),
        (400, "Content Exists Risk", BotRefused),
        (403, "Input was flagged", BotRefused),
        (400, "The content violates our usage policies", BotRefused),
        (451, "Content filtered", BotRefused),
        (400, "Invalid value for 'safety_settings'", BotError),
        (400, "Unrecognized request argument supplied: moderation", BotError),
        (403, "This API key is prohibited from use in this country", BotError),
        (400, f"{CONTEXT_OF_9} You requested about 59 tokens (10 of text input, 49 in the output)", BotError),
        (
            400,
            "'max_tokens' is too large: 5. Context length is 9, with 8 tokens (5 > 9 - 8)",
            BotMessageTooLong,
        ),
        (429, "Insufficient account balance", BotError),
        (429, "Budget has been exceeded", BotError),
        (429, "Rate limit reached: Limit 200. Increase it by adding a payment method", BotBusy),
        (500, "server busy, please try again.  maximum pending requests exceeded", BotBusy),
    ],
)
def test_error_response_is_judged_by_its_words(model, status, message, error):
    model.refuse = lambda request: (status, {"error": {"message": message}}, {})
    assert type(ask(model)[1]) is error


@pytest.mark.parametrize(
    ("body", "headers", "seconds"),
    [
        ({"message": "You exceeded your current quota", "details": [{"retryDelay": "34s"}]}, {}, 34),
        *(({"message": text}, {}, 34) for text in ("try again in 34s", "retry in 33.07s", "retry after 34 seconds")),
        *(({"message": text}, {}, 63) for text in ("try again in 1m2.5s", "wait 63 seconds")),
        ({"message": "try again in 500ms"}, {}, 1),
        *(({name: value}, {}, 34) for name, value in {"retry_after": 34, "retry_after_ms": 34000}.items()),
        ({}, {"Retry-After-Ms": "33500"}, 34),
        ({}, {"X-Ms-Retry-After-Ms": "34000", "Retry-After": "5"}, 34),
        ({}, {"Retry-After": "34s"}, 34),
        ({}, {"Retry-After": "soon"}, 5),
        *(({"message": text}, {}, 34) for text in ("wait for 34 s", "retry after: 34s", "available in 34 seconds")),
        ({"message": "try again in 1 minute and 30 seconds"}, {}, 90),
        *(({name: 34}, {}, 34) for name in ("retry_after_seconds", "retryAfter", "retry-after")),
    ],
    ids=str,
)
def test_delay_of_busy_model_is_read(model, body, headers, seconds):
    model.refuse = lambda request: (429, {"error": body}, headers)
    assert ask(model)[1].retry_after == seconds


@pytest.mark.parametrize("texts", [["ha", "ha", "!"], ["Hel", "lo"]])
def test_parts_in_message_are_all_kept(model, texts):
    model.script = [event({"choices": [{"message": {"content": text}}]}) for text in texts]
    assert ask(model) == ("".join(texts), None)


@pytest.mark.parametrize(
    "tags",
    [
        *("<think> </think>", "<thinking> </thinking>", "<thought> </thought>", "[THINK] [/THINK]", "<Think> </THINK>"),
        *("\u200b<think> </think>", "◁think▷ ◁/think▷", "<thoughts> </thoughts>"),
    ],
)
def test_thinking_is_left_out_and_indentation_stays(model, tags):
    start, end = tags.split()
    model.script = [f"{start}Hm", f"{end}\n", "\n    code", "\n    more"]
    text, error = ask(model)
    assert (text.lstrip("\n"), error) == ("    code\n    more", None)


def test_thinking_parts_are_no_text(model):
    parts = [{"type": "thinking", "text": "Hm"}, {"type": "text", "text": "Hello"}]
    model.script = [event({"choices": [{"delta": {"content": parts}}]})]
    assert ask(model) == ("Hello", None)


@pytest.mark.parametrize("delta", [{}, {"content": ""}, {"role": "assistant"}])
def test_message_beside_an_empty_delta_is_kept(model, delta):
    model.script = [event({"choices": [{"delta": delta, "message": {"content": text}}]}) for text in ("Hel", "lo")]
    assert ask(model) == ("Hello", None)


@pytest.mark.parametrize("no_proxy", ["127.0.0.0/8", "10.0.0.0/8, 127.0.0.1/32", "127.0.0.1"])
def test_no_proxy_may_be_a_network(model, monkeypatch, no_proxy):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", no_proxy)
    bot = create_model_bot(model, OPENAI_BASE_URL=model.url.replace("localhost", "127.0.0.1"))
    assert "".join(bot([("user", "Hello")])) == "Hello there."


def test_second_address_is_tried_if_the_first_is_silent(model, monkeypatch):
    with unresponsive_address("http") as url:
        silent_port = int(url.removesuffix("/v1").rpartition(":")[2])
        addresses = [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))
            for port in (silent_port, model.server_port)
        ]
        monkeypatch.setattr("socket.getaddrinfo", lambda *args, **options: addresses)
        assert ask(model, BOT_TIMEOUT=6) == ("Hello there.", None)


@pytest.mark.parametrize(
    ("script", "title"),
    [
        (["Trains in Spain"], "Trains in Spain"),
        (['<think>Hm</think>\n**"Trains"**\nMore'], "Trains"),
        (["# Title: Trains."], "Trains"),
    ],
)
def test_title_is_one_plain_short_line(model, script, title):
    model.script = script
    assert create_model_bot(model).create_title([("user", "Hello"), ("bot", "Hi")]) == title


@pytest.mark.parametrize("script", [[], ["\u200b"], ["***"], ["<think>endless"]])
def test_unusable_title_raises(model, script):
    model.script = script
    with pytest.raises(BotError):
        create_model_bot(model).create_title([("user", "Hello"), ("bot", "Hi")])
