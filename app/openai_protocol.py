"""The wire format of OpenAI's chat completions, in the variants that model servers send. No input or output here."""

import json
import math
import re
import time
from contextlib import suppress
from email.utils import mktime_tz, parsedate_tz

import orjson

from app.bot import BotBusy, BotError, BotRefused, BotTruncated

MAX_EVENT_BYTES = 2_000_000
DEFAULT_RETRY_AFTER, MAX_RETRY_AFTER = 5, 3600  # seconds
BUSY_STATUSES = {429, 503, 529}
KIND_STATUSES = {200, 500, 502}  # with these, the words of the error tell whether the model is busy
CONTEXT_STATUSES = {200, 400, 422, 500}
BUSY = re.compile(
    r"rate.?limit|overload|too.?many.?requests|exhausted|unavailable|throttl|loading|at capacity|is busy", re.IGNORECASE
)
NO_QUOTA = re.compile(
    r"insufficient.?(quota|balance|credit|fund)|billing.?(hard|not|details)|credit balance|payment", re.I
)
REFUSED = re.compile(
    r"content.?(filter|policy|management)|responsible.?ai|moderation|data.?inspection|prohibited|safety|flagged"
    r"|content exists risk",
    re.IGNORECASE,
)
CONTEXT_EXCEEDED = re.compile(
    r"context.?(length|size|window|limit)|context the overflows|n_keep|(prompt|input) is too long|too large for model"
    r"|too many tokens(?!, please wait)|tokens? limit|maximum number of tokens|must have less than \d+ tokens"
    r"|max_new_tokens|max_tokens must be at least 1, got -|max(imum)?.?(model|prompt|input|seq).?(len|tokens)"
    r"|exceeds max length|reduce the length|input length|(prompt|input) token count|number of input tokens",
    re.IGNORECASE,
)
# A complaint of the operator's own limit of the reply, which no shorter history can satisfy.
OUTPUT_LIMIT = re.compile(
    r"max_?((completion|output)_?)?tokens['\"`]*( or '\w+'| value| parameter)*(:| is| are)? *"
    r"(\d+ *>|too (large|high|big)|must be (less|at most|between|smaller|<)|exceeds|out of)"
    r"|(range of|invalid) ['\"`]?max_|(completion|output) tokens|(?<!\+ )(?<!\+ `)max_new_tokens['\"`]* must",
    re.IGNORECASE,
)
TOO_LONG_OUTPUT = re.compile(r"context length is (\d+) tokens.*?(\d+) in the completion", re.DOTALL)
REQUEST_TOO_LARGE = re.compile("request too large", re.IGNORECASE)  # for the limit of a minute: no retry succeeds
RETRY_DELAY = re.compile(
    r"(?:try again|retry|retrying|retryDelay\W+|wait)(?: in| after)? ?((?:[0-9.]+ ?[a-z]+ ?)+)", re.I
)
RETRY_FIELD = re.compile(r'"retry_?after(_ms)?"\s*:\s*"?([0-9.]+)', re.IGNORECASE)
DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?(ms|milli|s|m|h|d)")
SECONDS = {"ms": 0.001, "milli": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
ERROR_STATUS = re.compile(r"[45][0-9][0-9](?=: |$)")
ERROR_KIND = re.compile(r"(?=.{1,40}$)([A-Za-z]+(_[A-Za-z]+)+|[A-Za-z]*(Error|Exception))")
UNFINISHED_REASONS = {"", "null", "none"}
COMPLETE_REASONS = {
    "stop",
    "eos",
    "eos_token",
    "end_turn",
    "complete",
    "completed",
    "stop_sequence",
    "finished",
    "done",
}
ERROR_REASONS = {"error", "error_finish", "abort", "network_error"}
CUT_REASON = re.compile("length|max|limit|filter|safety|time|cancel|incomplete|refus|malformed|truncat|recitation|spii")
PINGS = ("ping", "heartbeat", "keepalive")
ERROR_FIELDS = ("error", "errors", "error_code", "error_msg", "exception", "detail")
OK_CODES = (None, "", 0, 200, "0", "200")
HARMLESS_FIELDS = ("choices", "usage", "timings", "x_groq", "prompt_filter_results")  # of events without a choice
THINK_TAGS = {f"<{name}>": f"</{name}>" for name in ("think", "thinking", "thought", "seed:think", "reasoning")}
THINK_TAGS |= {"[THINK]": "[/THINK]"}
SIGNS_OF_LIFE = ("reasoning_content", "reasoning", "reasoning_details", "content", "tool_calls")  # fields without text


class ContextExceeded(BotError):
    """The messages do not fit the model's context."""


class EventParser:
    """Splits a response into server-sent events (name, data). A body that is one JSON object is an event, too."""

    def __init__(self):
        self.tail = b""
        self.name, self.data = "", []
        self.is_json = False  # the server ignored "stream": true

    def feed(self, block):
        """Yield the events that a block completes; an empty block is the end. Raises BotError if one is too long."""
        lines = (self.tail + block).splitlines(keepends=True)
        # CR LF may come in two blocks, so that a CR at the end does not end a line yet.
        self.tail = lines.pop() if block and lines and not lines[-1].endswith(b"\n") else b""
        if len(self.tail) + sum(map(len, self.data)) > MAX_EVENT_BYTES:
            raise BotError("the model's response is too long")
        for line in lines:
            yield from self.feed_line(line.rstrip(b"\r\n").removeprefix(b"\xef\xbb\xbf"))
        if not block:
            yield from self.end_event()

    def feed_line(self, line):
        """Yield the event that a line completes: some servers send no blank line after one."""
        field, _, value = line.partition(b":")
        value = value.strip()
        if self.is_json or (not self.data and line.lstrip().startswith((b"{", b"["))):
            self.is_json = True
            self.data.append(line)
        elif field.lower() == b"error":  # llama.cpp's
            self.name = "error"
            self.data.append(value)
        elif field == b"event":
            self.name = value.decode(errors="replace").lower()
        elif field == b"data":
            self.data.append(value)
            if len(self.data) == 1 and (value == b"[DONE]" or (value.startswith(b"{") and value.endswith(b"}"))):
                yield from self.end_event()
        elif not line:
            yield from self.end_event()
        elif not re.match(rb"[A-Za-z_-]*:|id$|retry$", line):  # a comment, or a field that browsers ignore as well
            raise BotError("the model sent a line that is no event")

    def end_event(self):
        """Yield the event whose lines have been read, if there are any."""
        name, data = self.name, b"\n".join(self.data)
        self.name, self.data = "", []
        if data or "error" in name:
            yield "whole" if self.is_json else name, data


class Completion:
    """What has been received of a reply. It is complete only if nothing in it says otherwise."""

    def __init__(self):
        self.texts = []  # all of the reply
        self.unread = []  # those that take_text() has not returned; an empty one is a sign of life
        self.finish_reason = None
        self.is_done = False  # `[DONE]` was received
        self.is_continued = False  # more followed the finish reason, as some servers send one with every chunk

    @property
    def is_finished(self):
        """Whether the reply is whole although the server may leave the connection open."""
        return self.is_done or bool(self.finish_reason and any(self.texts) and not self.is_continued)

    def receive(self, name, data):
        """Take in an event. Raises BotError if it is neither a part of the reply, nor usage, nor a sign of life."""
        if name in PINGS or data.decode(errors="replace") in PINGS:
            return
        if data == b"[DONE]" and not is_error(name, None):
            self.is_done = True
            return
        event = unwrap(parse_json(data or b"null"))
        if is_error(name, event):
            raise parse_error(200, data)
        if event is None:
            return
        choice = find_first_choice(event.get("choices"))
        delta = choice.get("delta")
        if error := choice.get("error") or (isinstance(delta, dict) and delta.get("error")):
            raise parse_error(200, json.dumps({"error": error}).encode())
        self.add_message(choice)
        reasons = [choice.get("finish_reason"), choice.get("native_finish_reason")]
        if (name == "whole" or event.get("object") == "chat.completion") and choice and not any(reasons):
            reasons = ["stop", None]
        self.add_finish_reasons(reasons)

    def add_message(self, choice):
        """Add the text of a choice; a `message` in place of a `delta` may be a part, or all of the reply until now."""
        messages = [message for message in (choice.get("delta"), choice.get("message")) if isinstance(message, dict)]
        message = messages[0] if messages else {}
        text, received = get_text(message), "".join(self.texts)
        if message is not choice.get("delta") and received and text.startswith(received):
            if text == received and (self.finish_reason or choice.get("finish_reason")):
                return  # all of it once more
            text = text if text == received else text.removeprefix(received)
        if text or any(message.get(field) for field in SIGNS_OF_LIFE):
            self.is_continued = bool(self.finish_reason)
            self.texts.append(text)
            self.unread.append(text)

    def add_finish_reasons(self, reasons):
        """Keep the finish reason of a choice, or that of the provider behind a gateway if it says something else."""
        reason, native = map(parse_finish_reason, reasons)
        if native and (native in ERROR_REASONS or CUT_REASON.search(native)):
            reason = native
        if self.finish_reason is None or self.finish_reason in COMPLETE_REASONS:
            self.finish_reason = reason or self.finish_reason

    def take_text(self):
        """Return the text since the last call, "" for a sign of life alone, or None if there was neither."""
        text = "".join(self.unread) if self.unread else None
        self.unread = []
        return text

    def check_end(self):
        """Raise BotError, BotRefused or BotTruncated unless the reply is complete."""
        if self.finish_reason in ERROR_REASONS or not (self.finish_reason or (self.is_done and any(self.texts))):
            raise BotError("the model broke off")
        if self.finish_reason not in (None, *COMPLETE_REASONS):
            if REFUSED.search(self.finish_reason) and not any(self.texts):
                raise BotRefused(f"the model ended the reply: {self.finish_reason[:40]}")
            raise BotTruncated(f"the model ended the reply: {self.finish_reason[:40]}")


def is_error(name, event):
    """Return whether an event is neither a part of a reply nor one of those that may accompany it."""
    if re.search("error|fail|exception", name) or not isinstance(event, dict | None):
        return True
    if not event or event.get("type") in PINGS or event.get("event") in PINGS:
        return False
    status = event["base_resp"].get("status_code") if isinstance(event.get("base_resp"), dict) else None  # MiniMax's
    fields = ERROR_FIELDS if event.get("code") in OK_CODES else (*ERROR_FIELDS, "code")
    if "code" not in event or fields is not ERROR_FIELDS:
        fields = (*fields, "message")
    if "error" in (event.get("object"), event.get("type")) or status or any(map(event.get, fields)):
        return True
    choices = event.get("choices")
    if isinstance(choices, list) and not all(isinstance(choice, dict | None) for choice in choices):
        return True
    return not any(field in event for field in HARMLESS_FIELDS) and not str(event.get("object")).startswith("chat.")


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


def find_first_choice(choices):
    """Return the choice whose index is 0 or missing, or {}; more than one is sent only if BOT_OPTIONS asks for it."""
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict) and choice.get("index") in (0, "0", None):
            return choice
    return {}


