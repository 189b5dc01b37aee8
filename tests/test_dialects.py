"""The dialects of model servers: what may accompany a reply, what says that it failed, and what an error means."""

import socket

import pytest

from app.bot import BotBusy, BotError, BotMessageTooLong, BotRefused, BotTruncated
from tests.helpers.model_server import DONE, ModelServer, choice, chunk, event, running
from tests.test_openai_bot import HISTORY, SECRET, STOP, ask, create_bot_for, unresponsive_address

FAILURES = [
    *(b'error: {"code":500,"message":"x"}\n\n', b'event: error\ndata: {"message":"x"}\n\n', b"event: error\n\n"),
    *(b"Internal Server Error\n\n", b"<html>\n", b"upstream connect error or disconnect: x\n\n", b"event:error\n"),
    *(b"event: error\r\ndata: x\r\n\r\n", b'data: {"message":"x"}\nevent: error\n\n', b"event: error\ndata:\n\n"),
    *(b"event: failure\ndata: {}\n\n", b"event: timeout\ndata: {}\n\n", b'event: exception\ndata: {"x":1}\n\n'),
    *(b"data: Internal Server Error\n\n", b'data: {"cut\n\n', b"data: " + b"[" * 10_000 + b"\n\n"),
    *map(event, ("boom", [], 5, [5], [{"error": "x"}])),
    *(event({"error": error}) for error in ("x", True, ["x"], {"code": 500})),
    *(event({name: "x"}) for name in ("detail", "errors", "message", "FailedReason")),
    *(event({"code": "InternalError", "message": "x"}), event({"object": "error", "message": "x"})),
    *(event({"type": "error"}), event({"status": "error"}), event({"success": False})),
    *(event({"usage": None, "error": "x"}), event({"usage": {}, "detail": "x"})),
    *(event({"choices": [], "usage": {}, "base_resp": {"status_code": 1004}}), event({"choices": [], "code": 500})),
    *(event({"choices": [], "error_code": 5, "error_msg": "x"}), event({"choices": [], "success": False})),
    *(event({"choices": [], **field}) for field in ({"exception": "x"}, {"status": "failed"}, {"event": "error"})),
    *(event({"choices": choices}) for choices in (["x"], "error", {"error": "x"})),
    *(choice(error={"message": "x"}), choice(errors=["x"]), choice(delta={"error": "x"}), choice(message={"error": 1})),
]
HARMLESS = [
    *(b": OPENROUTER PROCESSING\n\n", b":\r\n\r\n", b"\xef\xbb\xbf: x\n\n", b"id: 5\nretry: 3\n\n", b"retry\n\n"),
    *(b'event: ping\ndata: {"type":"ping"}\n\n', b"event: ping\ndata: 2026\n\n", b"event: ping\n\n"),
    *(b"event: heartbeat\ndata: {}\n\n", b"event: keep-alive\ndata:\n\n", b"event: keep-alive\ndata: 2026\n\n"),
    *(b"data: ping\n\n", b"data: keep-alive\n\n", b"data: [PING]\n\n", b"data:\n\n"),
    *(b"event: done\ndata: {}\n\n", b"event: completion\n\n"),
    *map(event, ({}, None, {"ping": ""}, "ping", {"type": "ping"}, {"type": "keep-alive"}, {"event": "ping"})),
    *(event({"choices": choices}) for choices in ([], None, {}, [None])),
    *(choice(delta=None), choice(index=0), choice(message=None), choice(delta={}, error=None)),
    *(choice(index=1, delta={"content": "No"}, finish_reason="stop"), choice(delta={"reasoning": "Hm"})),
    *(event({"usage": {}}), event({"timings": {"x": 1}}), event({"choices": None, "usage": {}})),
    event({"choices": [], "prompt_filter_results": [{"prompt_index": 0}], "id": "", "model": "", "object": ""}),
    *(choice(index=0, content_filter_results={}), event({"object": "chat.completion.chunk", "id": "x", "model": "m"})),
    event({"x_groq": {"id": "x"}, "obfuscation": "x", "choices": [{"index": 0, "delta": {}}]}),
    event({"choices": [{"delta": {}}], "error": None, "errors": [], "code": 0, "message": "ok"}),
    event({"choices": [], "base_resp": {"status_code": 0, "status_msg": ""}, "citations": ["x"]}),
    event({"choices": [], "usage": {}, "status_code": 0, "code": "", "message": ""}),
    event({"choices": [], "code": 200, "message": "OK", "type": "chat.completion.chunk"}),
]


@pytest.fixture
def model():
    with running(ModelServer()) as server:
        yield server


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: ascii(failure)[:80])
def test_failure_after_text_fails_whatever_follows(model, failure):
    model.script, model.ending = ["Hello", failure], [DONE]
    text, error = ask(model)
    assert text == "Hello"
    assert isinstance(error, BotError)


@pytest.mark.parametrize("harmless", HARMLESS, ids=ascii)
def test_harmless_event_fails_no_reply(model, harmless):
    model.script, model.ending = [harmless, "Hello", harmless], [STOP, harmless, DONE]
    assert ask(model) == ("Hello", None)


