"""The wire format of OpenAI's chat completions, in the variants that model servers send. No input or output here."""

import json
import math
import re
import time
from email.utils import mktime_tz, parsedate_tz
from typing import NamedTuple

import orjson

from app.bot import BotBusy, BotError, BotTruncated

MAX_LINE_BYTES = 2_000_000
MAX_RESPONSE_BYTES = 64_000_000
DEFAULT_RETRY_AFTER, MAX_RETRY_AFTER = 5, 3600  # seconds
BUSY_STATUSES = {429, 503, 529}
KIND_STATUSES = {200, 500, 502}  # with these, the kind of the error tells whether the model is busy
BUSY_KIND = re.compile(r"rate.?limit|overload|too.?many.?requests|exhausted|unavailable|throttl", re.IGNORECASE)
CONTEXT_STATUSES = {200, 400, 422, 500}
CONTEXT_EXCEEDED = re.compile(
    r"context.?(length|size|window|limit)|context the overflows|n_keep|(prompt|input) is too long|too large for model"
    r"|too many tokens(?!, please wait)|tokens? limit|maximum number of tokens|must have less than \d+ tokens"
    r"|max_new_tokens|max_tokens must be at least 1, got -|max(imum)?.?(model|prompt|input|seq).?(len|tokens)"
    r"|exceeds max length|reduce the length|input length|(prompt|input) token count|number of input tokens",
    re.IGNORECASE,
)
REQUEST_TOO_LARGE = re.compile("request too large", re.IGNORECASE)  # for the limit of a minute: no retry succeeds
ERROR_STATUS = re.compile(r"[45][0-9][0-9](?=: |$)")
ERROR_KIND = re.compile(r"(?=.{1,40}$)([A-Za-z]+(_[A-Za-z]+)+|[A-Za-z]*(Error|Exception))")
UNFINISHED_REASONS = {"", "null", "none"}
TRUNCATED_REASONS = {
    *("length", "max_tokens", "model_length", "model_context_window_exceeded", "insufficient_system_resource"),
    *("content_filter", "safety", "recitation", "prohibited_content", "blocklist", "spii", "sensitive"),
}
ERROR_REASONS = {"error", "error_finish", "abort", "network_error"}
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
THINK_START, THINK_END = "<think>", "</think>"
SIGNS_OF_LIFE = ("reasoning_content", "reasoning", "reasoning_details", "content")  # fields of a chunk without a text


class ContextExceeded(BotError):
    """The messages do not fit the model's context."""


class Chunk(NamedTuple):
    """A part of a reply."""

    text: str = ""
    is_working: bool = False  # without a text: the model is reasoning
    finish_reason: str | None = None
    is_whole: bool = False  # the text is the whole reply


class Completion:
    """What has been received of a reply, as far as it tells how the reply ends."""

    def __init__(self):
        self.finish_reason = None
        self.has_text = False
        self.is_over = False  # nothing will follow
        self.is_done = False  # `[DONE]` was received
        # Some servers send a finish reason with every chunk.
        self.is_continued = False  # more followed it
        self.may_continue = False  # it came with the first text

    @property
    def is_finished(self):
        """Whether the reply is whole although the server may leave the connection open."""
        return bool(self.finish_reason) and self.has_text and not self.is_continued

    def receive(self, data):
        """Return the text of an event, an empty one for reasoning, or None if there is neither.

        Raises BotError for an error.
        """
        if data == b"[DONE]":
            self.is_over = self.is_done = True
            return None
        chunk = parse_chunk(data)
        text = "" if chunk.is_whole and self.has_text else chunk.text  # some servers repeat the reply at its end
        is_progress = bool(text) or chunk.is_working
        if self.finish_reason:
            self.is_continued = self.is_continued or is_progress
        elif chunk.finish_reason:
            self.is_over = self.has_text and not is_progress
            self.may_continue = not self.has_text
        self.has_text = self.has_text or bool(text)
        self.finish_reason = chunk.finish_reason or self.finish_reason
        return text if is_progress else None

    def check_end(self):
        """Raise BotError or BotTruncated unless the reply is complete."""
        if self.finish_reason in TRUNCATED_REASONS:
            raise BotTruncated(f"the model ended the reply: {self.finish_reason}")
        if self.finish_reason in ERROR_REASONS or not (self.finish_reason or (self.is_done and self.has_text)):
            raise BotError("the model broke off")


def iter_lines(blocks):
    """Yield the lines of a response without their line ends: CR, LF or both. Raises BotError if it is too long."""
    tail, total, is_after_cr = b"", 0, False
    for block in blocks:
        total += len(block)
        if is_after_cr:
            block = block.removeprefix(b"\n")
        is_after_cr = block.endswith(b"\r")
        lines = (tail + block).splitlines()
        tail = lines.pop() if lines and not block.endswith((b"\r", b"\n")) else b""
        if len(tail) > MAX_LINE_BYTES or total > MAX_RESPONSE_BYTES:
            raise BotError("the model's response is too long")
        yield from lines
    if tail:
        yield tail


