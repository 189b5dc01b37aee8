"""Exchanges: a user's message and the bot's reply, from its beginning to its end."""

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import bindparam, case, delete, func, insert, literal, null, or_, select, union_all, update

from app import db
from app.database import autocommit, database_now
from app.models.conversation import Conversation, touch, touch_if_unlocked
from app.models.message import HEARTBEAT_TIMEOUT, Message, message_to_dict

MAX_HISTORY_MESSAGES = 200  # that a bot gets
SWEEP_LOCK_TIMEOUT = 1  # seconds that a request waits on SQLite to end the replies of killed processes

# These statements are built once and are of tables, for the reason that app/models/conversation.py has.
messages = Message.__table__
SAVE_REPLY = (
    update(messages)
    .where(
        messages.c.id == bindparam("reply_id"),
        messages.c.attempt == bindparam("current_attempt"),
        # "failed": fail_abandoned() took this process for dead, but it had lost the database, or was paused
        or_(messages.c.status == "in_progress", messages.c.status == "failed"),
    )
    .values(
        text=bindparam("new_text"),
        status=bindparam("new_status"),
        heartbeat_at=case((bindparam("new_status") == "in_progress", database_now())),
    )
)
# The messages before one, the newest first; a text beyond `max_chars` is cut there. A running total of the lengths by
# the database would take three times as long.
SELECT_HISTORY = (
    select(messages.c.sender, func.substr(messages.c.text, 1, bindparam("max_chars") + 1))
    .where(
        messages.c.conversation_id == bindparam("conversation_id"),
        messages.c.id < bindparam("before_id"),
        messages.c.replaces_id.is_(None),
        messages.c.text != "",
    )
    .order_by(messages.c.id.desc())
    .limit(MAX_HISTORY_MESSAGES)
)


def insert_exchange():
    """Return the statement that inserts a user's message and an empty reply, and returns the two ids."""
    both = [
        bindparam("conversation_id", type_=messages.c.conversation_id.type),
        bindparam("now", type_=messages.c.created_at.type),
        bindparam("replaces_id", type_=messages.c.replaces_id.type),
        bindparam("attempt", type_=messages.c.attempt.type),
    ]
    question = select(
        *both,
        literal("user"),
        bindparam("new_text", type_=messages.c.text.type),
        literal("complete"),
        bindparam("key", type_=messages.c.idempotency_key.type),
        bindparam("sent_text_hash", type_=messages.c.sent_text_hash.type),
        null(),
    )
    reply = select(*both, literal("bot"), literal(""), literal("in_progress"), null(), null(), database_now())
    columns = ["conversation_id", "created_at", "replaces_id", "attempt", "sender", "text", "status"]
    columns += ["idempotency_key", "sent_text_hash", "heartbeat_at"]
    rows = union_all(question, reply)
    return insert(messages).from_select(columns, rows, include_defaults=False).returning(messages.c.id)


INSERT_EXCHANGE = insert_exchange()