def get_text(message):
    """Return the text of a message, and a refusal; content may be a string, a part, a list of parts, or null."""
    if not isinstance(message, dict):
        return ""
    parts = []
    for content in (message.get("content"), message.get("refusal")):
        parts += content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return "".join(text for text in texts if isinstance(text, str))


def parse_finish_reason(reason):
    """Return a finish reason in lower case and without details, or None while the reply is unfinished."""
    reason = reason.get("type") if isinstance(reason, dict) else reason
    reason = str(reason or "").lower().partition(":")[0].strip()
    reason = reason.removeprefix("finish_reason_").removeprefix("finishreason.")
    return None if reason in UNFINISHED_REASONS else reason


def skip_thinking(texts):
    """Yield the texts of a reply without the thinking at its beginning, and "" for each that is left out.

    Thinking whose first tag the chat template puts into the prompt cannot be told from the reply: the model server
    must take it out.
    """
    texts = iter(texts)
    buffer, end_tag = "", None
    for text in texts:
        buffer, end_tag = skip_think_tags(buffer + text, end_tag)
        start = buffer.lstrip()
        if end_tag is None and not any(tag.startswith(start) for tag in THINK_TAGS):
            break
        yield ""
    if end_tag is None:
        yield buffer
    yield from texts


def skip_think_tags(buffer, end_tag):
    """Return the buffer without whole thinking at its beginning, and the tag that ends thinking that is not whole."""
    while True:
        if end_tag:
            before, tag, after = buffer.partition(end_tag)
            if not tag:
                return before[1 - len(end_tag) :], end_tag  # what may be the first half of the tag
            buffer, end_tag = after, None
        start = buffer.lstrip()
        start_tag = next((tag for tag in THINK_TAGS if start.startswith(tag)), None)
        if not start_tag:
            return buffer, None
        buffer, end_tag = start.removeprefix(start_tag), THINK_TAGS[start_tag]


