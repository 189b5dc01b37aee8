"""Conversations and the queries that list them."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import cache

from sqlalchemy import ForeignKey, Index, String, bindparam, case, delete, func, or_, select, tuple_, update
from sqlalchemy.orm import Mapped, mapped_column, relationship

from app import db
from app.database import contains, database_now, fold_case, json_array, partial_index
from app.models.message import Message
from app.models.user import User


class Conversation(db.Model):
    """A conversation between one user and the bot."""

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(255))
    user_id: Mapped[int] = mapped_column(ForeignKey("user.id", ondelete="CASCADE"))
    created_at: Mapped[datetime] = mapped_column(default=lambda: datetime.now(UTC))
    # The last send, edit or change of the branch, see touch() of exchange.py; growth and ends of replies leave it.
    updated_at: Mapped[datetime] = mapped_column(default=lambda context: context.get_current_parameters()["created_at"])
    archived_at: Mapped[datetime | None]
    title_requested_at: Mapped[datetime | None]  # while a title is generated, by the database's clock

    user: Mapped[User] = relationship(back_populates="conversations")
    messages: Mapped[list[Message]] = relationship(
        back_populates="conversation", order_by=Message.id, passive_deletes=True
    )

    __table_args__ = (
        Index(None, "user_id", "id"),
        Index(None, "user_id", "updated_at", "id"),
        Index("ix_conversation_archived", "user_id", "updated_at", "id", **partial_index("archived_at IS NOT NULL")),
        Index("ix_conversation_unarchived", "user_id", "updated_at", "id", **partial_index("archived_at IS NULL")),
        {"sqlite_autoincrement": True},
    )
    __mapper_args__ = {"confirm_deleted_rows": False}  # another request may have deleted it just before

    @classmethod
    def get_for_user(cls, id, user_id):
        """Return the user's conversation, or None."""
        return db.session.scalar(select(cls).filter_by(id=id, user_id=user_id))

    @classmethod
    def start_title(cls, id, timeout):
        """Record that a title is generated; commit; return False if one has been for less than `timeout` seconds."""
        is_free = cls.title_requested_at.is_(None) | (cls.title_requested_at < database_now(-timeout))
        start = update(cls).where(cls.id == id, is_free).values(title_requested_at=database_now())
        count = db.session.execute(start, execution_options={"synchronize_session": False}).rowcount
        db.session.commit()
        return count == 1

    @classmethod
    def end_title(cls, id, old_name, title):
        """Name a conversation, unless it was renamed meanwhile; commit; return it, or None if it was deleted."""
        name = case((cls.name == old_name, title), else_=cls.name)
        end = update(cls).where(cls.id == id).values(name=name, title_requested_at=None).returning(cls)
        conversation = db.session.scalar(end, execution_options={"populate_existing": True})
        db.session.commit()
        return conversation

    @classmethod
    @cache  # building this statement takes a tenth of the time of a request that is answered with 304
    def select_for_user(cls):
        """Select the columns of the conversations of the user of the bind parameter `user_id`, and `progress`.

        That is the number and the length of the replies in progress: a row changes whenever a message does.
        """
        progress = select(func.count(), func.sum(func.length(Message.text))).where(
            Message.conversation_id == cls.id, Message.status == "in_progress"
        )
        columns = [column.scalar_subquery() for column in map(progress.with_only_columns, progress.selected_columns)]
        return select(*cls.__table__.columns, *columns).where(cls.user_id == bindparam("user_id"))

    @classmethod
    def select_list(cls, q=None, archived=None, before=None, cursor=None, order=None, limit=None):
        """Select conversations of a user, see select_for_user(): the oldest first, with a limit the newest.

        `q`: those with this text in the name or a message. `before`: those with a lower id. `order="recent"`: the
        latest change first; `cursor`: those after this (updated_at, id) in that order.
        """
        query = cls.select_for_user()
        if q is not None:
            query = query.where(cls.has_text(fold_case(q)))
        if archived is not None:
            query = query.where(cls.archived_at.is_not(None) if archived else cls.archived_at.is_(None))
        if before is not None:
            query = query.where(cls.id < before)
        if cursor is not None:
            query = query.where(tuple_(cls.updated_at, cls.id) < cursor)
        if order == "recent":
            query = query.order_by(cls.updated_at.desc(), cls.id.desc())
        else:
            query = query.order_by(cls.id.desc() if limit else cls.id)
        return query.limit(limit) if limit else query

    @classmethod
    def add_messages(cls, query, limit=None):
        """Add the current messages to a query of conversations as the column `messages_json`: all, or the newest."""
        page = Message.select_page(cls.id, limit).subquery()
        return query.add_columns(select(json_array(page.c.json)).scalar_subquery().label("messages_json"))

    @classmethod
    def has_text(cls, folded):
        """Return the SQL condition that the name or a current message has a text, which fold_case() has returned."""
        message_id = (
            select(Message.id)
            .where(Message.conversation_id == cls.id, Message.is_current, contains(Message.text, folded))
            .limit(1)
            .scalar_subquery()
        )
        return or_(contains(cls.name, folded), message_id.is_not(None))  # for EXISTS, PostgreSQL may scan the table

    @classmethod
    def search_messages(cls, user_id, q, limit, before=None):
        """Return rows of (Message, conversation's name) of the user's messages with a text, the newest first."""
        messages = (
            select(Message.id, contains(Message.text, fold_case(q)).label("is_match"))
            .join(Message.conversation)
            .where(cls.user_id == user_id, Message.is_current)
        )
        if before is not None:
            messages = messages.where(Message.id < before)
        # In a condition of the join, or newest first, the database might search the messages of all users.
        messages = messages.cte().prefix_with("MATERIALIZED")
        page = select(messages.c.id).where(messages.c.is_match).order_by(messages.c.id.desc()).limit(limit).subquery()
        query = select(Message, cls.name).join(Message.conversation).join(page, page.c.id == Message.id)
        return db.session.execute(query.order_by(Message.id.desc())).all()

    @classmethod
    def prune(cls, before, limit):
        """Delete at most `limit` conversations without a change since `before`; commit; return their number."""
        ids = select(cls.id).where(cls.updated_at < before).order_by(cls.id).limit(limit)
        count = db.session.execute(delete(cls).where(cls.id.in_(ids), cls.updated_at < before)).rowcount
        db.session.commit()
        return count

    def to_dict(self):
        """Return what the API shows of a conversation without its messages."""
        return {"id": self.id, "name": self.name}
