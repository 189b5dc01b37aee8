"""One half of a turn: who said what, when."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from sqlalchemy import CheckConstraint, ForeignKey, Index, String, Text
from sqlalchemy.orm import Mapped, mapped_column, relationship

from app import db
from app.sql import json_object, utc_text, where

if TYPE_CHECKING:
    from app.models.conversation import Conversation


class Message(db.Model):
    """What the user or the bot said in a conversation. It never changes, which Conversation.listed relies on."""

    id: Mapped[int] = mapped_column(primary_key=True)
    sender: Mapped[str] = mapped_column(String(4))
    text: Mapped[str] = mapped_column(Text)
    conversation_id: Mapped[int] = mapped_column(ForeignKey("conversation.id", ondelete="CASCADE"))
    created_at: Mapped[datetime]
    idempotency_key: Mapped[str | None] = mapped_column(String(255))

    conversation: Mapped[Conversation] = relationship(back_populates="messages")

    __table_args__ = (
        CheckConstraint("sender IN ('user', 'bot')", name="sender"),
        Index(None, "conversation_id", "id"),
        Index(None, "conversation_id", "idempotency_key", unique=True, **where("idempotency_key IS NOT NULL")),
        {"sqlite_autoincrement": True},
    )

    @classmethod
    def stretch(cls, conversation_id, limit=None, before=None):
        """Select id and wire format (`json`) of a conversation's messages, oldest first.

        With a `limit`, just so many, the newest; of ids below `before`.
        """
        query = db.select(cls.id, cls.json.label("json")).where(cls.conversation_id == conversation_id)
        query = query.correlate_except(cls)  # conversation_id may be a column of an outer query
        if before is not None:
            query = query.where(cls.id < before)
        if limit is None:
            return query.order_by(cls.id)
        newest = query.order_by(cls.id.desc()).limit(limit).subquery()
        return db.select(newest.c.id, newest.c.json).order_by(newest.c.id)

    @classmethod
    def pair_of(cls, conversation_id, key):
        """Return what Conversation.add_pair stored under a key: the user's text, both in the wire format; or None."""
        in_talk = cls.conversation_id == conversation_id
        first = db.select(cls.id).where(in_talk, cls.idempotency_key == key).scalar_subquery()
        pair = db.session.execute(
            db.select(cls.text, cls.json).where(in_talk, cls.id >= first).order_by(cls.id).limit(2)
        ).all()
        return (pair[0].text, [json for _, json in pair]) if pair else None


Message.json = json_object(
    id=Message.id,
    sender=Message.sender,
    text=Message.text,
    created_at=utc_text(Message.created_at),
)
"""A message in the wire format, as the database writes it."""
