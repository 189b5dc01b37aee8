"""Generating a reply in the background, following it and stopping it."""

import math
import time
from collections import Counter, deque
from contextlib import contextmanager, suppress
from copy import copy
from threading import Condition, Event, Lock, Thread
from weakref import WeakValueDictionary

from sqlalchemy import func, select, update
from sqlalchemy.exc import SQLAlchemyError
from werkzeug.exceptions import HTTPException, InternalServerError, NotFound, ServiceUnavailable, TooManyRequests

from app import db
from app.bot import BotError, BotTimeout, BotTruncated
from app.database import autocommit, database_now, format_traceback
from app.errors import DATABASE_UNAVAILABLE, RETRY_AFTER, database_unavailable, get_reason, to_http_exception
from app.models.conversation import Conversation, touch_if_unlocked
from app.models.exchange import fail_abandoned, read_states, save_heartbeats, save_replies
from app.models.message import HEARTBEAT_TIMEOUT, Message

MAX_REPLY_CHARS = 100_000
MAX_FOLLOWERS = 100  # requests of a user that follow replies in this process; new sends count, but are not refused
SAVE_INTERVAL = 1  # seconds between two saves of a growing reply
POLL_INTERVAL = 0.5  # seconds between two looks at the database, for stop requests and for what other processes save
LOCKED_INTERVAL = 0.05  # seconds between two attempts to store the end of a reply whose conversation is locked
HEARTBEAT_INTERVAL = 10  # seconds between two heartbeats while the bot is silent
SILENCE_INTERVAL = 15  # seconds without text after which a follower is told that the reply is still in progress
MAX_ERRORS = 100  # of deleted replies that are kept for requests that have just read the replies
LOCK_TIMEOUT = 10  # seconds that a request waits for the user's other requests to add to the same conversation
STORE_TIMEOUT = 10  # seconds that a follower waits for the end of a reply to be stored


class Interrupted(ServiceUnavailable):
    """The server was stopped while the reply was generated."""

    description = "The server was stopped"

    def __init__(self):
        super().__init__(retry_after=RETRY_AFTER)


class Reply:
    """A reply that this process generates. Any number of threads may follow it."""

    def __init__(self, exchange, request_id):
        self.exchange = exchange
        self.id = exchange.reply["id"]
        self.key = exchange.key
        self.request_id = request_id
        self.status = "in_progress"
        self.error = None  # the HTTPException that ended it
        self.is_stored = False  # its end is in the database
        self.is_lost = False  # it was deleted, or another process took it over
        self.is_failed_by_others = False  # who took this process for dead, see fail_abandoned()
        self.chunks = []
        self.length = 0
        self.source = None  # the iterable that the bot returned
        self.changed = Condition()
        self.started_at = self.saved_at = time.monotonic()
        self.saved_length = 0

    def append(self, chunk):
        """Add a chunk, as far as MAX_REPLY_CHARS allows; return False if the reply takes no more."""
        with self.changed:
            if self.status != "in_progress":
                return False
            added = chunk[: MAX_REPLY_CHARS - self.length]
            self.chunks.append(added)
            self.length += len(added)
            self.changed.notify_all()
        return added == chunk

    def end(self, status, error=None):
        """Set how the reply ended; return False if it has ended before."""
        with self.changed:
            if self.status != "in_progress":
                return False
            self.status, self.error = status, error
            self.changed.notify_all()
        return True

    def set_stored(self, is_lost):
        """Tell the followers that the end of the reply is in the database, or that the reply no longer is."""
        with self.changed:
            self.is_stored, self.is_lost = True, is_lost
            self.changed.notify_all()

    def follow(self, offset=0):
        """Yield the text from a character on as it grows, and None after each SILENCE_INTERVAL without text.

        Ends when the end of the reply is stored. Raises what wait_until_stored() does.
        """
        count, is_over = 0, False
        while not is_over:
            chunks, is_over = self.wait_for_chunks(count)
            count += len(chunks)
            text = "".join(chunks)
            skipped, offset = offset, max(0, offset - len(text))
            if text[skipped:]:
                yield text[skipped:]
            elif not text and not is_over:
                yield None
        self.wait_until_stored()
        if not self.chunks and self.exchange.failed_text:  # that of the attempt before remains
            yield self.exchange.failed_text[offset:]

    def wait_for_chunks(self, count):
        """Return the chunks after the first `count`, and whether there will be no more; wait for SILENCE_INTERVAL."""
        with self.changed:
            self.changed.wait_for(lambda: len(self.chunks) > count or self.status != "in_progress", SILENCE_INTERVAL)
            return self.chunks[count:], self.status != "in_progress"

    def wait_until_stored(self):
        """Wait until the end of the reply is stored. Raises the error of one that was lost, or that failed at once."""
        with self.changed:
            if not self.changed.wait_for(lambda: self.is_stored, STORE_TIMEOUT):
                raise database_unavailable()
        if self.is_lost or self.failed_at_once():
            raise copy_error(self.error)

    def failed_at_once(self):
        """Return whether the reply failed before its first chunk, so that its requests fail.

        When the server is stopped, only an edit fails so: a new message stays, with an empty reply.
        """
        if self.status != "failed" or self.length or self.exchange.is_applied:
            return False
        return self.exchange.is_pending_edit or not isinstance(self.error, Interrupted)

    def get_text(self):
        """Return the text so far; a retry that has ended without a chunk has that of the failed reply."""
        is_over = self.status != "in_progress"
        return "".join(self.chunks) or (is_over and self.exchange.failed_text) or ""

    def to_row(self, status):
        """Return what save_replies() stores."""
        return self.exchange.conversation_id, *self.key, self.get_text(), status

    def to_list(self):
        """Return the exchange as the API shows it."""
        return exchange_to_list(self.exchange, self.get_text(), self.status)


