"""A named talk of one user, and the queries that list talks."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from orjson import Fragment
from sqlalchemy import ForeignKey, Index, String
from sqlalchemy.orm import Mapped, mapped_column, relationship

from app import db
from app.models.message import Message

if TYPE_CHECKING:
    from app.models.user import User


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
        return db.session.scalar(db.select(cls).where(cls.id == conversation_id, cls.user_id == user.id))

    @classmethod
    def listed(cls, user, only=None, limit=None, before=None, messages=None, q=None):
        """Return the user's conversations in the wire format, oldest first.

        `only`: just the one of that id. `limit`: at most so many, newest first, and of ids below `before`.
        `messages`: at most so many in each, its newest. `q`: just those with that text in the name or in a
        message, in any case.
        """
        shown = Message.stretch(cls.id, messages).subquery()
        texts = db.select(db.func.aggregate_strings(shown.c.json, ",")).scalar_subquery()
        query = db.select(cls.id, cls.name, texts).where(cls.user_id == user.id)
        if only is not None:
            query = query.where(cls.id == only)
        if before is not None:
            query = query.where(cls.id < before)
        if q is not None:
            said = db.select(Message.id).where(Message.conversation_id == cls.id)
            said = said.where(Message.text.icontains(q, autoescape=True)).limit(1).scalar_subquery()
            # Not EXISTS, for which PostgreSQL may read everybody's messages.
            query = query.where(cls.name.icontains(q, autoescape=True) | said.is_not(None))
        query = query.order_by(cls.id) if limit is None else query.order_by(cls.id.desc()).limit(limit)
        return [
            {"id": id, "name": name, "messages": Fragment(f"[{texts or ''}]")}
            for id, name, texts in db.session.execute(query)
        ]

    def history(self, limit):
        """Return the last `limit` messages as (sender, text), oldest first."""
        last = db.select(Message.sender, Message.text).where(Message.conversation_id == self.id)
        return [tuple(row) for row in db.session.execute(last.order_by(Message.id.desc()).limit(limit))][::-1]

    def summary(self):
        """Return the conversation in the wire format, without its messages."""
        return {"id": self.id, "name": self.name}
