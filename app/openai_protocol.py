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
REFUSED_STATUSES = {200, 400, 403, 422, 451, 500}
CONTEXT_STATUSES = {200, 400, 422, 500}
BUSY = re.compile(
    r"rate.?limit|overload|too.?many.?requests|exhausted|unavailable|throttl|loading|capacity|busy|pending requests"
    r"|no slot",
    re.IGNORECASE,
)
NO_QUOTA = re.compile(
    r"insufficient.?(account.?)?(quota|balance|credit|fund)|billing.?(hard|not|details)|credit balance"
    r"|payment.?required|arrear|budget|spend(ing)? limit|(out of|no|included) credits|usage limits",
    re.IGNORECASE,
)
REFUSED = re.compile(
    r"content.?(filter|policy|management)|responsible.?ai|moderation|data.?inspection|prohibited.?content|flagged"
    r"|content exists risk|high risk|safety|guardrail|sensitive|violat\w+ .{0,40}polic|refus|recitation|blocklist|spii",
    re.IGNORECASE,
)
INVALID_PARAMETER = re.compile("unrecogni[sz]ed|unsupported|unknown (name|param)|invalid (value|')", re.IGNORECASE)
CONTEXT_EXCEEDED = re.compile(
    r"context.?(length|size|window|limit)|context the overflows|n_keep|(prompt|input) is too long|too large for model"
    r"|too many tokens(?!, please wait)|tokens? limit|maximum number of tokens|must have less than \d+ tokens"
    r"|max_new_tokens|max_tokens must be at least 1, got -|max(imum)?.?(model|prompt|input|seq).?(len|tokens)"
    r"|exceeds max length|reduce the length|input length|(prompt|input) token count|number of input tokens",
    re.IGNORECASE,
)
# A complaint of the operator's own limit of the reply, which no shorter history can satisfy.
OUTPUT_LIMIT = re.compile(
    r"max[_ ]?((completion|output)_?)?tokens['\"`]*( or '\w+'| value| parameter)*(:| is| are)? *"
    r"(\d+ *>|too (large|high|big)|must be (less|at most|between|smaller|<)|exceeds|out of)"
    r"|(range of|invalid) ['\"`]?max_|(completion|output) tokens|(?<!\+ )(?<!\+ `)max_new_tokens['\"`]* must",
    re.IGNORECASE,
)
# The context, and the length of the reply that the operator asks for: with less than that, a shorter history fits.
REQUESTED_OUTPUT = re.compile(
    r"context length is (?P<context>\d+) tokens.*?(?P<output>\d+) (tokens )?(in|for) the (completion|output)"
    r"|(?P<output2>\d+) > (?P<context2>\d+) - \d+",
    re.DOTALL,
)
REQUEST_TOO_LARGE = re.compile("request too large", re.IGNORECASE)  # for the limit of a minute: no retry succeeds
RETRY_DELAY = re.compile(
    r"(?:try again|retry|wait|available|cooldown)(?:ing|delay|\W|in\b|after\b|for\b|about\b)*"
    r"((?:[0-9]+(?:\.[0-9]+)? ?[a-z]+,? ?(?:and )?)+)",
    re.IGNORECASE,
)
RETRY_FIELD = re.compile(
    r'"(?:x-|ms-)*retry[_-]?(?:after|in)[_-]?(ms|seconds)?"\s*:\s*"?([0-9]{1,9}(?:\.[0-9]*)?)s?(?![0-9a-z])',
    re.IGNORECASE,
)
DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?(ms|milli|s|m|h|d)")
SECONDS = {"ms": 0.001, "milli": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
ERROR_STATUS = re.compile(r"[45][0-9][0-9](?=: |$)")
ERROR_KIND = re.compile(r"(?=.{1,40}$)([A-Za-z]+(_[A-Za-z]+)+|[A-Za-z]*(Error|Exception))")
UNFINISHED_REASONS = {"", "null", "none"}  # these and the next are in lower case, without anything but letters
COMPLETE_REASONS = {
    *("stop", "stopped", "stopstr", "stopstring", "stopsequence", "eos", "eostoken", "endturn", "endofturn", "imend"),
    *("complete", "completed", "finished", "done", "normal"),
}
ERROR_REASON = re.compile("error|abort|fail|insufficient|interrupt")
PINGS = ("ping", "heartbeat", "keepalive")
ERROR_NAME = re.compile("error|fail|exception|timeout|abort|cancel")
FINISH_FIELDS = ("finish_reason", "native_finish_reason", "done_reason")
ERROR_FIELDS = ("error", "errors", "error_code", "error_msg", "exception", "detail")
OK_CODES = (None, "", 0, 200, "0", "200")
HARMLESS_FIELDS = ("choices", "usage", "timings", "x_groq", "prompt_filter_results")  # of events without a choice
THINK_NAMES = ("think", "thinking", "thought", "thoughts", "seed:think", "mm:think", "longcat_think", "reasoning")
THINK_TAGS = {f"<{name}>": f"</{name}>" for name in THINK_NAMES}  # in lower case
THINK_TAGS |= {"[think]": "[/think]", "◁think▷": "◁/think▷", "<|start_thinking|>": "<|end_thinking|>"}
BLANK = " \t\r\n\u200b\ufeff"  # before thinking
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
        if is_ping(name) or (len(data) <= 20 and is_ping(data.decode(errors="replace"))):
            return
        if ERROR_NAME.search(name):
            raise parse_error(200, data)
        if data == b"[DONE]":
            self.is_done = True
            return
        event = unwrap(parse_json(data or b"null"))
        if event is None:
            return
        if is_error(event):
            raise parse_error(200, data)
        choice = find_first_choice(event.get("choices"))
        for part in (choice, choice.get("delta"), choice.get("message")):
            if isinstance(part, dict) and (error := part.get("error") or part.get("errors")):
                raise parse_error(200, json.dumps({"error": error}).encode())
        self.add_message(choice)
        reasons = [part[field] for field in FINISH_FIELDS for part in (choice, event) if part.get(field)]
        if (name == "whole" or event.get("object") == "chat.completion") and choice and not reasons:
            reasons = ["stop"]
        self.add_finish_reasons(reasons)

    def add_message(self, choice):
        """Add the text of a choice; a `message` in place of a `delta` may be a part, or all of the reply until now."""
        messages = [message for message in (choice.get("delta"), choice.get("message")) if isinstance(message, dict)]
        message = next((message for message in messages if get_text(message)), messages[0] if messages else {})
        text = get_text(message)
        received = "".join(self.texts) if message is choice.get("message") else ""
        if received.strip() and text.startswith(received.strip()):
            if text.strip() == received.strip() and (self.finish_reason or choice.get("finish_reason")):
                return  # all of it once more
            text = text if text == received else text.removeprefix(received)
        if text or any(message.get(field) for field in SIGNS_OF_LIFE):
            self.is_continued = bool(self.finish_reason)
            self.texts.append(text)
            self.unread.append(text)

    def add_finish_reasons(self, reasons):
        """Keep the first finish reason; the first that is no natural end, such as that of a gateway's provider."""
        for reason in filter(None, map(parse_finish_reason, reasons)):
            if self.finish_reason is None or self.finish_reason in COMPLETE_REASONS:
                self.finish_reason = reason

    def take_text(self):
        """Return the text since the last call, "" for a sign of life alone, or None if there was neither."""
        text = "".join(self.unread) if self.unread else None
        self.unread = []
        return text

    def check_end(self):
        """Raise BotError, BotRefused or BotTruncated unless the reply is complete."""
        reason = self.finish_reason or ""
        if ERROR_REASON.search(reason) or not (reason or (self.is_done and any(self.texts))):
            raise BotError("the model broke off")
        if self.finish_reason not in (None, *COMPLETE_REASONS):
            if REFUSED.search(self.finish_reason) and not any(self.texts):
                raise BotRefused(f"the model ended the reply: {self.finish_reason[:40]}")
            raise BotTruncated(f"the model ended the reply: {self.finish_reason[:40]}")


def is_ping(text):
    """Return whether a word says that an event is only a sign of life."""
    return bool(text) and re.sub(r"\W|_", "", str(text)).lower() in PINGS


def is_error(event):
    """Return whether an event is neither a part of a reply nor one of those that may accompany it."""
    if not isinstance(event, dict):
        return True
    if not event or is_ping(event.get("type")) or is_ping(event.get("event")):
        return False
    if any(event.get(name) and ERROR_NAME.search(str(event[name])) for name in ("object", "type", "event", "status")):
        return True
    is_code = event.get("code") not in OK_CODES
    has_message = event.get("message") and (is_code or "code" not in event)
    status = event["base_resp"].get("status_code") if isinstance(event.get("base_resp"), dict) else None  # MiniMax's
    if is_code or has_message or status or event.get("success") is False or any(map(event.get, ERROR_FIELDS)):
        return True
    choices = event.get("choices") or []
    if not isinstance(choices, list) or not all(isinstance(choice, dict | None) for choice in choices):
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
    parts = [part for part in parts if not (isinstance(part, dict) and "think" in str(part.get("type")))]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return "".join(text for text in texts if isinstance(text, str))


def parse_finish_reason(reason):
    """Return the letters of a finish reason in lower case, without details; None while the reply is unfinished."""
    if isinstance(reason, dict):
        reason = reason.get("type") or reason.get("reason")
    reason = re.sub("[^a-z]", "", str(reason or "").lower().partition(":")[0])
    reason = reason.removeprefix("finishreason").removeprefix("stopreason")
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
        start = buffer.lstrip(BLANK).lower()
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
            end = buffer.lower().find(end_tag)
            if end < 0:
                return buffer[1 - len(end_tag) :], end_tag  # what may be the first half of the tag
            buffer, end_tag = buffer[end + len(end_tag) :], None
        start = buffer.lstrip(BLANK)
        start_tag = next((tag for tag in THINK_TAGS if start[: len(tag)].lower() == tag), None)
        if not start_tag:
            return buffer, None
        buffer, end_tag = start[len(start_tag) :], THINK_TAGS[start_tag]


def parse_error(status, body, headers=()):
    """Return the BotError for an error response. Its message has the status, kind and length, but no word of it."""
    fields = find_error_fields(body)
    kinds = [str(fields.get(name) or "") for name in ("code", "type", "status", "status_code", "error_type")]
    texts = [fields.get(name) for name in ("message", "detail", "error_msg", "status_msg")]
    inner = [fields[name] for name in ("metadata", "innererror") if isinstance(fields.get(name), dict)]
    texts += [document.get(name) for document in inner for name in ("raw", "code")]
    words = " ".join([*kinds, *(text for text in texts if isinstance(text, str))])
    if status == 200:
        status = next((int(match[0]) for match in map(ERROR_STATUS.match, (*kinds, str(texts[0]))) if match), 200)
    shown = [kind for kind in kinds if ERROR_KIND.fullmatch(kind)]
    summary = f"the model answered {' '.join([str(status), *shown])}, {len(body)} bytes"
    delay = parse_retry_delay(headers, body.decode("utf-8", "replace"))
    is_busy = status in BUSY_STATUSES or (status in KIND_STATUSES and BUSY.search(words))
    is_output = fields.get("param") in ("max_tokens", "max_completion_tokens") or OUTPUT_LIMIT.search(words)
    if match := REQUESTED_OUTPUT.search(words):
        is_output = int(match["output"] or match["output2"]) >= int(match["context"] or match["context2"])
    is_exceeded = status in CONTEXT_STATUSES and not is_busy and CONTEXT_EXCEEDED.search(words)
    if status == 413 or REQUEST_TOO_LARGE.search(words) or (is_exceeded and not is_output):
        return ContextExceeded(summary)
    if is_busy and not (NO_QUOTA.search(words) and delay is None):
        return BotBusy(summary, delay or DEFAULT_RETRY_AFTER)
    if status in REFUSED_STATUSES and REFUSED.search(words) and not INVALID_PARAMETER.search(words):
        return BotRefused(summary)
    return BotError(summary)


def find_error_fields(body):
    """Return the error object of a response, which servers nest in several ways, as a dict."""
    try:
        document = unwrap(parse_json(body))
    except BotError:
        document = body.decode("utf-8", "replace")
    error = document
    while isinstance(error, dict) and (inner := first_of(error, "error", "errors", "base_resp")):
        if not isinstance(inner, dict):  # a sentence, beside which may be a kind
            return {"message": inner, **error}
        error = inner
    return error if isinstance(error, dict) else {"message": error}


def first_of(fields, *names):
    """Return the first value of these names that says something, the first item of a list."""
    return next(filter(None, (unwrap(fields.get(name)) for name in names)), None)


def parse_retry_delay(headers, words):
    """Return the seconds after which a retry may succeed, by the headers or the words of an error; None if unknown."""
    headers = {name.lower(): value for name, value in dict(headers).items()}
    with suppress(TypeError, ValueError, OverflowError):  # it is no date
        return limit_delay(mktime_tz(parsedate_tz(headers.get("retry-after"))) - time.time())
    lines = "".join(f'"{name}": {value}\n' for name, value in headers.items())
    if match := RETRY_FIELD.search(lines + words):
        return limit_delay(float(match[2]) * SECONDS["ms" if match[1] in ("ms", "MS") else "s"])
    match = RETRY_DELAY.search(words)
    durations = DURATION.findall(match[1].lower()) if match else ()
    return limit_delay(sum(float(number) * SECONDS[unit] for number, unit in durations)) if durations else None


def limit_delay(seconds):
    """Return a delay in whole seconds within sensible bounds."""
    return min(max(math.ceil(seconds), 1), MAX_RETRY_AFTER)