def parse_error(status, body, headers=()):
    """Return the BotError for an error response. Its message has the status, kind and length, but no word of it."""
    fields = find_error_fields(body)
    kinds = [str(fields.get(name) or "") for name in ("code", "type", "status", "status_code")]
    metadata = fields.get("metadata")
    texts = [fields.get("message"), fields.get("detail"), metadata.get("raw") if isinstance(metadata, dict) else None]
    words = " ".join([*kinds, *(text for text in texts if isinstance(text, str))])
    if status == 200:
        status = next((int(match[0]) for match in map(ERROR_STATUS.match, (*kinds, str(texts[0]))) if match), 200)
    shown = [kind for kind in kinds if ERROR_KIND.fullmatch(kind)]
    summary = f"the model answered {' '.join([str(status), *shown])}, {len(body)} bytes"
    delay = parse_retry_delay(dict(headers), body.decode("utf-8", "replace"))
    is_busy = status in BUSY_STATUSES or (status in KIND_STATUSES and BUSY.search(words))
    is_output = fields.get("param") in ("max_tokens", "max_completion_tokens") or OUTPUT_LIMIT.search(words)
    if match := TOO_LONG_OUTPUT.search(words):
        is_output = int(match[2]) >= int(match[1])
    is_exceeded = status in CONTEXT_STATUSES and not is_busy and CONTEXT_EXCEEDED.search(words)
    if status == 413 or REQUEST_TOO_LARGE.search(words) or (is_exceeded and not is_output):
        return ContextExceeded(summary)
    if is_busy and not (NO_QUOTA.search(words) and delay is None):
        return BotBusy(summary, delay or DEFAULT_RETRY_AFTER)
    if status in (200, 400, 403, 422) and REFUSED.search(words):
        return BotRefused(summary)
    return BotError(summary)


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


