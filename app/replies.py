"""Generating a reply in the background, following it and stopping it.

A reply does not belong to the request that asked for it. A thread for each reply runs the bot and appends its chunks;
one thread for each process saves all replies as they grow, stores how they ended, and reads those of other processes
that requests follow here. Requests follow a reply by a condition variable.
"""

import logging
import math
import textwrap
import time
from collections import Counter
from threading import Condition, Event, Lock, Thread

from flask import current_app
from sqlalchemy.exc import SQLAlchemyError
from werkzeug.exceptions import BadGateway, HTTPException, NotFound, ServiceUnavailable, TooManyRequests

from app import db, errors
from app.bot import BotError, BotTimeout, BotTruncated
from app.database import format_traceback
from app.models.exchange import (
    INTERRUPTED,
    list_in_progress,
    read_replies,
    set_abandoned_failed,
    set_stopped,
    update_ends,
    update_texts,
)
from app.security import record_send
from app.validation import is_blank

MAX_REPLY_CHARS = 100_000
MAX_TITLE_CHARS = 60
MAX_BLANK_CHARS = 10_000  # before the text
MAX_ERROR_LENGTH = 255  # of the column
SAVE_INTERVAL = 1  # seconds at least between two saves of growing replies, and between two attempts to store an end
READ_INTERVAL = 0.5  # seconds between two reads of the replies that other processes generate
HEARTBEAT_INTERVAL = 10  # seconds between two heartbeats while the bot is silent
SILENCE_INTERVAL = 15  # seconds without text after which a follower is told that the reply is still in progress
STORE_TIMEOUT = 10  # seconds that a follower waits for the end of a reply to be stored
DELETED = ("", "deleted")  # text and status of a reply that was deleted

logger = logging.getLogger("app.replies")


class Reply:
    """A reply in progress, of this process or another one, or one that is over. Any number of threads may follow it."""

    def __init__(self, exchange, request_id=None):
        self.exchange = exchange
        self.id = exchange.reply["id"]
        self.request_id = request_id
        self.status = "in_progress"  # or "deleted", or a status of the message
        self.error = None  # the HTTPException of a reply that failed
        self.stored = Event()  # its end is in the database
        self.text = ""
        self.held = ""  # what cannot be sent yet: blank text at the beginning, the first half of a pair of surrogates
        self.source = None  # the iterable that the bot returned
        self.changed = Condition()
        self.started_at = self.saved_at = time.monotonic()
        self.saved_length = 0

    @property
    def is_over(self):
        """Return whether the reply takes no more text."""
        return self.status != "in_progress"

    def append(self, chunk):
        """Add a chunk, as far as MAX_REPLY_CHARS allows; return False if the reply takes no more."""
        text = self.hold(self.held + chunk)
        added = text[: MAX_REPLY_CHARS - len(self.text)]
        with self.changed:
            if self.is_over:
                return False
            if added:
                self.text += added
                self.changed.notify_all()
        return added == text and len(self.held) < MAX_BLANK_CHARS

    def hold(self, text):
        """Return the text that can be sent now, and keep the rest for the next chunk."""
        self.held = text[-1] if "\ud800" <= text[-1:] <= "\udbff" else ""
        text = sanitize(text.removesuffix(self.held))
        if self.text:
            return text
        if is_blank(text):
            self.held = text + self.held
            return ""
        while is_blank(text.partition("\n")[0]):  # blank lines go, the indentation stays
            text = text.partition("\n")[2]
        return text

    def end(self, status, error=None):
        """Set how the reply ended; return False if it has ended before."""
        with self.changed:
            if self.is_over:
                return False
            self.status, self.error = status, error and errors.to_http_exception(error)
            self.changed.notify_all()
        return True

    def load(self, text, status, sentence=None):
        """Set what is stored: another process generates the reply, or has ended it. A stored end stays as it is."""
        with self.changed:
            if not self.stored.is_set() and (text, status) != (self.text, self.status):
                self.text, self.status = text, status
                self.error = to_stored_error(sentence) if status == "failed" else None
                self.changed.notify_all()
            if self.is_over:
                self.stored.set()

    def follow(self, offset=0):
        """Yield the text from a character on as it grows, and None after each SILENCE_INTERVAL without text.

        Ends when the end of the reply is stored. Raises ServiceUnavailable if that takes longer than STORE_TIMEOUT.
        """
        is_over = False
        while not is_over:
            text, is_over = self.wait_for_text(offset)
            if text or not is_over:
                yield text or None
            offset += len(text)
        if not self.stored.wait(STORE_TIMEOUT):
            raise errors.database_unavailable()

    def wait_for_text(self, offset):
        """Return the text from a character on, and whether the reply is over; wait SILENCE_INTERVAL for either."""
        with self.changed:
            self.changed.wait_for(lambda: len(self.text) > offset or self.is_over, SILENCE_INTERVAL)
            return self.text[offset:], self.is_over

    def get_end(self):
        """Return the status and the sentence of the error, which a bot may have written, so that it is sanitized."""
        return self.status, self.error and sanitize(errors.error_message(self.error))[:MAX_ERROR_LENGTH]

    def to_list(self):
        """Return the exchange as the API shows it. Raises NotFound if it was deleted."""
        if self.status == "deleted":
            raise NotFound("Conversation not found")
        return exchange_to_list(self.exchange, self.text, *self.get_end())


