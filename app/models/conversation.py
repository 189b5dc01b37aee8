"""A named talk of one user, and the queries that list talks."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from functools import cache
from weakref import WeakKeyDictionary

from orjson import Fragment
from sqlalchemy import ForeignKey, Index, String
from sqlalchemy.orm import Mapped, mapped_column, relationship

from app import db
from app.models.message import Message
from app.models.user import ALIVE, User
from app.sql import json_array


class Conversation(db.Model):
    """A named talk between one user and the bot."""

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(255))
    user_id: Mapped[int] = mapped_column(ForeignKey("user.id", ondelete="CASCADE"))
    created_at: Mapped[datetime] = mapped_column(default=lambda: datetime.now(UTC))

    user: Mapped[User] = relationship(back_populates="conversations")
    messages: Mapped[list[Message]] = relationship(
        back_populates="conversation", order_by=Message.id, passive_deletes=True
    )

    __table_args__ = (Index(None, "user_id", "id"), {"sqlite_autoincrement": True})
    __mapper_args__ = {"confirm_deleted_rows": False}  # it is fine when another request was faster

    @classmethod
    def owned(cls, conversation_id, user):
        """Return that conversation of that user, or None."""
        return db.session.scalar(OWNED, {"id": conversation_id, "user": user.id})

    @classmethod
    def listed(cls, user, only=None, limit=None, before=None, messages=None, q=None):
        """Return the user's conversations in the wire format, oldest first.

        `only`: just the one of that id. `limit`: at most so many, newest first, and of ids below `before`.
        `messages`: at most so many in each, its newest. `q`: just those with that text in the name or in a
        message, in any case.
        """
        query = listing(only is not None, limit is not None, before is not None, messages is not None)
        if q is not None:
            said = db.select(Message.id).where(Message.conversation_id == cls.id)
            said = said.where(Message.text.icontains(q, autoescape=True)).limit(1).scalar_subquery()
            # Not EXISTS, for which PostgreSQL may read everybody's messages.
            query = query.where(cls.name.icontains(q, autoescape=True) | said.is_not(None))
        given = {"user": user.id, "only": only, "limit": limit, "before": before, "messages": messages}

        def read(since):
            return db.session.connection().execute(query, {**given, "since": since}).all()

        if all(choice is None for choice in (only, limit, messages, q)):
            rows = LISTS.setdefault(db.engine, ListCache()).completed(user.id, read)
        else:
            rows = read(0)
        return [{"id": id, "name": name, "messages": Fragment(messages)} for id, name, _, messages in rows]

    @classmethod
    def history(cls, conversation_id, claim, limit):
        """Return the last `limit` messages of a conversation as (sender, text), oldest first.

        Nothing if it is not that of the user of the session (see User.claimed), or the session has ended.
        """
        with db.engine.connect() as connection:
            return connection.execute(LAST, {"id": conversation_id, **claim, "limit": limit}).all()[::-1]

    @classmethod
    def add_pair(cls, conversation_id, claim, text, asked_at, reply, key=None):
        """Store what the user said and what the bot replied; return both in the wire format, a JSON text each.

        This is a transaction of its own. None if the session (see User.claimed) has ended, or the conversation is not
        its user's. Raises IntegrityError if the conversation has a message of that idempotency key.
        """
        pair = {"text": text, "asked_at": asked_at, "key": key, "reply": reply, "replied_at": datetime.now(UTC)}
        with db.engine.begin() as connection:
            stored = connection.execute(ADD_PAIR, {"id": conversation_id, **claim, **pair}).all()
        return [json for _, json in sorted(stored)] or None

    def summary(self):
        """Return the conversation in the wire format, without its messages."""
        return {"id": self.id, "name": self.name}


class ListCache:
    """Whole lists of conversations as they were read lately. Messages never change, so only new ones are read again.

    At the first look after a minute all is forgotten, so that what was changed by hand shows; and when room runs out.
    """

    LIFETIME = 60  # seconds
    ROOM = 2**25  # bytes
    OVERHEAD = 200  # bytes that a conversation takes beside its messages

    def __init__(self):
        self.clear()

    def clear(self):
        self.lists, self.size, self.began = {}, 0, time.monotonic()

    def completed(self, key, read):
        """Return what `read(0)` does: (id, name, last message's id, messages as JSON) of each conversation.

        `read(since)` may leave out (None) messages where the last one's id is not above `since`.
        """
        if time.monotonic() - self.began > self.LIFETIME:
            self.clear()
        known, _ = self.lists.get(key, ({}, 0))
        rows = read(max((last or 0 for last, _ in known.values()), default=0))
        if any(messages is None and known.get(id, (None,))[0] != last for id, _, last, messages in rows):
            rows = read(0)
        listed = {id: known[id] if new is None else (last, new.encode()) for id, _, last, new in rows}
        if listed != known:
            self.put(key, listed)
        return [(id, name, *listed[id]) for id, name, _, _ in rows]

    def put(self, key, listed):
        """Keep a list in place of the former, unless it is longer than there is room."""
        size = sum(self.OVERHEAD + len(messages) for _, messages in listed.values())
        self.size -= self.lists.pop(key, ({}, 0))[1]
        if size > self.ROOM:
            return
        if self.size + size > self.ROOM:
            self.clear()
        self.lists[key] = listed, size
        self.size += size


LISTS = WeakKeyDictionary()  # each engine's ListCache

# Statements are built once: that takes longer than to run them.
OWN = (Conversation.id == db.bindparam("id")) & (Conversation.user_id == db.bindparam("user"))
OWNED = db.select(Conversation).where(OWN)
TALK = db.select(Conversation.id).join(Conversation.user).where(OWN, ALIVE)
LAST = (
    db.select(Message.sender, Message.text)
    .where(Message.conversation_id == db.bindparam("id"), TALK.exists())
    .order_by(Message.id.desc())
    .limit(db.bindparam("limit"))
)


def adding():
    """Build the statement of Conversation.add_pair: one, so that it takes one round trip and no BEGIN and COMMIT.

    It locks the conversation first: messages have the order of their ids, and the two stay next to each other.
    """
    talk = TALK.with_for_update(key_share=True, of=Conversation).cte("talk")

    def given(name, column):
        return db.bindparam(name, type_=column.type)

    said = given("text", Message.text), given("asked_at", Message.created_at), given("key", Message.idempotency_key)
    replied = given("reply", Message.text), given("replied_at", Message.created_at), db.null()
    halves = (
        db.select(talk.c.id, db.literal_column("'user'"), *said),
        db.select(talk.c.id, db.literal_column("'bot'"), *replied),
    )
    columns = ["conversation_id", "sender", "text", "created_at", "idempotency_key"]
    insert = Message.__table__.insert().from_select(columns, db.union_all(*halves))
    return insert.returning(Message.id, Message.json).execution_options(alone=True)


ADD_PAIR = adding()


@cache
def listing(only, limit, before, messages):
    """Build the statement of Conversation.listed, with these parameters or without."""
    of_talk = Message.conversation_id == Conversation.id
    last = db.select(db.func.max(Message.id)).where(of_talk).scalar_subquery()
    shown = Message.stretch(Conversation.id, db.bindparam("messages") if messages else None).subquery()
    texts = db.case((last <= db.bindparam("since"), None), else_=db.select(json_array(shown.c.json)).scalar_subquery())
    query = db.select(Conversation.id, Conversation.name, last, texts)
    query = query.where(Conversation.user_id == db.bindparam("user"))
    if only:
        query = query.where(Conversation.id == db.bindparam("only"))
    if before:
        query = query.where(Conversation.id < db.bindparam("before"))
    if limit:
        return query.order_by(Conversation.id.desc()).limit(db.bindparam("limit"))
    return query.order_by(Conversation.id)
