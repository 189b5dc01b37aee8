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
        lists = LISTS.setdefault(db.engine, ListCache())
        key = (user.id, messages) if only is limit is q is None else None  # pages are short
        # Messages are read where there are newer ones than all that are known; a second time, if that is not enough.
        for known in (lists.get(key), {}):
            given["known"] = max((last for last, _ in known.values()), default=0)
            rows = db.session.connection().execute(query, given).all()
            new = {id: (last, f"[{texts}]".encode()) for id, _, last, texts in rows if texts is not None}
            shown = {id: new.get(id) or known.get(id, NONE) for id, _, _, _ in rows}
            if all(shown[id][0] == last for id, _, last, _ in rows):
                break
        if key and new:
            lists.put(key, shown)
        return [{"id": id, "name": name, "messages": Fragment(shown[id][1])} for id, name, _, _ in rows]

    @classmethod
    def history(cls, conversation_id, caller, limit):
        """Return the last `limit` messages of the caller's conversation as (sender, text), oldest first.

        `caller` is what User.claimed tells; none if their session has ended.
        """
        given = {"id": conversation_id, **caller, "limit": limit}
        with db.engine.connect() as connection:
            return connection.execute(LAST, given).all()[::-1]

    @classmethod
    def add_pair(cls, conversation_id, caller, text, asked_at, reply, key=None):
        """Store what the caller said and what the bot replied; return both in the wire format, a JSON text each.

        `caller` is what User.claimed tells. None if their session has ended, or the conversation is gone. Raises
        IntegrityError if the conversation has a message of that idempotency key.
        """
        pair = {"text": text, "asked_at": asked_at, "key": key}
        pair |= {"reply": reply, "replied_at": datetime.now(UTC), "no_key": None}
        with db.engine.begin() as connection:
            found = connection.execute(ADD_PAIR, {"id": conversation_id, **caller, **pair}).all()
        return [json for _, json in sorted(found)] or None

    def summary(self):
        """Return the conversation in the wire format, without its messages."""
        return {"id": self.id, "name": self.name}


class ListCache:
    """What was listed lately: by conversation, the id of its last message, and its messages as JSON.

    Messages never change, so these are still the same while the last one is. All is forgotten once a minute, so that
    what was changed by hand shows, and when there is no room left.
    """

    LIFETIME = 60  # seconds
    ROOM = 2**25  # bytes

    def __init__(self):
        self.clear()

    def clear(self):
        self.lists, self.size, self.began = {}, 0, time.monotonic()

    def get(self, key):
        """Return {conversation's id: (last message's id, messages)}, empty if there is nothing of that key."""
        if time.monotonic() - self.began > self.LIFETIME:
            self.clear()
        return self.lists.get(key, ({}, 0))[0]

    def put(self, key, listed):
        """Keep a list, in place of the former, if there is room for it."""
        size = sum(len(messages) for _, messages in listed.values())
        self.size -= self.lists.pop(key, ({}, 0))[1]
        if self.size + size > self.ROOM:
            self.clear()
        if size <= self.ROOM:
            self.lists[key] = listed, size
            self.size += size


LISTS = WeakKeyDictionary()  # each engine's ListCache
NONE = (0, b"[]")

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
    columns = Message.sender, Message.text, Message.created_at, Message.idempotency_key

    def half(sender, *names):
        given = (db.bindparam(name, type_=column.type) for name, column in zip(names, columns[1:], strict=True))
        return db.select(talk.c.id, db.literal_column(f"'{sender}'"), *given)

    halves = half("user", "text", "asked_at", "key"), half("bot", "reply", "replied_at", "no_key")
    insert = Message.__table__.insert().from_select(["conversation_id", *columns], db.union_all(*halves))
    return insert.returning(Message.id, Message.json).execution_options(alone=True)


ADD_PAIR = adding()


@cache
def listing(only, limit, before, messages):
    """Build the statement of Conversation.listed, with these parameters or without."""
    of_talk = Message.conversation_id == Conversation.id
    last = db.select(db.func.coalesce(db.func.max(Message.id), 0)).where(of_talk).scalar_subquery()
    shown = Message.stretch(Conversation.id, db.bindparam("messages") if messages else None).subquery()
    texts = db.select(db.func.coalesce(db.func.aggregate_strings(shown.c.json, ","), "")).scalar_subquery()
    texts = db.case((last > db.bindparam("known"), texts))
    query = db.select(Conversation.id, Conversation.name, last, texts)
    query = query.where(Conversation.user_id == db.bindparam("user"))
    if only:
        query = query.where(Conversation.id == db.bindparam("only"))
    if before:
        query = query.where(Conversation.id < db.bindparam("before"))
    if limit:
        return query.order_by(Conversation.id.desc()).limit(db.bindparam("limit"))
    return query.order_by(Conversation.id)
