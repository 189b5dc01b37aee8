"""Exchanges: a user's message, which is called question here, and the bot's reply to it."""

from dataclasses import dataclass
from datetime import UTC, datetime

import orjson
from sqlalchemy import BigInteger, bindparam, case, cast, func, insert, select, update

from app import db
from app.database import autocommit, database_now, json_each
from app.models.conversation import Conversation
from app.models.message import Message, message_to_dict
from app.validation import is_blank

HEARTBEAT_TIMEOUT = 30  # seconds without a heartbeat after which a reply in progress is abandoned: it has failed
INTERRUPTED = "The server was stopped"  # the error of such a reply, and of one that a shutdown has ended
MAX_HISTORY_MESSAGES = 200  # that a bot gets

# These statements are built once, and of tables: building them of models would take a third of the CPU time of a send.
conversations, messages = Conversation.__table__, Message.__table__
TOUCH_CONVERSATION = (
    update(conversations)
    .where(conversations.c.id == bindparam("conversation_id"), conversations.c.user_id == bindparam("owner_id"))
    .values(updated_at=bindparam("now"), archived_at=None)
)
SELECT_LAST_ID = select(func.max(messages.c.id)).where(
    messages.c.conversation_id == bindparam("of_conversation_id"), messages.c.is_current
)
INSERT_MESSAGE = (
    insert(messages)
    .values(
        status=bindparam("new_status"), heartbeat_at=case((bindparam("new_status") == "in_progress", database_now()))
    )
    .returning(messages.c.id)
)
APPEND_MESSAGE = INSERT_MESSAGE.values(parent_id=SELECT_LAST_ID.scalar_subquery())
SELECT_HISTORY = (
    select(messages.c.sender, func.substr(messages.c.text, 1, bindparam("max_chars") + 1), messages.c.status)
    .where(
        messages.c.conversation_id == bindparam("conversation_id"),
        messages.c.is_current,
        messages.c.id < bindparam("before_id"),
    )
    .order_by(messages.c.id.desc())
    .limit(MAX_HISTORY_MESSAGES)
)
SELECT_REPLIES = select(messages.c.id, messages.c.text, messages.c.status, messages.c.error).where(
    messages.c.id.in_(bindparam("ids", expanding=True))
)
# One UPDATE saves the texts of many replies, a JSON object of them by id: on a busy machine, an UPDATE for each of 130
# replies took 5 s, as the thread waits for its turn after each.
TEXTS = json_each(bindparam("texts")).table_valued("key", "value", name="texts")
UPDATE_REPLIES = (
    update(messages)
    .where(messages.c.id == cast(TEXTS.c.key, BigInteger), messages.c.status == "in_progress")
    .values(text=TEXTS.c.value)
)
UPDATE_TEXTS = UPDATE_REPLIES.values(heartbeat_at=database_now())
UPDATE_ENDS = UPDATE_REPLIES.values(status=bindparam("new_status"), error=bindparam("new_error"), heartbeat_at=None)


@dataclass
class Exchange:
    """A question and a reply to it, both as the API shows them. `is_new`: this process is to generate the reply."""

    conversation_id: int
    user_id: int
    question: dict
    reply: dict
    is_new: bool = False

    @property
    def is_in_progress(self):
        """Return whether the reply was in progress when the exchange was read."""
        return self.reply.get("status") == "in_progress"

    @classmethod
    def get(cls, user_id, message):
        """Return the exchange of a question and its current reply, or of a reply; None if there is no reply."""
        if message.sender == "user":
            question, reply = message, message.get_reply()
        else:
            question, reply = message.parent, message
        return reply and cls(message.conversation_id, user_id, question.to_dict(), reply.to_dict())

    @classmethod
    def add(cls, conversation_id, user_id, text, key=None):
        """Add a question after the last current message, and an empty reply; call lock_conversation() before."""
        values = {"of_conversation_id": conversation_id, "idempotency_key": key}
        question = insert_message(APPEND_MESSAGE, conversation_id, "user", text, **values)
        return cls.add_reply(conversation_id, user_id, question)

    @classmethod
    def add_version(cls, message, user_id, text, key=None):
        """Add another version of a question, and an empty reply, as the current ones; call lock_conversation() before.

        With the same text, only the reply is added, which then has the key.
        """
        question = message.to_dict()
        if text != message.text:
            values = {"parent_id": message.parent_id, "idempotency_key": key}
            question = insert_message(INSERT_MESSAGE, message.conversation_id, "user", text, **values)
            key = None
        exchange = cls.add_reply(message.conversation_id, user_id, question, key)
        Message.show_branch(message.conversation_id, exchange.reply["id"])
        return exchange

    @classmethod
    def add_reply(cls, conversation_id, user_id, question, key=None):
        """Add an empty reply to a question."""
        values = {"parent_id": question["id"], "idempotency_key": key}
        reply = insert_message(INSERT_MESSAGE, conversation_id, "bot", "", status="in_progress", **values)
        return cls(conversation_id, user_id, question, reply, is_new=True)

    @property
    def has_failed(self):
        """Return whether the reply had failed when the exchange was read."""
        return self.reply.get("status") == "failed"

    def is_last(self):
        """Return whether the reply is the last current message of the conversation."""
        return db.session.scalar(SELECT_LAST_ID, {"of_conversation_id": self.conversation_id}) == self.reply["id"]

    def read_history(self, max_chars):
        """Return what the bot gets, [(sender, text)], oldest first: the question, and as much before it as fits.

        Blank replies are left out, and the questions of those that failed.
        """
        text = self.question["text"]
        room = max(0, max_chars - len(text))
        values = {"conversation_id": self.conversation_id, "before_id": self.question["id"], "max_chars": room}
        history = [("user", text)]
        is_question_of_failed = False
        for sender, message_text, status in db.session.execute(SELECT_HISTORY, values).all():
            is_left_out = is_question_of_failed or is_blank(message_text[:1000])
            is_question_of_failed = not message_text and status == "failed"
            if is_left_out:
                continue
            room -= len(message_text)
            if room < 0:
                break
            history.append((sender, message_text))
        return history[::-1]


