"""Messages and the queries that read them."""

from __future__ import annotations

import unicodedata
from bisect import bisect_left, bisect_right
from datetime import UTC, datetime
from itertools import accumulate
from typing import TYPE_CHECKING

from sqlalchemy import CheckConstraint, ForeignKey, Index, String, Text, case, false, func, select
from sqlalchemy.orm import Mapped, mapped_column, relationship

from app import db
from app.database import (
    ITEM_BYTES,
    fold_case,
    format_timestamp,
    iso8601,
    json_object,
    limit_size,
    octet_length,
    partial_index,
)

if TYPE_CHECKING:
    from app.models.conversation import Conversation

FOLDED_BLOCK = 1000  # characters: to fold the whole text for each prefix took 0.1 s
SNIPPET_CONTEXT = 60  # characters before and after the match of a search
HEARTBEAT_TIMEOUT = 30  # seconds without a sign of life after which a reply in progress has failed

# The status of a message, and who may change it. A user's message is always complete.
#
#   from          to            by
#   -             in_progress   Exchange.add() and Exchange.edit(): a process begins to generate the reply
#   in_progress   complete      the same process: the bot has finished
#   in_progress   truncated     the same process: the reply was cut at a limit
#   in_progress   stopped       the same process: a user asked for it, see stop_requested
#   in_progress   failed        the same process: the bot failed after its first chunk, or the server ends
#   in_progress   (deleted)     the same process: the bot failed before its first chunk, unless this was a retry
#   in_progress   failed        any process: there was no heartbeat for HEARTBEAT_TIMEOUT
#   in_progress   (deleted)     any process: likewise, of an edit that has not been applied
#   failed        any status    the same process, which was not killed: it had lost the database, or was paused
#   failed        in_progress   Exchange.retry(): the request was repeated with its Idempotency-Key
#   any           (deleted)     any process: the conversation was deleted, or an edit dropped the message
STATUSES = ("complete", "in_progress", "stopped", "failed", "truncated")