def iter_events(blocks):
    """Yield the data of each server-sent event of a response, or its whole body if it is a JSON object.

    A line with a whole object is an event: some servers send no blank line after it.
    """
    lines = iter_lines(blocks)
    event = []
    for line in lines:
        line = line.removeprefix(BYTE_ORDER_MARK)
        if line.startswith(b"data:"):
            data = line[5:].strip()
            if not event and (data == b"[DONE]" or (data.startswith(b"{") and data.endswith(b"}"))):
                yield data
            else:
                event.append(data)
        elif not line and event:
            yield b"\n".join(event)
            event = []
        elif line.lstrip().startswith((b"{", b"[")):  # the server ignored "stream": true
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


def unwrap(document):
    """Return the first item of a list, as which some servers send an error, and any other value as it is."""
    return document[0] if isinstance(document, list) and document else document


def parse_chunk(data):
    """Return the Chunk of an event's data, an empty one if there is nothing of a reply in it.

    A whole completion, as servers send that cannot stream, is read like a chunk. Raises BotError for an error object.
    """
    event = unwrap(parse_json(data or b"null"))
    if event is None:
        return Chunk()
    if not isinstance(event, dict):
        raise BotError("the model sent a chunk that is no object")
    if event.get("error") or event.get("object") == "error":
        raise parse_error(200, data)
    choice = find_first_choice(event.get("choices"))
    message, finish_reason = choice.get("delta"), parse_finish_reason(choice.get("finish_reason"))
    is_whole = not isinstance(message, dict)
    if is_whole:
        message = choice.get("message")
        if not isinstance(message, dict):
            return Chunk(finish_reason=finish_reason)
        finish_reason = finish_reason or "stop"
    text = parse_text(message.get("content"))
    if refusal := message.get("refusal"):
        text += parse_text(refusal)
    # Content without a text consists of other parts.
    return Chunk(text, not text and any(message.get(name) for name in SIGNS_OF_LIFE), finish_reason, is_whole)


def find_first_choice(choices):
    """Return the choice whose index is 0 or missing, or {}; more than one is sent only if BOT_OPTIONS asks for it."""
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict) and choice.get("index") in (0, "0", None):
            return choice
    return {}


def parse_text(content):
    """Return a message's content as a string; it may also be a part, a list of parts, or null."""
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        return ""
    texts = [part.get("text") if isinstance(part, dict) else part for part in content]
    return "".join(text for text in texts if isinstance(text, str))


def parse_finish_reason(reason):
    """Return a finish reason in lower case and without details, or None while the reply is unfinished."""
    if not reason:
        return None
    reason = str(reason).lower().partition(":")[0].strip()
    return None if reason in UNFINISHED_REASONS else reason


def skip_thinking(texts):
    """Yield the texts of a reply without white space and `<think>` blocks at its beginning.

    An empty string is yielded for each text that is left out, as a sign that the model works. Thinking whose `<think>`
    the chat template puts into the prompt cannot be distinguished from the reply; the model server must take it out.
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
    fields = find_error_fields(body)
    kinds = [str(fields.get(name) or "") for name in ("code", "type", "status", "status_code")]
    metadata = fields.get("metadata")
    texts = [fields.get("message"), fields.get("detail"), metadata.get("raw") if isinstance(metadata, dict) else None]
    texts = [*kinds, *(text for text in texts if isinstance(text, str))]
    if status == 200:
        status = next((int(match[0]) for match in map(ERROR_STATUS.match, texts) if match), 200)
    shown = [kind for kind in kinds if ERROR_KIND.fullmatch(kind)]
    summary = f"the model answered {' '.join([str(status), *shown])}, {len(body)} bytes"
    words = " ".join(texts)
    is_busy = status in BUSY_STATUSES or (status in KIND_STATUSES and BUSY_KIND.search(" ".join(kinds)))
    is_exceeded = status in CONTEXT_STATUSES and not is_busy and CONTEXT_EXCEEDED.search(words)
    if status == 413 or is_exceeded or REQUEST_TOO_LARGE.search(words):
        return ContextExceeded(summary)
    return BotBusy(summary, parse_retry_after(retry_after)) if is_busy else BotError(summary)


def find_error_fields(body):
    """Return the error object of a response, which servers nest in several ways, as a dict."""
    try:
        document = unwrap(parse_json(body))
    except BotError:
        document = body.decode("utf-8", "replace")
    error = document
    if isinstance(document, dict):
        error = document.get("error") or unwrap(document.get("errors")) or document
    return error if isinstance(error, dict) else {"message": error}


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