def parse_retry_delay(headers, words):
    """Return the seconds after which a retry may succeed, by the headers or the words of an error; None if unknown."""
    headers = {name.lower(): value for name, value in headers.items()}
    for name, unit in (
        ("retry-after-ms", "ms"),
        ("x-retry-after-ms", "ms"),
        ("x-ms-retry-after-ms", "ms"),
        ("retry-after", "s"),
        ("x-retry-after", "s"),
    ):
        value = headers.get(name, "").strip()
        if re.fullmatch(r"[0-9]{1,9}(\.[0-9]*)?", value):
            return limit_delay(float(value) * SECONDS[unit])
        with suppress(TypeError, ValueError, OverflowError):
            return limit_delay(mktime_tz(parsedate_tz(value)) - time.time())
    if match := RETRY_FIELD.search(words):
        return limit_delay(float(match[2].strip(".") or 0) * SECONDS["ms" if match[1] else "s"])
    match = RETRY_DELAY.search(words)
    durations = DURATION.findall(match[1].lower()) if match else ()
    return limit_delay(sum(float(number) * SECONDS[unit] for number, unit in durations)) if durations else None


def limit_delay(seconds):
    """Return a delay in whole seconds within sensible bounds."""
    return min(max(math.ceil(seconds), 1), MAX_RETRY_AFTER)
