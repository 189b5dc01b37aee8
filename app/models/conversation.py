"""Conversations and the queries that list them."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import cache
from itertools import accumulate, takewhile

from sqlalchemy import (
    ForeignKey,
    Index,
    String,
    Text,
    and_,
    bindparam,
    case,
    delete,
    func,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.orm import Mapped, mapped_column, relationship

from app import db
from app.database import (
    ITEM_BYTES,
    MAX_PAGE_BYTES,
    contains,
    fold_case,
    json_array,
    octet_length,
)
from app.models.message import Message
from app.models.user import User

MAX_SHORT_LIST = 2000  # messages: a list of more is long, whatever their sizes


class Conversation(db.Model):
    """A conversation between one user and the bot."""

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(255))
    user_id: Mapped[int] = mapped_column(ForeignKey("user.id", ondelete="CASCADE"))
    created_at: Mapped[datetime] = mapped_column(default=lambda: datetime.now(UTC))
    # The last change of a message. Every statement that changes messages changes this first, which locks the row.
    updated_at: Mapped[datetime] = mapped_column(default=lambda context: context.get_current_parameters()["created_at"])

    user: Mapped[User] = relationship(back_populates="conversations")
    messages: Mapped[list[Message]] = relationship(
        back_populates="conversation", order_by=Message.id, passive_deletes=True
    )

    __table_args__ = (
        Index(None, "user_id", "id"),
        Index(None, "user_id", "updated_at", "id"),
        {"sqlite_autoincrement": True},
    )
    __mapper_args__ = {"confirm_deleted_rows": False}  # another request may have deleted it just before

    @classmethod
    def get_for_user(cls, id, user_id):
        """Return the user's conversation, or None."""
        return db.session.scalar(select(cls).filter_by(id=id, user_id=user_id))

    @classmethod
    def list_for_user(cls, user_id, **filters):
        """Return rows of the user's conversations, each with `messages_json`; `filters`: see select_with_messages()."""
        return db.session.execute(cls.select_with_messages(*filters), {"user_id": user_id, **filters}).all()

    @classmethod
    def list_versions(cls, user_id, **filters):
        """Return the rows of list_for_user() without messages. They change whenever a message does."""
        return db.session.execute(cls.select_for_user(*filters), {"user_id": user_id, **filters}).all()

    @classmethod
    def count_fitting(cls, user_id, **filters):
        """Return how many of the first conversations have at most MAX_PAGE_BYTES together, with their newest messages.

        SQLite measures the messages of a conversation when its row is fetched, and none of those beyond the page.
        """
        with db.session.execute(cls.select_size(*filters), {"user_id": user_id, **filters}) as sizes:
            return sum(1 for _ in takewhile(lambda size: size <= MAX_PAGE_BYTES, accumulate(sizes.scalars())))

    @classmethod
    @cache  # building this statement takes a fifth of the time of a request that lists 1,000 messages
    def select_with_messages(cls, *filters):
        """Select conversations with their messages as JSON: all of them, or the newest if `messages` limits them.

        `filters`: see select_for_user(). With `fits`, all of the newest fit on a page, see Message.select_page(). With
        `if_short`, the JSON is NULL if there are too many messages, see is_short().
        """
        limit = bindparam("messages") if "messages" in filters else None
        page = Message.select_page(cls.id, limit, fits="fits" in filters).subquery()
        messages_json = select(json_array(page.c.json)).scalar_subquery()
        if "if_short" in filters:
            messages_json = case((cls.is_short(limit, *filters), messages_json))
        return cls.select_for_user(*filters).add_columns(messages_json.label("messages_json"))

    @classmethod
    def is_short(cls, limit, *filters):
        """Return the SQL condition that the messages of select_with_messages() make a short list.

        It has at most MAX_SHORT_LIST messages and MAX_PAGE_BYTES. The sizes of more messages are not read.
        """
        newest = Message.select_newest(cls.id, limit).subquery()
        count = cls.sum_over_conversations(select(func.count(newest.c.id)), *filters)
        size = cls.sum_over_conversations(select(func.sum(newest.c.size)), *filters)
        return and_(count <= MAX_SHORT_LIST, size <= MAX_PAGE_BYTES)

    @classmethod
    def sum_over_conversations(cls, query, *filters):
        """Return the sum of a scalar subquery over the selected conversations, as an SQL expression.

        The database executes the subquery for each of them: with a join, it might read the messages of all users.
        """
        total = func.coalesce(func.sum(query.scalar_subquery()), 0)
        return cls.select_for_user(*filters).with_only_columns(total).order_by(None).correlate(None).scalar_subquery()

    @classmethod
    @cache  # as that of select_for_user()
    def select_size(cls, *filters):
        """Select the sizes of conversations with their newest messages; `filters`: see select_for_user()."""
        newest = Message.select_newest(cls.id, bindparam("messages")).subquery()
        messages_size = select(func.coalesce(func.sum(newest.c.size), 0)).scalar_subquery()
        return cls.select_for_user(*filters).with_only_columns(octet_length(cls.name) + ITEM_BYTES + messages_size)

    @classmethod
    @cache  # building this statement takes a tenth of the time of a request that is answered with 304
    def select_for_user(cls, *filters):
        """Select the conversations of a user. Each filter adds a clause with a bind parameter of that name.

        `select_for_user("limit", "before")`, for instance, has the bind parameters `user_id`, `limit` and `before`.

        - `id`: the conversation with this id; `ids`: those with these ids; `before`: those with a lower id
        - `folded`: those with this text, which fold_case() has returned, in the name or a message
        - `last_updated_at` and `last_id`: those that follow this one in the order of `recent`
        - `limit`: at most so many
        - `recent`, which has no parameter: the latest change comes first

        Without `recent`, the newest conversation comes first if there is a `limit`, else the oldest.
        """
        query = select(*cls.__table__.columns).where(cls.user_id == bindparam("user_id"))
        if "id" in filters:
            query = query.where(cls.id == bindparam("id"))
        if "ids" in filters:
            query = query.where(cls.id.in_(bindparam("ids", expanding=True)))
        if "folded" in filters:
            query = query.where(cls.search(bindparam("folded", type_=Text)))
        if "before" in filters:
            query = query.where(cls.id < bindparam("before"))
        if "last_id" in filters:
            last = bindparam("last_updated_at", type_=cls.updated_at.type), bindparam("last_id", type_=cls.id.type)
            query = query.where(tuple_(cls.updated_at, cls.id) < tuple_(*last))
        if "recent" in filters:
            query = query.order_by(cls.updated_at.desc(), cls.id.desc())
        else:
            query = query.order_by(cls.id.desc() if "limit" in filters else cls.id)
        return query.limit(bindparam("limit")) if "limit" in filters else query

    @classmethod
    def search(cls, folded):
        """Return the SQL condition that the name or a message has a text."""
        message_id = (
            select(Message.id)
            .where(Message.conversation_id == cls.id, Message.is_visible(), contains(Message.text, folded))
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
            .where(cls.user_id == user_id, Message.is_visible())
        )
        if before is not None:
            messages = messages.where(Message.id < before)
        # In a condition of the join, or newest first, the database might search the messages of all users.
        messages = messages.cte().prefix_with("MATERIALIZED")
        page = select(messages.c.id).where(messages.c.is_match).order_by(messages.c.id.desc()).limit(limit).subquery()
        query = select(Message, cls.name).join(Message.conversation).join(page, page.c.id == Message.id)
        return db.session.execute(query.order_by(Message.id.desc())).all()

    @classmethod
    def list_unchanged_ids(cls, before, after_id, limit):
        """Return the ids of at most `limit` conversations above the id `after_id` without a change since `before`."""
        query = select(cls.id).where(cls.updated_at < before, cls.id > after_id).order_by(cls.id).limit(limit)
        return db.session.scalars(query.with_for_update()).all()

    @classmethod
    def prune(cls, ids, before):
        """Delete those of the conversations that have not changed since `before`; commit; return their number."""
        count = db.session.execute(delete(cls).where(cls.id.in_(ids), cls.updated_at < before)).rowcount
        db.session.commit()
        return count

    def to_dict(self):
        """Return what the API shows of a conversation without its messages."""
        return {"id": self.id, "name": self.name}


