"""The wire format of OpenAI's chat completions, in the variants that model servers send. No input or output here."""

import json
import math
import re
import time
from email.utils import mktime_tz, parsedate_tz

import orjson

from app.bot import BotBusy, BotError, BotTruncated

MAX_LINE_BYTES = 2_000_000
MAX_RESPONSE_BYTES = 64_000_000
DEFAULT_RETRY_AFTER, MAX_RETRY_AFTER = 5, 3600  # seconds
BUSY_STATUSES = {429, 503, 529}
CONTEXT_STATUSES = {200, 400, 413, 422, 500}
CONTEXT_EXCEEDED = re.compile(
    r"context.?(length|size|window)|(prompt|input) is too long|reduce the length|too many tokens|max_new_tokens"
    r"|context the overflows|too large for model",
    re.IGNORECASE,
)
ERROR_KIND = re.compile(r"(?=.{1,40}$)([A-Za-z]+(_[A-Za-z]+)+|[A-Za-z]*(Error|Exception))")
UNFINISHED = {"", "null", "none"}
TRUNCATED = {
    *("length", "max_tokens", "model_length", "insufficient_system_resource"),
    *("content_filter", "safety", "recitation"),
}
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
THINK_START, THINK_END = "<think>", "</think>"


class ContextExceeded(BotError):
    """The messages do not fit the model's context."""


def iter_lines(blocks):
    """Yield the lines of a response without their line ends. Raises BotError if it is too long."""
    tail, total = b"", 0
    for block in blocks:
        total += len(block)
        *lines, tail = (tail + block).split(b"\n")
        if len(tail) > MAX_LINE_BYTES or total > MAX_RESPONSE_BYTES:
            raise BotError("the model's response is too long")
        for line in lines:
            yield line.rstrip(b"\r")
    if tail:
        yield tail.rstrip(b"\r")


def iter_events(blocks):
    """Yield the data of each server-sent event of a response, or its whole body if it is a JSON object."""
    lines = iter_lines(blocks)
    event = []
    for line in lines:
        line = line.removeprefix(BYTE_ORDER_MARK)
        if line.startswith(b"data:"):
            event.append(line[5:].strip())
        elif not line and event:
            yield b"\n".join(event)
            event = []
        elif line.lstrip().startswith(b"{"):  # the server ignored "stream": true
            event = [line, *lines]
    if event:
        yield b"\n".join(event)


def parse_json(data):
    """Return the value of a JSON document. Raises BotError, without a word of the document."""
    try:
        return orjson.loads(data)
    except ValueError:
        pass  # orjson refuses what some servers send: lone surrogates, NaN and invalid UTF-8
    try:
        return json.loads(data.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        pass  # the exception contains the document
    raise BotError(f"the model sent invalid JSON, {len(data)} bytes")


def parse_chunk(data):
    """Return the text of a chunk, whether it contains reasoning, and its finish reason or None.

    A whole completion, as servers send that cannot stream, is read like a chunk. Raises BotError for an error object.
    """
    chunk = parse_json(data)
    if not isinstance(chunk, dict):
        raise BotError("the model sent a chunk that is no object")
    if chunk.get("error") or chunk.get("object") == "error":
        raise parse_error(200, data)
    choices = chunk.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict) or choice.get("index") not in (0, None):
        return "", False, None
    is_whole = "delta" not in choice
    delta = choice.get("message" if is_whole else "delta")
    if not isinstance(delta, dict):
        delta = {}
    text = parse_text(delta.get("content")) + parse_text(delta.get("refusal"))
    reasoning = delta.get("reasoning_content") or delta.get("reasoning")
    if not text and delta.get("content"):
        reasoning = True  # a list of parts that have no text
    return text, bool(reasoning), parse_finish_reason(choice.get("finish_reason")) or ("stop" if is_whole else None)


def parse_text(content):
    """Return a message's content as a string; it may also be a list of parts, or null."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    texts = [part.get("text") if isinstance(part, dict) else part for part in content]
    return "".join(text for text in texts if isinstance(text, str))


def parse_finish_reason(reason):
    """Return a finish reason in lower case, or None while the reply is unfinished."""
    reason = str(reason or "").lower()
    return None if reason in UNFINISHED else reason


def check_end(finish_reason, has_text, is_done):
    """Raise BotError or BotTruncated unless the reply is complete; `is_done` is whether `[DONE]` was received."""
    if finish_reason in TRUNCATED:
        raise BotTruncated(f"the model ended the reply: {finish_reason}")
    if finish_reason == "error" or not (finish_reason or (is_done and has_text)):
        raise BotError("the model broke off")


def skip_thinking(texts):
    """Yield the texts of a reply without white space and `<think>` blocks at its beginning.

    An empty string is yielded for each text that is left out, as a sign that the model works.
    """
    texts = iter(texts)
    buffer, next_tag = "", THINK_START
    for text in texts:
        buffer, next_tag = skip_think_tags(buffer + text, next_tag)
        if next_tag == THINK_START and not THINK_START.startswith(buffer):
            break
        yield ""
    if next_tag == THINK_START:
        yield buffer
    yield from texts


def skip_think_tags(buffer, next_tag):
    """Return the buffer without white space and thinking at its beginning, and the tag that may come next."""
    while True:
        if next_tag == THINK_START:
            buffer = buffer.lstrip()
            if not buffer.startswith(THINK_START):
                return buffer, THINK_START
            buffer, next_tag = buffer.removeprefix(THINK_START), THINK_END
        before, tag, after = buffer.partition(THINK_END)
        if not tag:
            return before[1 - len(THINK_END) :], THINK_END  # what may be the first half of the tag
        buffer, next_tag = after, THINK_START


def parse_error(status, body, retry_after=None):
    """Return the BotError for an error response. Its message has the status, kind and length, but no word of it."""
    try:
        document = parse_json(body)
    except BotError:
        document = body.decode("utf-8", "replace")
    error = document.get("error", document) if isinstance(document, dict) else document
    fields = error if isinstance(error, dict) else {"message": error}
    code, kind, message = (str(fields.get(name) or "") for name in ("code", "type", "message"))
    if status == 200 and code.isdecimal():
        status = int(code[:3])
    kinds = [word for word in (code, kind) if ERROR_KIND.fullmatch(word)]
    summary = f"the model answered {' '.join([str(status), *kinds])}, {len(body)} bytes"
    if status == 413 or (status in CONTEXT_STATUSES and CONTEXT_EXCEEDED.search(f"{code} {kind} {message}")):
        return ContextExceeded(summary)
    if status in BUSY_STATUSES:
        return BotBusy(summary, parse_retry_after(retry_after))
    return BotError(summary)


def parse_retry_after(value):
    """Return the seconds of a Retry-After header, which is a number or a date, within sensible bounds."""
    value = (value or "").strip()
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]*)?", value):
        seconds = float(value)
    else:
        try:
            seconds = mktime_tz(parsedate_tz(value)) - time.time()
        except (TypeError, ValueError, OverflowError):
            return DEFAULT_RETRY_AFTER
    return min(max(math.ceil(seconds), 1), MAX_RETRY_AFTER)