def to_stored_error(sentence):
    """Return the HTTPException for the stored error of a reply; what kind of failure it was is not stored."""
    if sentence == INTERRUPTED:
        return ServiceUnavailable(sentence, retry_after=errors.RETRY_AFTER)
    return BadGateway(sentence)


def exchange_to_list(exchange, text, status, error=None):
    """Return an exchange as the API shows it, with what the reply has now."""
    optional = {"status": None if status == "complete" else status, "error": error}
    reply = {**exchange.reply, "text": text, **optional}
    return [exchange.question, {name: value for name, value in reply.items() if value is not None}]


def sanitize(text):
    """Return a text without what databases cannot store: NUL and lone surrogates. Pairs of these become a character."""
    return text.replace("\0", "").encode("utf-16", "surrogatepass").decode("utf-16", "ignore")


def shorten(text):
    """Return the beginning of a text in one line of at most MAX_TITLE_CHARS, cut between two words if possible."""
    title = textwrap.shorten(text, MAX_TITLE_CHARS, placeholder="…")
    return title if title != "…" else f"{text.split()[0][: MAX_TITLE_CHARS - 1]}…"


def log_error(error, request_id):
    """Log why a reply has failed, with a traceback if it is a bug."""
    extra = {"request_id": request_id}
    if isinstance(error, BotError):
        logger.warning("The bot failed: %s: %s", type(error).__name__, str(error), extra=extra)
    elif isinstance(error, SQLAlchemyError):
        logger.error("The reply failed: %s", format_traceback(error), extra=extra)
    elif error and not isinstance(error, HTTPException):
        logger.error("The reply failed", exc_info=error, extra=extra)


class Places:
    """The places for replies in progress of this process: each user has MAX_CONCURRENT_REPLIES."""

    def __init__(self):
        self.counts = Counter()  # of replies and titles, by user
        self.lock = Lock()
        self.is_closed = False  # True during a shutdown

    def reserve(self, user_id):
        """Take a place of a user, and count the reply for SEND_RATE_LIMIT.

        Raises TooManyRequests beyond MAX_CONCURRENT_REPLIES and SEND_RATE_LIMIT, ServiceUnavailable during a shutdown.
        """
        with self.lock:
            if self.is_closed:
                raise ServiceUnavailable("The server is restarting, try again later", retry_after=errors.RETRY_AFTER)
            if self.counts[user_id] >= current_app.config["MAX_CONCURRENT_REPLIES"]:
                raise TooManyRequests("Too many replies in progress, try again later", retry_after=errors.RETRY_AFTER)
            self.counts[user_id] += 1
        try:
            record_send(user_id)
        except BaseException:
            self.release(user_id)
            raise

    def release(self, user_id):
        """Give a place of a user back."""
        with self.lock:
            self.counts -= Counter([user_id])  # which drops a count of 0