FINISH_REASONS = {
    type(None): [
        *("stop", "STOP", "FinishReason.STOP", "eos", "end_turn", "COMPLETE", "stop_sequence", ""),
        *("stop-sequence", "EndTurn", "StopReason.END_TURN", "<|im_end|>", "stopped"),
    ],
    BotTruncated: [
        *("MALFORMED_FUNCTION_CALL", "max_output_tokens", "max_length", "time_limit", "content_filtered", "refusal"),
        *("cancelled", "timeout", "incomplete", "repetition_truncation", "tool_calls", "anything", "MAX_TOKENS"),
        *("length", "model_length", "model_context_window_exceeded", "sensitive", "PROHIBITED_CONTENT", "blocklist"),
        *("SPII", "content_filter: RECITATION", {"reason": "length"}),
    ],
    BotError: ["error", "error_finish", "abort", "network_error"],
}
NATIVE_REASONS = {
    **{"<|im_end|>": type(None), "MAX_TOKENS": BotTruncated, "PROHIBITED_CONTENT": BotTruncated},
    **{"network_error": BotError, "insufficient_system_resource": BotError},
}


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        *(({"finish_reason": reason}, error) for error, reasons in FINISH_REASONS.items() for reason in reasons),
        *(({"finish_reason": "stop", "native_finish_reason": name}, error) for name, error in NATIVE_REASONS.items()),
        ({"done_reason": "length"}, BotTruncated),
    ],
    ids=str,
)
def test_only_natural_finish_reason_is_complete(model, fields, error):
    model.ending = [choice(delta={}, **fields), DONE]
    text, raised = ask(model)
    assert (text, type(raised)) == ("Hello there.", error)


BUSY = [
    *({"code": 429}, {"code": "429"}, {"status_code": 503}, {"type": "overloaded_error"}),
    *({"code": "rate_limit_exceeded"}, {"status": "RESOURCE_EXHAUSTED"}),
]


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (b'error: {"message": "the request exceeds the available context size", "code": 400}\n\n', BotMessageTooLong),
        (b'error: {"code": 503, "message": "Loading model"}\n\n', BotBusy),
        (b'event: error\ndata: {"error": {"type": "overloaded_error", "message": "x"}}\n\n', BotBusy),
        (choice(delta={}, error={"code": 429, "message": "x"}), BotBusy),
        *((event({"error": {"message": SECRET, **fields}}), BotBusy) for fields in BUSY),
        (chunk({}, "content_filter"), BotRefused),
        (chunk({}, "tool_calls"), BotTruncated),
        *((failure, BotError) for failure in (DONE, b"event: error\n\n", event({"error": SECRET}))),
        (event({"object": "error", "message": SECRET, "code": 400}), BotError),
    ],
    ids=ascii,
)
def test_failure_before_text_is_that_of_an_error_response(model, failure, error):
    model.script, model.ending = [failure], [DONE]
    text, raised = ask(model)
    assert (text, type(raised)) == ("", error)
    assert SECRET not in str(raised)


CONTEXT_OF_9 = "This model's maximum context length is 9 tokens."
CONTEXT_EXCEEDED = [
    *(CONTEXT_OF_9, "litellm.ContextWindowExceededError: x", "too many tokens", "the context size is exceeded"),
    *("prompt is too long: 9 tokens > 8 maximum", "Range of input length should be [1, 8]"),
    *("The decoder prompt (length 9) is longer than the maximum model length of 8.", "Prompt exceeds max length"),
    *("This model's maximum prompt length is 8 but the request contains 9 tokens.", "Too large for model x"),
    *("Your request exceeded model token limit: 8", "Requested tokens (9) exceed context window of 8"),
    *("prompt token count of 9 exceeds the limit of 8", "Prompt length 9 is greater than max_seq_len 8"),
    *("`inputs` must have less than 8 tokens. Given: 9", "`inputs` tokens + `max_new_tokens` must be <= 8"),
    *("Cannot truncate prompt with n_keep (9) >= n_ctx (8)", "max_tokens must be at least 1, got -1."),
    *("Input length 9 exceeds the maximum length 8", "the number of input tokens 9 cannot exceed 8"),
    *("the input token count is 9 but model only supports up to 8.", "exceeds the maximum number of tokens allowed"),
    f"{CONTEXT_OF_9} However, you requested 59 tokens (51 in the messages, 8 in the completion)",
    "'max_tokens' is too large: 5. Context length is 9, with 8 tokens (5 > 9 - 8)",
]
WORDS = {
    BotMessageTooLong: [(429, "Request too large for tiny"), *((400, words) for words in CONTEXT_EXCEEDED)],
    BotRefused: [
        (400, "filtered due to the prompt triggering Azure OpenAI's content management policy"),
        *((400, "Content Exists Risk"), (403, "Input was flagged"), (451, "Content filtered")),
        (400, "The content violates our usage policies"),
    ],
    BotBusy: [
        (429, "Rate limit reached: Limit 200. Increase it by adding a payment method"),
        *((500, "server busy, please try again.  maximum pending requests exceeded"), (500, "no slot available")),
        *((500, "ThrottlingException: Too many tokens, please wait"), (200, "429: Too many tokens, please wait")),
    ],
    BotError: [
        (400, "max_tokens is too large: 5. This model supports at most 4 completion tokens"),
        (400, "Invalid max_tokens value, the valid range of max_tokens is [1, 8192]"),
        (400, "`max_tokens` must be less than or equal to `9`: less than the `context_window`"),
        (400, f"'max_tokens' or 'max_completion_tokens' is too large: 5000. {CONTEXT_OF_9}"),
        (400, f"{CONTEXT_OF_9} However, you requested 59 tokens (9 in the messages, 50 in the completion)"),
        (400, f"{CONTEXT_OF_9} You requested about 59 tokens (10 of text input, 49 in the output)"),
        *((422, "`max_new_tokens` must be <= 1024"), (401, "context length"), (402, "Insufficient credits")),
        (429, "You exceeded your current quota, please check your plan and billing details."),
        *((429, "Insufficient account balance"), (429, "Budget has been exceeded")),
        *((400, "Invalid value for 'safety_settings'"), (400, "Unrecognized request argument supplied: moderation")),
        (403, "This API key is prohibited from use in this country"),
    ],
}