class Message(db.Model):
    """A message of the user or of the bot."""

    id: Mapped[int] = mapped_column(primary_key=True)
    sender: Mapped[str] = mapped_column(String(4))
    text: Mapped[str] = mapped_column(Text)
    conversation_id: Mapped[int] = mapped_column(ForeignKey("conversation.id", ondelete="CASCADE"))
    created_at: Mapped[datetime] = mapped_column(default=lambda: datetime.now(UTC))
    status: Mapped[str] = mapped_column(String(11), default="complete", server_default="complete")
    heartbeat_at: Mapped[datetime | None]  # by the database's clock
    stop_requested: Mapped[bool] = mapped_column(default=False, server_default=false())
    # Of a reply: the number of the attempt at answering the user's message. Only the process that began it stores it.
    attempt: Mapped[int] = mapped_column(default=1, server_default="1")
    idempotency_key: Mapped[str | None] = mapped_column(String(255))
    sent_text_hash: Mapped[str | None] = mapped_column(String(64))  # of what came with that key; an edit keeps it
    # An edit adds a new exchange. It replaces this message, and all between the two, when the reply gets its first
    # chunk; until then, lists and histories leave the new exchange out.
    replaces_id: Mapped[int | None] = mapped_column(ForeignKey("message.id", ondelete="CASCADE"))

    conversation: Mapped[Conversation] = relationship(back_populates="messages")

    __table_args__ = (
        CheckConstraint("sender IN ('user', 'bot')", name="sender"),
        CheckConstraint(f"status IN {STATUSES}", name="status"),
        CheckConstraint("sender = 'bot' OR status = 'complete'", name="user_status"),
        CheckConstraint("(status = 'in_progress') = (heartbeat_at IS NOT NULL)", name="heartbeat"),
        Index(None, "conversation_id", "id"),
        Index(None, "conversation_id", "idempotency_key", unique=True, **partial_index("idempotency_key IS NOT NULL")),
        Index(None, "conversation_id", "sender", unique=True, **partial_index("replaces_id IS NOT NULL")),
        Index(None, "replaces_id", **partial_index("replaces_id IS NOT NULL")),
        Index(None, "heartbeat_at", **partial_index("status = 'in_progress'")),
        {"sqlite_autoincrement": True},
    )

    @classmethod
    def is_visible(cls):
        """Return the SQL condition that lists and histories contain a message: it is not part of a pending edit."""
        return cls.replaces_id.is_(None)

    @classmethod
    def json(cls):
        """Return the SQL expression of a message as the API shows it: with its status unless that is complete."""
        items = {"id": cls.id, "sender": cls.sender, "text": cls.text, "created_at": iso8601(cls.created_at)}
        return case((cls.status == "complete", json_object(**items)), else_=json_object(**items, status=cls.status))

    @classmethod
    def select_page(cls, conversation_id, limit=None, before=None, fits=False):
        """Select the id and the `json` of a conversation's messages, oldest first.

        With a limit, these are the newest messages with ids below `before`, and no more than MAX_PAGE_BYTES allows;
        `fits` says that they are known to fit.
        """
        query = cls.select_ids(conversation_id, before).add_columns(cls.json().label("json")).order_by(cls.id)
        if limit is None:
            return query
        newest = cls.select_newest(conversation_id, limit, before)
        newest = (newest if fits else limit_size(newest)).subquery()
        return query.where(cls.id >= select(func.min(newest.c.id)).scalar_subquery())

    @classmethod
    def select_newest(cls, conversation_id, limit, before=None):
        """Select the id and the `size`, which counts towards MAX_PAGE_BYTES, of a conversation's newest messages."""
        size = octet_length(cls.text) + ITEM_BYTES
        query = cls.select_ids(conversation_id, before).add_columns(size.label("size"))
        return query.order_by(cls.id.desc()).limit(limit)

    @classmethod
    def select_ids(cls, conversation_id, before=None):
        """Select the ids of a conversation's messages: all of them, or those below `before`."""
        query = select(cls.id).where(cls.conversation_id == conversation_id, cls.is_visible())
        if before is not None:
            query = query.where(cls.id < before)
        return query.correlate_except(cls)  # conversation_id may be a column of an outer query

    @classmethod
    def get(cls, conversation_id, id):
        """Return a message of a conversation as it is now, or None.

        The user's message of a pending edit is not returned: clients know the id of the message that it replaces.
        """
        query = select(cls).where(
            cls.id == id, cls.conversation_id == conversation_id, cls.is_visible() | (cls.sender == "bot")
        )
        return db.session.scalar(query, execution_options={"populate_existing": True})

    @classmethod
    def get_pending_edit(cls, conversation_id, sender):
        """Return the message of a sender in the conversation's pending edit, or None."""
        return db.session.scalar(
            select(cls).where(
                cls.conversation_id == conversation_id, cls.sender == sender, cls.replaces_id.is_not(None)
            )
        )

    def get_reply(self):
        """Return the bot's reply to this message of the user: that of a pending edit, if there is one."""
        pending = Message.get_pending_edit(self.conversation_id, "bot")
        if pending and pending.replaces_id == self.id:
            return pending
        return db.session.scalar(self.select_visible("bot").where(Message.id > self.id).order_by(Message.id).limit(1))

    def get_question(self):
        """Return the user's message that this message of the bot replies to."""
        if self.replaces_id:
            return db.session.get(Message, self.replaces_id)
        return db.session.scalar(
            self.select_visible("user").where(Message.id < self.id).order_by(Message.id.desc()).limit(1)
        )

    def select_visible(self, sender):
        """Select the messages of a sender in the same conversation, without those of a pending edit."""
        return select(Message).where(
            Message.conversation_id == self.conversation_id, Message.sender == sender, Message.is_visible()
        )

    def get_match(self, q):
        """Return {"snippet", "match"} of a search: some text around the match, and its position there in characters."""
        text = unicodedata.normalize("NFC", self.text)
        start, end = find_text(text, fold_case(q))
        first = max(0, start - SNIPPET_CONTEXT)
        snippet = text[first : end + SNIPPET_CONTEXT]
        return {"snippet": snippet, "match": {"start": start - first, "end": end - first}}

    def to_dict(self):
        """Return the message as the API shows it."""
        return message_to_dict(self.id, self.sender, self.text, self.created_at, self.status)


def message_to_dict(id, sender, text, created_at, status="complete"):
    """Return a message as the API shows it: with its status unless that is complete."""
    message = {"id": id, "sender": sender, "text": text, "created_at": format_timestamp(created_at)}
    return message if status == "complete" else {**message, "status": status}


def find_text(text, folded):
    """Return where a text that was found by contains() begins and ends in a text in NFC, in characters."""
    folded_text = fold_case(text)
    start = folded_text.index(folded)
    end = start + len(folded)
    if len(folded_text) == len(text):
        return start, end
    # fold_case() lengthens some letters: find the block of the start and that of the end, then the positions in these.
    blocks = [text[first : first + FOLDED_BLOCK] for first in range(0, len(text), FOLDED_BLOCK)]
    ends = list(accumulate((len(fold_case(block)) for block in blocks), initial=0))
    start_block, end_block = bisect_right(ends, start) - 1, bisect_left(ends, end) - 1
    start_length = bisect_prefixes(blocks[start_block], start - ends[start_block], bisect_right) - 1
    end_length = bisect_prefixes(blocks[end_block], end - ends[end_block], bisect_left)
    return start_block * FOLDED_BLOCK + start_length, end_block * FOLDED_BLOCK + end_length


def bisect_prefixes(text, folded_length, bisect):
    """Return the length of a prefix of a text, which is found by its length after fold_case().

    bisect_left() finds the first prefix that is at least `folded_length` long, bisect_right() the first longer one.
    """
    return bisect(range(len(text) + 1), folded_length, key=lambda length: len(fold_case(text[:length])))