class ReplyManager:
    """The replies that this process generates, and those of other processes that it follows."""

    def __init__(self, app, bot):
        self.app = app
        self.bot = bot
        self.places = Places()
        self.replies = {}  # of this process by id, until their end is stored
        self.others = {}  # of other processes by id, that were asked for here, until they are over
        self.lock = Lock()
        self.wakeup = Event()
        self.is_saving = False
        self.growth_saved_at = self.others_read_at = self.checked_at = -math.inf

    def start(self, exchange, request_id):
        """Commit the session with a new exchange, and generate its reply; return that. Raises as Places.reserve()."""
        self.places.reserve(exchange.user_id)
        try:
            history = exchange.read_history(self.app.config["BOT_HISTORY_CHARS"])
            db.session.commit()
        except BaseException:
            self.places.release(exchange.user_id)
            raise
        reply = Reply(exchange, request_id)  # until it is in the dict, another request finds its row, which is enough
        self.add(self.replies, reply)
        Thread(target=self.generate, args=[reply, history], name=f"reply-{reply.id}", daemon=True).start()
        return reply

    def add(self, replies, reply):
        """Add a reply to a dict, and start the thread that looks after them; return the one that is in the dict now."""
        with self.lock:
            if not self.is_saving:
                Thread(target=self.save_in_background, name="replies", daemon=True).start()
                self.is_saving = True
            return replies.setdefault(reply.id, reply)

    def get(self, exchange):
        """Return the reply of an exchange that was read: one of this process, or what is stored, which may grow."""
        reply = Reply(exchange)
        reply.load(exchange.reply["text"], exchange.reply.get("status", "complete"), exchange.reply.get("error"))
        if reply.is_over:
            return reply
        return self.replies.get(reply.id) or self.add(self.others, reply)

    def stop(self, reply):
        """Stop a reply if it is in progress."""
        if own := self.replies.get(reply.id):
            self.end(own, "stopped")
        elif not reply.is_over:
            set_stopped(reply.id)
            self.others_read_at = -math.inf  # so that it is read at once
            self.wakeup.set()

    def create_title(self, user_id, history, request_id):
        """Return the bot's title for a first exchange, or the beginning of the message. Raises as Places.reserve()."""
        self.places.reserve(user_id)
        title = ""
        try:
            if hasattr(self.bot, "create_title"):
                title = sanitize(self.bot.create_title(history))
        except Exception as error:
            log_error(error, request_id)
        finally:
            self.places.release(user_id)
        return shorten(history[0][1] if is_blank(title) else title)

    def fail_abandoned(self):
        """End the replies whose process was killed, of any server, once in HEARTBEAT_INTERVAL; log if that fails."""
        if time.monotonic() - self.checked_at >= HEARTBEAT_INTERVAL:
            self.checked_at = time.monotonic()
            try:
                set_abandoned_failed(set(self.replies))
            except SQLAlchemyError as error:
                logger.warning("Abandoned replies cannot be ended now: %s", errors.get_reason(error))

    def shutdown(self, timeout):
        """Take no new replies, wait some seconds for those in progress, then end the others as failed."""
        self.places.is_closed = True
        deadline = time.monotonic() + timeout
        while self.places.counts and time.monotonic() < deadline:
            time.sleep(0.05)
        for reply in list(self.replies.values()):
            self.end(reply, "failed", to_stored_error(INTERRUPTED))
        deadline = time.monotonic() + 2  # to store them
        while self.replies and time.monotonic() < deadline:
            time.sleep(0.01)

    def generate(self, reply, history):
        """Run the bot, pass its chunks on to the reply, and end it."""
        exchange, status, error = reply.exchange, "complete", None
        try:
            reply.source = self.bot(history, user_id=exchange.user_id, conversation_id=exchange.conversation_id)
            if not reply.is_over and not all(map(reply.append, reply.source)):
                status = "truncated"
        except BotTruncated:
            status = "truncated"
        except BaseException as exception:  # SystemExit, too, must not leave a reply in progress
            status, error = "failed", exception
        self.call_source(reply, "close")
        if not (reply.text or error):
            status, error = "failed", BotError("the reply is empty")
        self.end(reply, status, error)

    def call_source(self, reply, name):
        """Call the method `close` or `cancel` of what the bot returned, if it has that."""
        try:
            if method := getattr(reply.source, name, None):
                method()
        except BaseException as error:
            extra = {"request_id": reply.request_id}
            logger.error("The bot's %s() failed", name, exc_info=error, extra=extra)

    def end(self, reply, status, error=None):
        """End a reply unless it has ended, cancel the bot, and have the end stored."""
        if reply.end(status, error):
            self.wakeup.set()
            self.call_source(reply, "cancel")
            log_error(error, reply.request_id)

    def save_in_background(self):
        """Save the replies of this process, and read others, until there are none."""
        is_needed = True
        while is_needed:
            is_woken = self.wakeup.wait(READ_INTERVAL)
            self.wakeup.clear()
            try:
                with self.app.app_context():
                    self.save()
            except Exception as error:
                reason = errors.get_reason(error) if errors.database_error_message(error) else format_traceback(error)
                logger.error("Replies cannot be saved or read, trying again: %s", reason)
                time.sleep(SAVE_INTERVAL)
            with self.lock:  # in which add() starts this thread
                is_needed = self.is_saving = is_woken or bool(self.replies or self.others)

    def save(self):
        """Store the replies that have ended; at intervals, read those of others, and look after those in progress."""
        if time.monotonic() - self.others_read_at >= READ_INTERVAL:
            self.others_read_at = time.monotonic()
            self.read_others()
        if self.replies and time.monotonic() - self.growth_saved_at >= SAVE_INTERVAL:
            self.growth_saved_at = time.monotonic()
            self.end_overdue()
            self.save_growth()
        if ended := [reply for reply in list(self.replies.values()) if reply.is_over]:
            self.store_ended(ended)

    def end_overdue(self):
        """End the replies that take too long, and those that another process has ended or deleted."""
        max_seconds = self.app.config["BOT_MAX_SECONDS"]
        replies = list(self.replies.values())
        for reply in replies:
            if time.monotonic() - reply.started_at > max_seconds:
                overdue = BotTimeout(f"no end after {max_seconds} s")
                self.end(reply, *(["truncated"] if reply.text else ["failed", overdue]))
        ids = list_in_progress([reply.id for reply in replies])
        for reply in replies:
            if reply.id not in ids:
                self.end(reply, "stopped")  # or what it is, see store_ended()

    def save_growth(self):
        """Save the replies that have grown, and every HEARTBEAT_INTERVAL those that have not, as a sign of life."""
        now = time.monotonic()
        texts = {reply: reply.text for reply in list(self.replies.values()) if not reply.is_over}
        for reply, text in list(texts.items()):
            if len(text) == reply.saved_length and now - reply.saved_at <= HEARTBEAT_INTERVAL:
                del texts[reply]
        if texts:
            update_texts({reply.id: text for reply, text in texts.items()})
        for reply, text in texts.items():
            reply.saved_length, reply.saved_at = len(text), now

    def store_ended(self, replies):
        """Store how replies ended, and tell their followers. What another process has stored before stays."""
        is_stored = update_ends({reply.id: (reply.text, *reply.get_end()) for reply in replies})
        rows = {} if is_stored else read_replies([reply.id for reply in replies])
        for reply in replies:
            del self.replies[reply.id]
            self.places.release(reply.exchange.user_id)
            if not is_stored:
                reply.load(*rows.get(reply.id, DELETED))
            reply.stored.set()

    def read_others(self):
        """Read the replies of other processes that were asked for here. Only the thread that saves may call this."""
        replies = list(self.others.values())
        if not replies:
            return
        self.fail_abandoned()  # there may be no other request that does
        try:
            rows = read_replies([reply.id for reply in replies])
        except SQLAlchemyError as error:
            for reply in replies:  # as their end is not stored, follow() raises ServiceUnavailable
                reply.end("failed", error)
                del self.others[reply.id]
            raise
        for reply in replies:
            reply.load(*rows.get(reply.id, DELETED))
            if reply.is_over:
                del self.others[reply.id]