class StoredReply:
    """A reply that is over, or that another process generates."""

    def __init__(self, exchange, error=None):
        self.exchange = exchange
        self.error = error or BotError("the reply failed in another process")
        self.engine = autocommit(db.engine)  # a stream is followed outside of the request

    def load(self, offset=0):
        """Return a row: text from a character on, status, and whether the process that generated it was killed."""
        is_abandoned = Message.heartbeat_at < database_now(-HEARTBEAT_TIMEOUT)
        columns = (
            func.substr(Message.text, offset + 1).label("text"),
            Message.status,
            is_abandoned.label("is_abandoned"),
        )
        with self.engine.connect() as connection:
            id, attempt = self.exchange.key
            query = select(*columns).where(Message.id == id, Message.attempt == attempt)
            if row := connection.execute(query).one_or_none():
                return row
            if not Conversation.exists(connection, self.exchange.conversation_id):
                raise NotFound("Conversation not found")
        if self.exchange.reply.get("status") in ("in_progress", "failed"):
            raise copy_error(self.error)  # it has failed: it was discarded, or is retried
        raise NotFound("Message not found")

    def follow(self, offset=0):
        """Yield the text from a character on as it grows, and None after each SILENCE_INTERVAL without text.

        Ends when the reply is over. Raises its error if it was deleted.
        """
        silent_since = time.monotonic()
        while True:
            row = self.load(offset)
            if row.text or time.monotonic() - silent_since > SILENCE_INTERVAL:
                yield row.text or None
                offset, silent_since = offset + len(row.text), time.monotonic()
            if row.status != "in_progress" or row.is_abandoned:
                return
            time.sleep(POLL_INTERVAL)

    def to_list(self):
        """Return the exchange as the API shows it after follow(), to which a reply in progress has failed."""
        row = self.load()
        return exchange_to_list(self.exchange, row.text, "failed" if row.status == "in_progress" else row.status)


def copy_error(error):
    """Return a copy of a reply's error, to raise or to keep: a raised one keeps its frames, which have the history.

    A 500 takes the place of one that cannot be copied, because its class needs arguments.
    """
    with suppress(Exception):
        return copy(error)
    return InternalServerError()


def exchange_to_list(exchange, text, status):
    """Return an exchange as the API shows it, with the text and the status that the reply has now."""
    reply = {**exchange.reply, "text": text, "status": status}
    if status == "complete":
        del reply["status"]
    return [exchange.question, reply]