# These statements and those of app/models/exchange.py are built once: building them takes a quarter of the CPU time of
# a send. They are of tables, because SQLAlchemy's treatment of models in such statements would take another tenth.
conversations = Conversation.__table__
TOUCH_CONVERSATION = (
    update(conversations)
    .where(conversations.c.id == bindparam("conversation_id"), conversations.c.user_id == bindparam("owner_id"))
    .values(updated_at=bindparam("now"))
)
# The subquery skips a row that another transaction has locked. SQLite has no row locks.
TOUCH_IF_UNLOCKED = (
    update(conversations)
    .where(
        conversations.c.id
        == select(conversations.c.id)
        .where(conversations.c.id == bindparam("conversation_id"))
        .with_for_update(skip_locked=True, key_share=True)
        .correlate(None)
        .scalar_subquery()
    )
    .values(updated_at=bindparam("now"))
)


def touch(conversation_id, user_id):
    """Lock the user's conversation and record that its messages change; return False if there is none."""
    values = {"conversation_id": conversation_id, "owner_id": user_id, "now": datetime.now(UTC)}
    return db.session.execute(TOUCH_CONVERSATION, values).rowcount == 1


def touch_if_unlocked(connection, ids):
    """Touch the conversations that no other transaction has locked; return the ids of the locked ones.

    This does not wait for locks: a request of one user must not delay the thread that stores all users' replies.
    """
    now = datetime.now(UTC)
    values = [{"conversation_id": id, "now": now} for id in ids]
    if connection.execute(TOUCH_IF_UNLOCKED, values).rowcount == len(values):
        return set()
    locked = select(conversations.c.id).where(conversations.c.id.in_(ids), conversations.c.updated_at != now)
    return set(connection.scalars(locked))