@dataclass
class Exchange:
    """A user's message and the bot's reply to it, both as the API shows them.

    `history` is what the bot gets, the new message last, if this process is to generate the reply; else None.
    """

    conversation_id: int
    user_id: int
    question: dict
    reply: dict
    attempt: int = 1  # see Message.attempt
    history: list | None = None
    replaces_id: int | None = None  # the message that an edit replaces
    is_applied: bool = False  # see apply_edit()
    failed_text: str | None = None  # the reply's text before it was retried; lost if the process is killed now
    is_other_text: bool = False  # the idempotency key came with another text before

    @property
    def key(self):
        """Return (id of the reply, attempt): a reply that is retried has the same id, but another key."""
        return self.reply["id"], self.attempt

    @property
    def is_pending_edit(self):
        """Return whether this is an edit that has changed nothing yet."""
        return self.replaces_id is not None and not self.is_applied

    @classmethod
    def get(cls, user_id, message):
        """Return the exchange that a message of the user's conversation belongs to, or None if it has no reply."""
        if message.sender == "user":
            reply = message.get_reply()
            question = Message.get(message.conversation_id, message.id)  # again: the reply may be that of a later edit
        else:
            question, reply = message.get_question(), message
        if not (question and reply):
            return None
        fields = question.to_dict()
        if reply.replaces_id:
            pending = Message.get_pending_edit(message.conversation_id, "user")
            if pending is None:  # the edit has been applied or discarded since the reply was read
                conversation_id, message_id = message.conversation_id, message.id
                db.session.expire_all()
                message = Message.get(conversation_id, message_id)
                return message and cls.get(user_id, message)
            fields["text"] = pending.text
        return cls(
            message.conversation_id, user_id, fields, reply.to_dict(), reply.attempt, replaces_id=reply.replaces_id
        )

    @classmethod
    def get_by_key(cls, conversation_id, user_id, key, text):
        """Return the exchange of an idempotency key in the user's conversation, or None."""
        query = select(Message).where(Message.conversation_id == conversation_id, Message.idempotency_key == key)
        message = db.session.scalar(query.join(Message.conversation).where(Conversation.user_id == user_id))
        exchange = message and cls.get(user_id, message)
        if exchange:
            exchange.is_other_text = message.sent_text_hash != hash_text(text)
        return exchange

    @classmethod
    def add(cls, conversation_id, user_id, text, max_history_chars, key=None):
        """Add a user's message and an empty reply; return None if the user has no such conversation.

        If a message with this idempotency key exists, return its exchange: to be generated again if the reply failed.
        """
        if not touch(conversation_id, user_id):
            return None
        if key and (existing := cls.get_by_key(conversation_id, user_id, key, text)):
            return existing.retry(text, max_history_chars)
        return cls.insert(conversation_id, user_id, text, key=key).with_history(text, max_history_chars)

    @classmethod
    def edit(cls, question, user_id, text, max_history_chars, attempt):
        """Add an exchange that replaces a message of the user once the reply begins; call touch() before."""
        exchange = cls.insert(question.conversation_id, user_id, text, replaces_id=question.id, attempt=attempt)
        exchange.question = {**question.to_dict(), "text": text}
        return exchange.with_history(text, max_history_chars)

    @classmethod
    def insert(cls, conversation_id, user_id, text, key=None, replaces_id=None, attempt=1):
        """Insert the two messages of an exchange; call touch() before."""
        now = datetime.now(UTC)
        values = {"conversation_id": conversation_id, "now": now, "new_text": text, "key": key}
        values |= {"sent_text_hash": key and hash_text(text), "replaces_id": replaces_id, "attempt": attempt}
        question_id, reply_id = sorted(db.session.scalars(INSERT_EXCHANGE, values))
        return cls(
            conversation_id,
            user_id,
            question=message_to_dict(question_id, "user", text, now),
            reply=message_to_dict(reply_id, "bot", "", now, "in_progress"),
            attempt=attempt,
            replaces_id=replaces_id,
        )

    def retry(self, text, max_history_chars):
        """Restart a failed reply if the text is the same as before; return this exchange; call touch() before."""
        if self.reply.get("status") != "failed" or text != self.question["text"] or self.is_other_text:
            return self
        self.attempt += 1
        db.session.execute(
            update(Message)
            .where(Message.id == self.reply["id"], Message.status == "failed")
            .values(text="", status="in_progress", heartbeat_at=database_now(), stop_requested=False)
            .values(attempt=self.attempt)
        )
        self.failed_text = self.reply["text"]
        self.reply.update(text="", status="in_progress")
        return self.with_history(text, max_history_chars)

    def with_history(self, text, max_history_chars):
        """Read the history that the bot gets: as many of the last messages as fit; return this exchange."""
        room = max(0, max_history_chars - len(text))
        values = {"conversation_id": self.conversation_id, "before_id": self.question["id"], "max_chars": room}
        history = [("user", text)]
        for sender, message_text in db.session.execute(SELECT_HISTORY, values).all():
            room -= len(message_text)
            if room < 0:
                break
            history.append((sender, message_text))
        self.history = history[::-1]
        return self

    def apply_edit(self):
        """Replace the edited message, and drop what came after it, now that the reply begins; commit.

        Returns False if the exchange has been deleted.
        """
        touch(self.conversation_id, self.user_id)
        reply_id, question_id = self.reply["id"], self.replaces_id
        show = update(Message).where(Message.id == reply_id).values(replaces_id=None)
        if db.session.execute(show).rowcount == 0:
            return False
        in_between = (Message.id > question_id) & (Message.id < reply_id)
        db.session.execute(delete(Message).where(Message.conversation_id == self.conversation_id, in_between))
        db.session.execute(update(Message).where(Message.id == question_id).values(text=self.question["text"]))
        db.session.commit()
        self.is_applied = True
        return True

    def read_is_applied(self):
        """Read whether the edit was applied, as another thread may be doing that; call touch_if_unlocked() before."""
        query = select(Message.replaces_id).where(Message.id == self.reply["id"])
        row = db.session.execute(query).one_or_none()
        self.is_applied = row is not None and row.replaces_id is None

    def discard(self):
        """Delete what the request stored, because the bot failed before its first chunk; commit.

        Nothing is deleted if another process took over the reply, or discarded it.
        """
        touch(self.conversation_id, self.user_id)
        reply_id, attempt = self.key
        deleted = db.session.execute(delete(Message).where(Message.id == reply_id, Message.attempt == attempt))
        if deleted.rowcount:
            is_question = (
                Message.replaces_id == self.replaces_id if self.replaces_id else Message.id == self.question["id"]
            )
            db.session.execute(delete(Message).where(Message.conversation_id == self.conversation_id, is_question))
        db.session.commit()