class ReplyManager:
    """The replies that this process generates: a thread for each of them, and one that stores them all."""

    def __init__(self, app, bot):
        self.app = app
        self.bot = bot
        self.replies = {}  # by key
        self.counts = Counter()  # of replies in progress, by user
        self.followers = Counter()  # by user
        self.ended = deque()  # replies whose end is to be stored
        self.errors = {}  # by key, of the last replies that were lost or failed at once: requests may have read them
        self.delayed_ids = set()  # of replies that could not be stored at the last attempt
        self.lock = Lock()
        self.conversation_locks = WeakValueDictionary()
        self.wakeup = Event()
        self.is_storing = False
        self.is_shutting_down = False
        self.polled_at = self.saved_at = self.checked_at = -math.inf

    def start_or_join(self, exchange, request_id):
        """Return the reply of an exchange, which start() generates unless that was begun before; end the transaction.

        Raises what start() does.
        """
        reply = self.start(exchange, request_id) if exchange.history else self.join(exchange)
        db.session.close()  # holds no connection while the bot works
        return reply

    def start(self, exchange, request_id):
        """Commit the session, which has added the exchange, and generate its reply in the background; return the reply.

        Raises TooManyRequests if the user has MAX_CONCURRENT_REPLIES in progress in this process.
        """
        self.reserve(exchange.user_id)
        try:
            db.session.commit()
        except BaseException:
            self.release(self.counts, exchange.user_id)
            raise
        reply = Reply(exchange, request_id)
        if previous := self.replies.get((reply.id, exchange.attempt - 1)):  # was taken for dead
            self.end(previous, "failed", database_unavailable())
        with self.lock:
            self.replies[reply.key] = reply
            if not self.is_storing:
                self.is_storing = True
                Thread(target=self.store_in_background, name="replies", daemon=True).start()
        Thread(target=self.generate, args=[reply], name=f"reply-{reply.id}", daemon=True).start()
        return reply

    @contextmanager
    def lock_conversation(self, user_id, conversation_id):
        """Let one request of a user at a time add to a conversation: the others wait, without a database connection.

        Raises ServiceUnavailable after LOCK_TIMEOUT.
        """
        with self.lock:
            lock = self.conversation_locks.setdefault((user_id, conversation_id), Lock())
        if not lock.acquire(timeout=LOCK_TIMEOUT):
            raise ServiceUnavailable("The conversation is busy, try again later", retry_after=RETRY_AFTER)
        try:
            yield
        finally:
            lock.release()

    def reserve(self, user_id):
        """Count one more reply of a user, or raise TooManyRequests."""
        with self.lock:
            if self.is_shutting_down:
                raise ServiceUnavailable("The server is restarting, try again later", retry_after=RETRY_AFTER)
            if self.counts[user_id] >= self.app.config["MAX_CONCURRENT_REPLIES"]:
                raise TooManyRequests("Too many replies in progress, try again later", retry_after=RETRY_AFTER)
            self.counts[user_id] += 1

    def release(self, counts, user_id):
        """Count one of a user less."""
        with self.lock:
            counts[user_id] -= 1
            if not counts[user_id]:
                del counts[user_id]

    def follow(self, reply, offset=0):
        """Yield what the reply's follow() yields, and count the follower meanwhile."""
        user_id = reply.exchange.user_id
        with self.lock:
            self.followers[user_id] += 1
        try:
            yield from reply.follow(offset)
        finally:
            self.release(self.followers, user_id)

    def check_followers(self, user_id):
        """Raise TooManyRequests if a user has MAX_FOLLOWERS, before another request follows a reply in progress."""
        if self.followers[user_id] >= MAX_FOLLOWERS:
            raise TooManyRequests("Too many requests follow replies, try again later", retry_after=RETRY_AFTER)

    def get(self, exchange):
        """Return the reply of an exchange: the one that this process generates, or what is stored."""
        return self.replies.get(exchange.key) or StoredReply(exchange, self.errors.get(exchange.key))

    def join(self, exchange):
        """Return the reply of an exchange: one that is over as it was read, else as get() does."""
        return self.get(exchange) if exchange.reply.get("status") == "in_progress" else StoredReply(exchange)

    def stop(self, exchange):
        """Stop a reply in progress, or one whose process was taken for dead; that process stores it within a second."""
        if reply := self.replies.get(exchange.key):
            self.end(reply, "stopped")
            return
        id, attempt = exchange.key
        may_grow = Message.status.in_(["in_progress", "failed"])  # the latter, if its process was taken for dead
        is_reply = (Message.id == id) & (Message.attempt == attempt) & may_grow
        db.session.execute(update(Message).where(is_reply).values(stop_requested=True))
        db.session.commit()

    def fail_abandoned(self):
        """End the replies whose process was killed, of whatever server; look for them once in HEARTBEAT_INTERVAL.

        The request goes on if that is impossible now.
        """
        if time.monotonic() - self.checked_at >= HEARTBEAT_INTERVAL:
            self.checked_at = time.monotonic()
            try:
                fail_abandoned({id for id, _ in list(self.replies)})
            except SQLAlchemyError as error:
                self.app.logger.warning("Abandoned replies cannot be ended now: %s", get_reason(error))

    def shutdown(self, timeout):
        """Wait some seconds for the replies in progress, then end the others as failed, with the text so far."""
        self.is_shutting_down = True
        deadline = time.monotonic() + timeout
        while self.replies and time.monotonic() < deadline:
            time.sleep(0.05)
        for reply in list(self.replies.values()):
            self.end(reply, "failed", Interrupted())
        deadline = time.monotonic() + 2  # to store them
        while self.is_storing and time.monotonic() < deadline:
            self.wakeup.set()
            time.sleep(0.01)

    def generate(self, reply):
        """Run the bot, pass its chunks on to the reply, and end it."""
        status, error = self.run_bot(reply)
        self.call_source(reply, "close")
        if not reply.length and not error:
            error = BotError("the reply is empty")
        self.end(reply, "failed" if error else status, error)

    def run_bot(self, reply):
        """Pass the bot's chunks on to the reply; return the status that it is to have, and the error if it failed."""
        exchange = reply.exchange
        try:
            reply.source = self.bot(
                exchange.history, user_id=exchange.user_id, conversation_id=exchange.conversation_id
            )
            for chunk in reply.source:
                if not self.append(reply, chunk):
                    return "truncated", None
        except BotTruncated:
            return "truncated", None
        except BaseException as error:  # SystemExit, too, must not leave a reply in progress
            return "failed", error
        return "complete", None

    def call_source(self, reply, name):
        """Call the method `close` or `cancel` of what the bot returned, if it has that."""
        try:
            if method := getattr(reply.source, name, None):
                method()
        except BaseException as error:
            extra = {"request_id": reply.request_id}
            self.app.logger.error("The bot's %s() failed", name, exc_info=error, extra=extra)

    def append(self, reply, chunk):
        """Add a chunk to a reply; return False if the reply takes no more. The first chunk of an edit applies it."""
        chunk = chunk.replace("\0", "").encode("utf-8", "ignore").decode()  # what databases cannot store
        if not reply.length:
            chunk = chunk.lstrip()
        if not chunk or reply.status != "in_progress":
            return reply.status == "in_progress"
        if reply.exchange.is_pending_edit:
            self.apply_edit(reply)
        return reply.append(chunk)

    def apply_edit(self, reply):
        """Apply the edit that a reply belongs to, or end the reply if the edited message was deleted."""
        with self.app.app_context():
            if not reply.exchange.apply_edit():
                self.end(reply, "failed", self.get_lost_error(reply))

    def end(self, reply, status, error=None):
        """End a reply and have that stored."""
        if not reply.end(status, error):
            return
        if error:
            reply.error = to_http_exception(error)
        self.ended.append(reply)
        self.wakeup.set()
        if error:
            self.log_error(reply, error)
        self.call_source(reply, "cancel")

    def log_error(self, reply, error):
        """Log why a reply has failed, with a traceback if it is a bug."""
        extra = {"request_id": reply.request_id}
        if isinstance(error, BotError):
            self.app.logger.warning("The bot failed: %s: %s", type(error).__name__, str(error), extra=extra)
        elif isinstance(error, SQLAlchemyError):
            self.app.logger.error("The reply failed: %s", format_traceback(error), extra=extra)
        elif not isinstance(error, HTTPException):
            self.app.logger.error("The reply failed", exc_info=error, extra=extra)

    def store_in_background(self):
        """Store the replies until there are none for POLL_INTERVAL."""
        is_busy = True
        while is_busy:
            is_woken = self.wakeup.wait(LOCKED_INTERVAL if self.ended else POLL_INTERVAL)
            self.wakeup.clear()
            try:
                with self.app.app_context():
                    self.store()
                self.delayed_ids.clear()
            except Exception as error:
                self.log_delay(error)
                time.sleep(POLL_INTERVAL)
            with self.lock:
                is_busy = self.is_storing = bool(self.replies) or (is_woken and not self.is_shutting_down)

    def log_delay(self, error):
        """Log why replies cannot be stored now: once for each of them, with the id of its request."""
        is_unavailable = isinstance(error, DATABASE_UNAVAILABLE)
        reason = type(getattr(error, "orig", error)).__name__ if is_unavailable else format_traceback(error)
        for reply in list(self.replies.values()):
            if reply.id not in self.delayed_ids:
                self.delayed_ids.add(reply.id)
                extra = {"request_id": reply.request_id}
                self.app.logger.error("The reply cannot be stored, trying again: %s", reason, extra=extra)

    def store(self):
        """Store the replies that have ended; at each POLL_INTERVAL, look after those in progress."""
        self.store_ended()
        if time.monotonic() - self.polled_at >= POLL_INTERVAL:
            self.polled_at = time.monotonic()
            self.end_overdue()
            self.save_growing()

    def store_ended(self):
        """Store how replies ended, most of them together in one transaction, and tell their followers.

        Those of a conversation that a transaction has locked are left for the next time.
        """
        kept = []
        for reply in list(self.ended):
            exchange = reply.exchange
            is_edit = exchange.replaces_id is not None and not reply.length
            if (is_edit or reply.failed_at_once()) and touch_if_unlocked(db.session, {exchange.conversation_id}):
                continue
            if is_edit:
                exchange.read_is_applied()
            if reply.failed_at_once() and exchange.failed_text is None:
                exchange.discard()
                self.forget(reply, is_lost=True)
                continue
            if exchange.is_pending_edit:  # stopped before its first chunk
                exchange.apply_edit()
            kept.append(reply)
        if kept:
            locked_ids, lost_keys = save_replies([reply.to_row(reply.status) for reply in kept])
            for reply in kept:
                if reply.exchange.conversation_id not in locked_ids:
                    self.forget(reply, is_lost=reply.key in lost_keys)

    def forget(self, reply, is_lost):
        """Tell the followers of a reply that its end is in the database, and forget the reply."""
        if is_lost and not reply.error:
            reply.error = self.get_lost_error(reply)
        if is_lost or reply.failed_at_once():
            self.keep_error(reply)
        self.ended.remove(reply)
        del self.replies[reply.key]
        self.release(self.counts, reply.exchange.user_id)
        reply.set_stored(is_lost)

    def get_lost_error(self, reply):
        """Return the error of a reply that was deleted, or that another process took over."""
        with autocommit(db.engine).connect() as connection:
            if not Conversation.exists(connection, reply.exchange.conversation_id):
                return NotFound("Conversation not found")
            if not Message.exists(connection, reply.exchange.question["id"]):
                return NotFound("Message not found")
        return database_unavailable()  # it was, or the process of this reply was paused

    def keep_error(self, reply):
        """Keep the error of a reply that was lost or failed at once, but of the last MAX_ERRORS only."""
        self.errors[reply.key] = copy_error(reply.error)
        if len(self.errors) > MAX_ERRORS:
            del self.errors[next(iter(self.errors))]

    def end_overdue(self):
        """End the replies that were lost, that a user stops from another process, and that take too long."""
        replies = list(self.replies.values())  # before the query: one that starts after it must not look deleted
        states = read_states([reply.id for reply in replies]) if replies else {}
        for reply in replies:
            state = states.get(reply.key)
            reply.is_failed_by_others = state is not None and state.status == "failed"
            if state is None:
                self.end(reply, "failed", self.get_lost_error(reply))
            elif state.stop_requested:
                self.end(reply, "stopped")
            elif time.monotonic() - reply.started_at > self.app.config["BOT_MAX_SECONDS"]:
                overdue = BotTimeout(f"no end after {self.app.config['BOT_MAX_SECONDS']} s")
                self.end(reply, *(["truncated"] if reply.length else ["failed", overdue]))

    def save_growing(self):
        """Save the text of replies in progress once in SAVE_INTERVAL, and their heartbeats."""
        now = time.monotonic()
        if now - self.saved_at < SAVE_INTERVAL:
            return
        self.saved_at = now
        in_progress = [reply for reply in list(self.replies.values()) if reply.status == "in_progress"]
        changed = [reply for reply in in_progress if reply.length > reply.saved_length or reply.is_failed_by_others]
        if changed:
            lengths = [reply.length for reply in changed]
            locked_ids, _ = save_replies([reply.to_row("in_progress") for reply in changed])
            for reply, length in zip(changed, lengths, strict=True):
                if reply.exchange.conversation_id not in locked_ids:
                    reply.saved_length, reply.saved_at = length, now
        silent = [reply for reply in in_progress if now - reply.saved_at > HEARTBEAT_INTERVAL]
        if silent:
            save_heartbeats([reply.id for reply in silent])
            for reply in silent:
                reply.saved_at = now
