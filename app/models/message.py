"""One half of a turn: who said what, when."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from sqlalchemy import CheckConstraint, ForeignKey, Index, String, Text
from sqlalchemy.orm import Mapped, mapped_column, relationship

from app import db
from app.sql import json_object, utc_text

if TYPE_CHECKING:
    from app.models.conversation import Conversation


class Message(db.Model):
    """What the user or the bot said in a conversation."""

    id: Mapped[int] = mapped_column(primary_key=True)
    sender: Mapped[str] = mapped_column(String(4))
    text: Mapped[str] = mapped_column(Text)
    conversation_id: Mapped[int] = mapped_column(ForeignKey("conversation.id", ondelete="CASCADE"))
    created_at: Mapped[datetime]

    conversation: Mapped[Conversation] = relationship(back_populates="messages")

    __table_args__ = (
        CheckConstraint("sender IN ('user', 'bot')", name="sender"),
        Index(None, "conversation_id", "id"),
        {"sqlite_autoincrement": True},
    )

    @classmethod
    def add_pair(cls, conversation_id, text, asked_at, reply):
        """Insert what a user said and what the bot replied; return both in the wire format, a JSON text each."""
        pair = [
            {"sender": "user", "text": text, "created_at": asked_at},
            {"sender": "bot", "text": reply, "created_at": datetime.now(UTC)},
        ]
        insert = (
            db.insert(cls).values(conversation_id=conversation_id).returning(cls.json, sort_by_parameter_order=True)
        )
        return db.session.scalars(insert, pair).all()


Message.json = json_object(
    *("id", Message.id),
    *("sender", Message.sender),
    *("text", Message.text),
    *("created_at", utc_text(Message.created_at)),
)
"""A message in the wire format, as the database writes it."""
