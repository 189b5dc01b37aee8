"""Messages and the queries that read them."""

from __future__ import annotations

import unicodedata
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from sqlalchemy import CheckConstraint, ForeignKey, Index, String, Text, case, func, select, true, update
from sqlalchemy.orm import Mapped, aliased, mapped_column, relationship

from app import db
from app.database import fold_case, format_timestamp, iso8601, json_object, partial_index

if TYPE_CHECKING:
    from app.models.conversation import Conversation

SNIPPET_CONTEXT = 60  # characters before and after the match of a search

# A user's message is always complete. A reply begins in progress, and each other status is final: the process that
# generates the reply sets complete, truncated, stopped or failed; any process may set stopped, and failed after
# HEARTBEAT_TIMEOUT without a heartbeat.
STATUSES = ("complete", "in_progress", "stopped", "failed", "truncated")


class Message(db.Model):
    """A message of the user or of the bot, in one of its versions."""

    id: Mapped[int] = mapped_column(primary_key=True)
    sender: Mapped[str] = mapped_column(String(4))
    text: Mapped[str] = mapped_column(Text)
    conversation_id: Mapped[int] = mapped_column(ForeignKey("conversation.id", ondelete="CASCADE"))
    created_at: Mapped[datetime] = mapped_column(default=lambda: datetime.now(UTC))
    status: Mapped[str] = mapped_column(String(11), default="complete", server_default="complete")
    # The message before: of a reply, the question; of a question, the reply before it. Messages with the same one are
    # versions of each other. It does not cascade: SQLite fails at a chain of 1,000, and the conversation's does it all.
    parent_id: Mapped[int | None] = mapped_column(ForeignKey("message.id"))
    is_current: Mapped[bool] = mapped_column(default=True, server_default=true())  # on the branch that lists show
    error: Mapped[str | None] = mapped_column(String(255))  # of a failed reply: what clients are told
    heartbeat_at: Mapped[datetime | None]  # of a reply in progress, by the database's clock
    idempotency_key: Mapped[str | None] = mapped_column(String(255))  # of what a request has added

    conversation: Mapped[Conversation] = relationship(back_populates="messages")
    parent: Mapped[Message | None] = relationship(remote_side=[id])

    __table_args__ = (
        CheckConstraint("sender IN ('user', 'bot')", name="sender"),
        CheckConstraint(f"status IN {STATUSES}", name="status"),
        CheckConstraint("sender = 'bot' OR status = 'complete'", name="user_status"),
        CheckConstraint("(status = 'in_progress') = (heartbeat_at IS NOT NULL)", name="heartbeat"),
        Index(None, "conversation_id", "id"),
        Index(None, "conversation_id", "idempotency_key", unique=True, **partial_index("idempotency_key IS NOT NULL")),
        Index(None, "parent_id"),
        Index("ix_message_in_progress", "conversation_id", **partial_index("status = 'in_progress'")),
        {"sqlite_autoincrement": True},
    )

    @classmethod
    def json(cls):
        """Return the SQL expression of a message as the API shows it, see to_dict()."""
        items = {"id": cls.id, "sender": cls.sender, "text": cls.text, "created_at": iso8601(cls.created_at)}
        return case(
            (cls.status == "complete", json_object(**items)),
            (cls.error.is_(None), json_object(**items, status=cls.status)),
            else_=json_object(**items, status=cls.status, error=cls.error),
        )

    @classmethod
    def select_page(cls, conversation_id, limit=None, before=None):
        """Select the id and the `json` of a conversation's current messages, oldest first.

        With a limit, these are the newest messages with ids below `before`.
        """
        query = select(cls.id, cls.json().label("json")).order_by(cls.id)
        query = query.where(cls.conversation_id == conversation_id, cls.is_current)
        if before is not None:
            query = query.where(cls.id < before)
        if limit is not None:
            newest = query.with_only_columns(cls.id).order_by(None).order_by(cls.id.desc()).limit(limit)
            oldest_id = select(func.min(newest.correlate_except(cls).subquery().c.id)).scalar_subquery()
            query = query.where(cls.id >= oldest_id)
        return query.correlate_except(cls)  # conversation_id may be a column of an outer query

    @classmethod
    def get(cls, conversation_id, id):
        """Return a message of a conversation, or None."""
        return db.session.scalar(select(cls).filter_by(id=id, conversation_id=conversation_id))

    @classmethod
    def get_by_key(cls, conversation_id, idempotency_key):
        """Return the message that a request with an idempotency key has added first, or None."""
        query = select(cls).filter_by(conversation_id=conversation_id, idempotency_key=idempotency_key)
        return db.session.scalar(query)

    @classmethod
    def list_first(cls, conversation_id):
        """Return the first exchange of a conversation as [(sender, text)], without an empty reply."""
        query = select(cls.sender, cls.text).where(cls.conversation_id == conversation_id, cls.is_current)
        rows = db.session.execute(query.order_by(cls.id).limit(2)).all()
        return [(sender, text) for sender, text in rows if text]

    @classmethod
    def map_versions(cls, conversation_id):
        """Return {id: the ids of all versions, oldest first} of the messages that have more than one."""
        ids = func.aggregate_strings(cls.id.cast(String), ",")
        query = select(ids).where(cls.conversation_id == conversation_id).group_by(cls.sender, cls.parent_id)
        groups = [sorted(map(int, row.split(","))) for row in db.session.scalars(query.having(func.count() > 1))]
        return {id: group for group in groups for id in group}

    @classmethod
    def show_branch(cls, conversation_id, message_id):
        """Make the branch of a message the current one; call lock_conversation() before."""
        differs = cls.is_current != cls.id.in_(cls.select_branch(message_id))
        change = update(cls).where(cls.conversation_id == conversation_id, differs).values(is_current=~cls.is_current)
        db.session.execute(change, execution_options={"synchronize_session": False})

    @classmethod
    def select_branch(cls, message_id):
        """Select the ids of a message's ancestors, its own, and below it those of the newest children.

        Of several children, those that have a text come first.
        """
        above = select(cls.id, cls.parent_id).where(cls.id == message_id).cte("above", recursive=True)
        above = above.union_all(select(cls.id, cls.parent_id).where(cls.id == above.c.parent_id))
        below = select(cls.id).where(cls.id == message_id).cte("below", recursive=True)
        child = aliased(cls)
        children = select(child.id).where(child.parent_id == below.c.id).order_by(child.text == "", child.id.desc())
        newest_child = children.limit(1).correlate(below).scalar_subquery()
        below = below.union_all(select(newest_child).where(below.c.id.is_not(None)))
        return select(above.c.id).union_all(select(below.c.id).where(below.c.id.is_not(None)))

    def list_versions(self):
        """Return the versions of this message, oldest first."""
        query = select(Message).filter_by(conversation_id=self.conversation_id, sender=self.sender)
        is_sibling = Message.parent_id.is_not_distinct_from(self.parent_id)
        return db.session.scalars(query.where(is_sibling).order_by(Message.id)).all()

    def get_reply(self):
        """Return the bot's reply to this question: the current one, or else the newest; None if there is none."""
        query = select(Message).filter_by(parent_id=self.id, sender="bot")
        return db.session.scalar(query.order_by(Message.is_current.desc(), Message.id.desc()).limit(1))

    def get_match(self, q):
        """Return {"snippet", "match"} of a search: some text around the match, and its position there in characters.

        The position may be off where folding the case changes the length, as that of "ß", but is within the snippet.
        """
        text = unicodedata.normalize("NFC", self.text)
        folded = fold_case(q)
        start = max(0, fold_case(text).find(folded))  # the database may fold characters that are newer than Python
        end = min(start + len(folded), len(text))
        first = max(0, start - SNIPPET_CONTEXT)
        snippet = text[first : end + SNIPPET_CONTEXT]
        return {"snippet": snippet, "match": {"start": start - first, "end": end - first}}

    def to_dict(self):
        """Return the message as the API shows it: with its status unless that is complete, with its error if any."""
        return message_to_dict(self.id, self.sender, self.text, self.created_at, self.status, self.error)


def message_to_dict(id, sender, text, created_at, status="complete", error=None):
    """Return a message as the API shows it, see Message.to_dict()."""
    message = {"id": id, "sender": sender, "text": text, "created_at": format_timestamp(created_at)}
    if status != "complete":
        message["status"] = status
    if error is not None:
        message["error"] = error
    return message
