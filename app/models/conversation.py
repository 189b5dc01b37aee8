"""A named talk of one user, and the queries that list talks."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import cache

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
        return [
            {"id": id, "name": name, "messages": Fragment(f"[{texts or ''}]")}
            for id, name, texts in db.session.connection().execute(query, given)
        ]

    @classmethod
    def lock(cls, conversation_id, user):
        """Keep others from changing that conversation until the transaction ends.

        False if it is gone, or if the session of `user`, whose it is, has ended.
        """
        given = {"id": conversation_id, "user": user.id, "moment": user.moment}
        return db.session.connection().scalar(LOCKED, given) is not None

    @classmethod
    def history(cls, conversation_id, user, limit):
        """Return the last `limit` messages of a conversation of that user as (sender, text), oldest first."""
        given = {"id": conversation_id, "user": user.id, "limit": limit}
        return [tuple(row) for row in db.session.connection().execute(LAST, given)][::-1]

    def summary(self):
        """Return the conversation in the wire format, without its messages."""
        return {"id": self.id, "name": self.name}


# Statements are built once: that takes longer than to run them.
OWN = (Conversation.id == db.bindparam("id")) & (Conversation.user_id == db.bindparam("user"))
OWNED = db.select(Conversation).where(OWN)
LOCKED = (
    db.select(Conversation.id)
    .join(Conversation.user)
    .where(OWN, ALIVE)
    .with_for_update(key_share=True, of=Conversation)
)
LAST = (
    db.select(Message.sender, Message.text)
    .where(Message.conversation_id == db.bindparam("id"), db.select(Conversation.id).where(OWN).exists())
    .order_by(Message.id.desc())
    .limit(db.bindparam("limit"))
)


@cache
def listing(only, limit, before, messages):
    """Build the statement of Conversation.listed, with these parameters or without."""
    shown = Message.stretch(Conversation.id, db.bindparam("messages") if messages else None).subquery()
    texts = db.select(db.func.aggregate_strings(shown.c.json, ",")).scalar_subquery()
    query = db.select(Conversation.id, Conversation.name, texts).where(Conversation.user_id == db.bindparam("user"))
    if only:
        query = query.where(Conversation.id == db.bindparam("only"))
    if before:
        query = query.where(Conversation.id < db.bindparam("before"))
    if limit:
        return query.order_by(Conversation.id.desc()).limit(db.bindparam("limit"))
    return query.order_by(Conversation.id)