def hash_text(text):
    """Return the SHA-256 hash of a text, in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def save_replies(rows):
    """Store the text and the status of replies, each a (conversation_id, id, attempt, text, status); commit.

    Returns the ids of the conversations that a transaction has locked, whose replies are to be stored later, and the
    keys of the replies that cannot be stored: they were deleted, or another process took them over.
    """
    locked_ids = touch_if_unlocked(db.session, {conversation_id for conversation_id, *_ in rows})
    rows = sorted(row for row in rows if row[0] not in locked_ids)
    values = [
        {"reply_id": id, "current_attempt": attempt, "new_text": text, "new_status": status}
        for _, id, attempt, text, status in rows
    ]
    lost_keys = set()
    if values and db.session.execute(SAVE_REPLY, values).rowcount != len(values):
        keys = {(id, attempt) for _, id, attempt, *_ in rows}
        stored = select(Message.id, Message.attempt).where(Message.id.in_([id for id, _ in keys]))
        lost_keys = keys - {(row.id, row.attempt) for row in db.session.execute(stored)}
    db.session.commit()
    return locked_ids, lost_keys


def save_heartbeats(ids):
    """Record that replies in progress are being generated, unless a transaction has locked them; commit."""
    in_progress = select(Message.id).where(Message.id.in_(ids), Message.status == "in_progress")
    unlocked = in_progress.with_for_update(skip_locked=True, key_share=True)
    heartbeat = update(messages).where(messages.c.id.in_(unlocked)).values(heartbeat_at=database_now())
    db.session.execute(heartbeat)
    db.session.commit()


def read_states(ids):
    """Return rows (stop_requested, status) by key, of the replies with these ids that exist."""
    with autocommit(db.engine).connect() as connection:
        query = select(Message.id, Message.attempt, Message.stop_requested, Message.status)
        return {(row.id, row.attempt): row for row in connection.execute(query.where(Message.id.in_(ids)))}


def fail_abandoned(own_ids=()):
    """End the replies whose process was killed, which the caller's own are not. A pending edit is deleted.

    Those of a conversation that a transaction has locked are left for the next time.
    """
    is_abandoned = (messages.c.status == "in_progress") & (messages.c.heartbeat_at < database_now(-HEARTBEAT_TIMEOUT))
    with autocommit(db.engine).connect() as connection:
        query = select(messages.c.id, messages.c.conversation_id).where(is_abandoned)
        rows = [row for row in connection.execute(query).all() if row.id not in own_ids]
    if not rows:
        return
    with db.engine.execution_options(lock_timeout=SWEEP_LOCK_TIMEOUT).begin() as connection:
        locked_ids = touch_if_unlocked(connection, {row.conversation_id for row in rows})
        is_abandoned &= messages.c.id.in_([row.id for row in rows if row.conversation_id not in locked_ids])
        is_edit = messages.c.replaces_id.is_not(None)
        edited_ids = connection.scalars(delete(messages).where(is_abandoned, is_edit).returning(messages.c.replaces_id))
        connection.execute(delete(messages).where(messages.c.replaces_id.in_(edited_ids.all())))
        connection.execute(update(messages).where(is_abandoned).values(status="failed", heartbeat_at=None))