def lock_conversation(conversation_id, user_id):
    """Lock the user's conversation by updating it, which unarchives it, too; return False if there is none."""
    values = {"conversation_id": conversation_id, "owner_id": user_id, "now": datetime.now(UTC)}
    return db.session.execute(TOUCH_CONVERSATION, values).rowcount == 1


def insert_message(statement, conversation_id, sender, text, status="complete", **values):
    """Insert a message by one of the statements above; return it as the API shows it."""
    now = datetime.now(UTC)
    values |= {"conversation_id": conversation_id, "sender": sender, "text": text, "new_status": status}
    id = db.session.scalar(statement, {**values, "created_at": now, "is_current": True})
    return message_to_dict(id, sender, text, now, status)


def update_texts(texts):
    """Save the texts, by id, of replies in progress, with a heartbeat; commit."""
    update_replies(UPDATE_TEXTS, texts)
    db.session.commit()


def update_ends(ends):
    """Save how replies ended, (text, status, error) by id; commit; return whether all of them were in progress.

    Those that were not, because another process ended or deleted them, are left as they are.
    """
    count = 0
    for status, error in {end[1:] for end in ends.values()}:
        texts = {id: end[0] for id, end in ends.items() if end[1:] == (status, error)}
        count += update_replies(UPDATE_ENDS, texts, new_status=status, new_error=error)
    db.session.commit()
    return count == len(ends)


def update_replies(statement, texts, **values):
    """Update those of the replies that are in progress; return their number."""
    json = orjson.dumps(texts, option=orjson.OPT_NON_STR_KEYS).decode()
    return db.session.execute(statement, {"texts": json, **values}).rowcount


def read_replies(ids):
    """Return (text, status, error) by id of the replies with these ids that exist."""
    with autocommit(db.engine).connect() as connection:
        return {id: values for id, *values in connection.execute(SELECT_REPLIES, {"ids": ids})}


def list_in_progress(ids):
    """Return those of the ids whose replies are in progress."""
    query = select(Message.id).where(Message.id.in_(ids), Message.status == "in_progress")
    with autocommit(db.engine).connect() as connection:
        return set(connection.scalars(query))


def set_stopped(id):
    """Stop a reply in progress, with the text saved last; commit. The process that generates it notices that soon."""
    is_in_progress = (Message.id == id) & (Message.status == "in_progress")
    db.session.execute(update(Message).where(is_in_progress).values(status="stopped", heartbeat_at=None))
    db.session.commit()


def set_abandoned_failed(own_ids):
    """End the replies of other processes that are abandoned; commit. Those of this process are only late."""
    is_abandoned = (Message.status == "in_progress") & (Message.heartbeat_at < database_now(-HEARTBEAT_TIMEOUT))
    with autocommit(db.engine).connect() as connection:
        ids = set(connection.scalars(select(Message.id).where(is_abandoned))) - own_ids
    if ids:
        with db.engine.begin() as connection:
            failed = {"status": "failed", "error": INTERRUPTED, "heartbeat_at": None}
            connection.execute(update(Message).where(Message.id.in_(ids), is_abandoned).values(**failed))