@pytest.mark.parametrize(
    ("status", "message", "error"), [(*answer, error) for error, answers in WORDS.items() for answer in answers]
)
def test_error_response_is_judged_by_its_words(model, status, message, error):
    model.refuse = lambda request: (status, {"error": {"message": f"{message} {SECRET}"}}, {})
    text, raised = ask(model)
    assert (text, type(raised)) == ("", error)
    assert SECRET not in str(raised)


HTTP_DATES = {
    **{"Mon, 99 Foo 2026": 5, "Fri, 31 Dec 1999 23:59:59 GMT": 1, "Fri, 31 Dec 2150 23:59:59 GMT": 3600},
    "Fri, 31 Dec 99999999999999 23:59:59 GMT": 5,
}
RETRY_AFTER = {"7": 7, " 7 ": 7, "1.2": 2, "0": 1, "99999999": 3600, "9" * 30: 5, "-1": 5, "nan": 5, "": 5, "34s": 34}
FIELDS = {"retry_after": 34, "retry_after_ms": 34000, "retry_after_seconds": 34, "retryAfter": 34, "retry-after": 34}
DELAYS = {
    **{"try again in 34s": 34, "retry in 33.07s": 34, "retry after 34 seconds": 34, "wait for 34 s": 34},
    **{"retry after: 34s": 34, "available in 34 seconds": 34, "try again in 1m2.5s": 63, "wait 63 seconds": 63},
    **{"try again in 500ms": 1, "try again in 1 minute and 30 seconds": 90},
}


@pytest.mark.parametrize(
    ("body", "headers", "seconds"),
    [
        ({"message": "You exceeded your current quota", "details": [{"retryDelay": "34s"}]}, {}, 34),
        *(({"message": text}, {}, seconds) for text, seconds in DELAYS.items()),
        *(({name: value}, {}, 34) for name, value in FIELDS.items()),
        ({}, {"Retry-After-Ms": "33500"}, 34),
        ({}, {"X-Ms-Retry-After-Ms": "34000", "Retry-After": "5"}, 34),
        *(({}, {"Retry-After": value}, seconds) for value, seconds in {**RETRY_AFTER, **HTTP_DATES}.items()),
    ],
    ids=str,
)
def test_delay_of_busy_model_is_read_and_bounded(model, body, headers, seconds):
    model.refuse = lambda request: (429, {"error": body}, headers)
    assert ask(model)[1].retry_after == seconds


def test_second_address_is_tried_if_the_first_is_silent(model, monkeypatch):
    with unresponsive_address("http") as url:
        ports = [int(url.removesuffix("/v1").rpartition(":")[2]), model.server_port]
        addresses = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)) for port in ports]
        monkeypatch.setattr("socket.getaddrinfo", lambda *args, **options: addresses)
        assert ask(model, BOT_TIMEOUT=6) == ("Hello there.", None)


@pytest.mark.parametrize(
    ("script", "title"),
    [
        *((["Trains in ", "Spain"], "Trains in Spain"), (["# Title: Trains."], "Trains")),
        (['<think>Hm</think>\n**"Trains"**\nMore'], "Trains"),
    ],
)
def test_title_is_one_plain_short_line(model, script, title):
    model.script = script
    assert create_bot_for(model.url).create_title(HISTORY[:2]) == title


@pytest.mark.parametrize("script", [[], ["\u200b"], ["***"], ["<think>endless"]])
def test_unusable_title_raises(model, script):
    model.script = script
    with pytest.raises(BotError):
        create_bot_for(model.url).create_title(HISTORY[:2])
