"""Conversations and the queries that list them."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import cache

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column, relationship

from app import db
from app.database import contains, database_now, fold_case, format_timestamp, iso8601, json_array, partial_index
from app.models.message import Message
from app.models.user import User


class Conversation(db.Model):
    """A conversation between one user and the bot."""

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(255))
    user_id: Mapped[int] = mapped_column(sa.ForeignKey("user.id", ondelete="CASCADE"))
    created_at: Mapped[datetime] = mapped_column(default=lambda: datetime.now(UTC))
    # The last send, edit or change of the branch, see lock_conversation() in exchange.py; replies leave it.
    updated_at: Mapped[datetime] = mapped_column(default=lambda context: context.get_current_parameters()["created_at"])
    archived_at: Mapped[datetime | None]
    title_requested_at: Mapped[datetime | None]  # while a title is generated, by the database's clock

    user: Mapped[User] = relationship(back_populates="conversations")
    messages: Mapped[list[Message]] = relationship(
        back_populates="conversation", order_by=Message.id, passive_deletes=True
    )

    __table_args__ = (
        sa.Index(None, "user_id", "id"),
        sa.Index(None, "user_id", "updated_at", "id"),
        sa.Index("ix_conversation_archived", "user_id", "updated_at", "id", **partial_index("archived_at IS NOT NULL")),
        sa.Index("ix_conversation_unarchived", "user_id", "updated_at", "id", **partial_index("archived_at IS NULL")),
        {"sqlite_autoincrement": True},
    )
    __mapper_args__ = {"confirm_deleted_rows": False}  # another request may have deleted it just before

    @classmethod
    def start_title(cls, id, timeout):
        """Record that a title is generated; commit; return False if one has been for less than `timeout` seconds."""
        is_free = cls.title_requested_at.is_(None) | (cls.title_requested_at < database_now(-timeout))
        start = sa.update(cls).where(cls.id == id, is_free).values(title_requested_at=database_now())
        count = db.session.execute(start, execution_options={"synchronize_session": False}).rowcount
        db.session.commit()
        return count == 1

    @classmethod
    def end_title(cls, id, old_name, title):
        """Name a conversation, unless it was renamed meanwhile; commit; return it, or None if it was deleted."""
        name = sa.case((cls.name == old_name, title), else_=cls.name)
        end = sa.update(cls).where(cls.id == id).values(name=name, title_requested_at=None).returning(cls)
        conversation = db.session.scalar(end, execution_options={"populate_existing": True})
        db.session.commit()
        return conversation

    @classmethod
    def list_for_user(cls, user_id, with_messages=False, archived=None, order=None, **values):
        """Return rows of a user's conversations as select_list() selects them; `values`: its bind parameters or None.

        `archived`: whether they are; `order="recent"`: the latest change first, else the oldest, or with `limit` the
        newest conversation.
        """
        names = [name for name, value in values.items() if value is not None]
        query = cls.select_list(with_messages, archived, order, *names)
        return db.session.execute(query, {"user_id": user_id, **values}).all()

    @classmethod
    @cache  # building this statement takes a third to half of the time of a request, see list_for_user()
    def select_list(cls, with_messages, archived, order, *names):
        """Select conversations of the user of the bind parameter `user_id`; `names` are those of further parameters.

        `id`: the one with this id; `folded`: those with this text in the name or a message; `before`: those with a
        lower id; `updated_at` and `last_id`: those after this one in the order "recent"; `limit`: at most so many;
        `messages`: the column `messages_json` has at most so many, the newest.
        """
        query = cls.select_columns(with_messages, sa.bindparam("messages") if "messages" in names else None)
        if archived is not None:
            query = query.where(cls.archived_at.is_not(None) if archived else cls.archived_at.is_(None))
        if order == "recent":
            query = query.order_by(cls.updated_at.desc(), cls.id.desc())
        else:
            query = query.order_by(cls.id.desc() if "limit" in names else cls.id)
        if "limit" in names:
            query = query.limit(sa.bindparam("limit"))
        last = sa.bindparam("updated_at", type_=cls.updated_at.type), sa.bindparam("last_id", type_=cls.id.type)
        conditions = {
            "id": cls.id == sa.bindparam("id"),
            "folded": cls.has_text(sa.bindparam("folded", type_=sa.Text)),
            "before": cls.id < sa.bindparam("before"),
            "last_id": sa.tuple_(cls.updated_at, cls.id) < sa.tuple_(*last),
        }
        return query.where(*(conditions[name] for name in names if name in conditions))

    @classmethod
    def select_columns(cls, with_messages, limit):
        """Select what list_for_user() returns of each conversation of a user.

        `progress` is made of the number and the length of the replies in progress: without `messages_json`, a row
        changes whenever a message does.
        """
        is_in_progress = (Message.conversation_id == cls.id) & (Message.status == "in_progress")
        size = sa.func.sum(sa.func.length(Message.text) + 2**40).cast(sa.BigInteger)
        progress = sa.select(size).where(is_in_progress).scalar_subquery().label("progress")
        messages = sa.literal_column("'[]'")
        if with_messages:
            page = Message.select_page(cls.id, limit).subquery()
            messages = sa.select(json_array(page.c.json)).scalar_subquery()
        archived = cls.archived_at.is_not(None).label("archived")
        times = {column.key: iso8601(column).label(column.key) for column in (cls.created_at, cls.updated_at)}
        columns = [times.get(column.key, column) for column in cls.__table__.columns]
        query = sa.select(*columns, archived, progress, messages.label("messages_json"))
        return query.where(cls.user_id == sa.bindparam("user_id"))

    @classmethod
    def has_text(cls, folded):
        """Return the SQL condition that the name or a current message has a text, which fold_case() has returned."""
        is_match = (Message.conversation_id == cls.id) & Message.is_current & contains(Message.text, folded)
        message_id = sa.select(Message.id).where(is_match).limit(1).scalar_subquery()
        return sa.or_(contains(cls.name, folded), message_id.is_not(None))  # for EXISTS, PostgreSQL may scan the table

    @classmethod
    def search_messages(cls, user_id, q, limit, before=None):
        """Return rows of (Message, conversation's name) of the user's messages with a text, the newest first."""
        messages = (
            sa.select(Message.id, contains(Message.text, fold_case(q)).label("is_match"))
            .join(Message.conversation)
            .where(cls.user_id == user_id, Message.is_current)
        )
        if before is not None:
            messages = messages.where(Message.id < before)
        # In a condition of the join, or newest first, the database might search the messages of all users.
        messages = messages.cte().prefix_with("MATERIALIZED")
        page = sa.select(messages.c.id).where(messages.c.is_match).order_by(messages.c.id.desc()).limit(limit)
        query = sa.select(Message, cls.name).join(Message.conversation).where(Message.id.in_(page))
        return db.session.execute(query.order_by(Message.id.desc())).all()

    @classmethod
    def prune(cls, before, limit):
        """Delete at most `limit` conversations without a change since `before`; commit; return their number."""
        ids = sa.select(cls.id).where(cls.updated_at < before).order_by(cls.id).limit(limit)
        count = db.session.execute(sa.delete(cls).where(cls.id.in_(ids), cls.updated_at < before)).rowcount
        db.session.commit()
        return count

    def to_dict(self):
        """Return what the API shows of a conversation without its messages."""
        return {"id": self.id, "name": self.name}

    def get_details(self):
        """Return what the API adds to that for a conversation alone, and for lists with parameters."""
        times = {name: format_timestamp(getattr(self, name)) for name in ("created_at", "updated_at")}
        return {"archived": self.archived_at is not None, **times}
