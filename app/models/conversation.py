"""Conversations, and the exchanges in them: a user's message and the bot's reply."""

from __future__ import annotations

from dataclasses import dataclass
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
    insert,
    literal,
    null,
    or_,
    select,
    tuple_,
    union_all,
    update,
)
from sqlalchemy.orm import Mapped, mapped_column, relationship

from app import db
from app.database import (
    ITEM_BYTES,
    MAX_PAGE_BYTES,
    autocommit,
    contains,
    database_now,
    fold_case,
    json_array,
    octet_length,
)
from app.models.message import HEARTBEAT_TIMEOUT, Message, message_to_dict
from app.models.user import User

MAX_HISTORY_MESSAGES = 200  # that a bot is given
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
            messages_json = case((cls.is_short(*filters), messages_json))
        return cls.select_for_user(*filters).add_columns(messages_json.label("messages_json"))

    @classmethod
    def is_short(cls, *filters):
        """Return the SQL condition that the messages of select_with_messages() are as few and short as on a page.

        If there are more than MAX_SHORT_LIST, their sizes are not read.
        """
        limit = bindparam("messages") if "messages" in filters else None
        newest = Message.select_newest(cls.id, limit).subquery()
        count = cls.add_up(select(func.count(newest.c.id)), *filters)
        size = cls.add_up(select(func.sum(newest.c.size)), *filters)
        return and_(count <= MAX_SHORT_LIST, size <= MAX_PAGE_BYTES)

    @classmethod
    def add_up(cls, of_one, *filters):
        """Return the SQL expression of a sum over conversations, of each of which a query returns a number.

        With one query for all of them, the database might read the messages of all users.
        """
        total = func.coalesce(func.sum(of_one.scalar_subquery()), 0)
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
        """Select the conversations of the parameter `user_id`. The filters are names of further parameters.

        `select_for_user("limit", "before")`, for instance, has the parameters user_id, limit and before.
        `id`: only that one. `ids`: only these. `folded`: those with this text, from fold_case(), in the name or a
        message. `limit`: so many, the newest first, `before`: of ids below it. `recent`: by the last change, the latest
        first; `last_updated_at` and `last_id`: those that follow this one. Without any of these: all, the oldest first.
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
            .where(Message.conversation_id == cls.id, Message.replaces_id.is_(None), contains(Message.text, folded))
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
            .where(cls.user_id == user_id, Message.replaces_id.is_(None))
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
        """Delete conversations, but those that have changed since `before`; commit. Returns how many were deleted."""
        count = db.session.execute(delete(cls).where(cls.id.in_(ids), cls.updated_at < before)).rowcount
        db.session.commit()
        return count

    def to_dict(self):
        """Return what the API shows of a conversation without its messages."""
        return {"id": self.id, "name": self.name}


# These statements are built once: building them takes a quarter of the CPU time of a whole send. They are of tables,
# because SQLAlchemy's treatment of models in such statements would take another tenth.
CONVERSATION, MESSAGE = Conversation.__table__.c, Message.__table__.c
TOUCH_CONVERSATION = (
    update(Conversation.__table__)
    .where(CONVERSATION.id == bindparam("conversation_id"), CONVERSATION.user_id == bindparam("owner_id"))
    .values(updated_at=bindparam("now"))
)
# The subquery finds no row that another transaction has locked; on SQLite there are no such locks.
TOUCH_UNLOCKED = (
    update(Conversation.__table__)
    .where(
        CONVERSATION.id
        == select(CONVERSATION.id)
        .where(CONVERSATION.id == bindparam("conversation_id"))
        .with_for_update(skip_locked=True, key_share=True)
        .correlate(None)
        .scalar_subquery()
    )
    .values(updated_at=bindparam("now"))
)
SAVE_REPLY = (
    update(Message.__table__)
    .where(MESSAGE.id == bindparam("reply_id"), MESSAGE.status == "in_progress")
    .values(
        text=bindparam("new_text"),
        status=bindparam("new_status"),
        heartbeat_at=case((bindparam("new_status") == "in_progress", database_now())),
    )
)
RESTART_REPLY = (
    update(Message.__table__)
    .where(MESSAGE.id == bindparam("reply_id"), MESSAGE.status == "failed")
    .values(text="", status="in_progress", heartbeat_at=database_now(), stop_requested=False)
)
# The messages before one, the newest first; a text beyond `max_chars` is cut there. A running total of the lengths by
# the database would take three times as long.
SELECT_HISTORY = (
    select(MESSAGE.sender, func.substr(MESSAGE.text, 1, bindparam("max_chars") + 1))
    .where(
        MESSAGE.conversation_id == bindparam("conversation_id"),
        MESSAGE.id < bindparam("before_id"),
        MESSAGE.replaces_id.is_(None),
        MESSAGE.text != "",
    )
    .order_by(MESSAGE.id.desc())
    .limit(MAX_HISTORY_MESSAGES)
)


def insert_exchange():
    """Return the statement that inserts a user's message and an empty reply, and returns the two ids."""
    both = [
        bindparam("conversation_id", type_=MESSAGE.conversation_id.type),
        bindparam("now", type_=MESSAGE.created_at.type),
        bindparam("replaces_id", type_=MESSAGE.replaces_id.type),
    ]
    question = select(
        *both,
        literal("user"),
        bindparam("new_text", type_=MESSAGE.text.type),
        literal("complete"),
        bindparam("key", type_=MESSAGE.idempotency_key.type),
        null(),
    )
    reply = select(*both, literal("bot"), literal(""), literal("in_progress"), null(), database_now())
    columns = ["conversation_id", "created_at", "replaces_id", "sender", "text", "status", "idempotency_key"]
    rows = union_all(question, reply)
    insertion = insert(Message.__table__).from_select([*columns, "heartbeat_at"], rows, include_defaults=False)
    return insertion.returning(MESSAGE.id)


INSERT_EXCHANGE = insert_exchange()


def touch(conversation_id, user_id):
    """Lock the user's conversation and record that its messages change; return False if there is none."""
    values = {"conversation_id": conversation_id, "owner_id": user_id, "now": datetime.now(UTC)}
    return db.session.execute(TOUCH_CONVERSATION, values).rowcount == 1


def touch_unlocked(connection, ids):
    """Do as touch() for several conversations, without waiting; return the ids of those that a transaction has locked.

    The thread that stores the replies of all users must not wait for a request of one of them.
    """
    now = datetime.now(UTC)
    values = [{"conversation_id": id, "now": now} for id in ids]
    if connection.execute(TOUCH_UNLOCKED, values).rowcount == len(values):
        return set()
    locked = select(CONVERSATION.id).where(CONVERSATION.id.in_(ids), CONVERSATION.updated_at != now)
    return set(connection.scalars(locked))


@dataclass
class Exchange:
    """A user's message and the bot's reply to it, both as the API shows them.

    `history` is what the bot is given, the new message last, if this process is to generate the reply; else None.
    """

    conversation_id: int
    user_id: int
    question: dict
    reply: dict
    history: list | None = None
    replaces_id: int | None = None  # the message that an edit replaces, until apply_edit()
    failed_text: str | None = None  # the reply's text before it was retried

    @classmethod
    def get(cls, user_id, message):
        """Return the exchange that a message of the user's conversation belongs to, or None if it has no reply."""
        if message.sender == "user":
            reply = message.get_reply()
            question = Message.get(message.conversation_id, message.id)  # again: the reply may be that of a later edit
        else:
            question, reply = message.get_question(), message
        if not (question and reply):
            return None
        fields = question.to_dict()
        if reply.replaces_id:
            pending = Message.get_pending_edit(message.conversation_id, "user")
            if pending is None:  # the edit has been applied or discarded since the reply was read
                conversation_id, message_id = message.conversation_id, message.id
                db.session.expire_all()
                message = Message.get(conversation_id, message_id)
                return message and cls.get(user_id, message)
            fields["text"] = pending.text
        return cls(message.conversation_id, user_id, fields, reply.to_dict(), replaces_id=reply.replaces_id)

    @classmethod
    def get_by_key(cls, conversation_id, user_id, key):
        """Return the exchange of an idempotency key in the user's conversation, or None."""
        message = db.session.scalar(
            select(Message)
            .join(Message.conversation)
            .where(
                Message.conversation_id == conversation_id,
                Message.idempotency_key == key,
                Conversation.user_id == user_id,
            )
        )
        return message and cls.get(user_id, message)

    @classmethod
    def add(cls, conversation_id, user_id, text, max_history_chars, key=None):
        """Add a user's message and an empty reply; return None if the user has no such conversation.

        If a message with this idempotency key exists, return its exchange: to be generated again if the reply failed.
        """
        if not touch(conversation_id, user_id):
            return None
        if key and (existing := cls.get_by_key(conversation_id, user_id, key)):
            return existing.retry(text, max_history_chars)
        return cls.insert(conversation_id, user_id, text, key=key).with_history(text, max_history_chars)

    @classmethod
    def edit(cls, question, user_id, text, max_history_chars):
        """Add an exchange that replaces a message of the user once the reply begins; call touch() before."""
        exchange = cls.insert(question.conversation_id, user_id, text, replaces_id=question.id)
        exchange.question = {**question.to_dict(), "text": text}
        return exchange.with_history(text, max_history_chars)

    @classmethod
    def insert(cls, conversation_id, user_id, text, key=None, replaces_id=None):
        """Insert the two messages of an exchange; call touch() before."""
        now = datetime.now(UTC)
        values = {"conversation_id": conversation_id, "now": now, "new_text": text, "key": key}
        ids = db.session.scalars(INSERT_EXCHANGE, {**values, "replaces_id": replaces_id})
        question_id, reply_id = sorted(ids)
        return cls(
            conversation_id,
            user_id,
            question=message_to_dict(question_id, "user", text, now),
            reply=message_to_dict(reply_id, "bot", "", now, "in_progress"),
            replaces_id=replaces_id,
        )

    def retry(self, text, max_history_chars):
        """Restart a failed reply if the text is the same as before; return this exchange; call touch() before."""
        if self.reply.get("status") != "failed" or text != self.question["text"]:
            return self
        db.session.execute(RESTART_REPLY, {"reply_id": self.reply["id"]})
        self.failed_text = self.reply["text"]
        self.reply.update(text="", status="in_progress")
        return self.with_history(text, max_history_chars)

    def with_history(self, text, max_history_chars):
        """Read the history that the bot is given: as many of the last messages as fit; return this exchange."""
        room = max(0, max_history_chars - len(text))
        values = {"conversation_id": self.conversation_id, "before_id": self.question["id"], "max_chars": room}
        history = [("user", text)]
        for sender, message_text in db.session.execute(SELECT_HISTORY, values).all():
            room -= len(message_text)
            if room < 0:
                break
            history.append((sender, message_text))
        self.history = history[::-1]
        return self

    def apply_edit(self):
        """Replace the edited message, and drop what came after it, now that the reply begins; commit.

        Returns False if the exchange has been deleted.
        """
        touch(self.conversation_id, self.user_id)
        reply_id, question_id = self.reply["id"], self.replaces_id
        shown = update(Message).where(Message.id == reply_id).values(replaces_id=None)
        if db.session.execute(shown).rowcount == 0:
            return False
        in_between = (Message.id > question_id) & (Message.id < reply_id)
        db.session.execute(delete(Message).where(Message.conversation_id == self.conversation_id, in_between))
        edited = update(Message).where(Message.id == question_id).values(text=self.question["text"])
        db.session.execute(edited)
        db.session.commit()
        self.replaces_id = None
        return True

    def discard(self):
        """Undo what the request stored, because the bot failed before its first chunk; commit."""
        touch(self.conversation_id, self.user_id)
        reply_id = self.reply["id"]
        if self.failed_text is not None:
            save_replies([(self.conversation_id, reply_id, self.failed_text, "failed")])
            return
        in_exchange = Message.replaces_id == self.replaces_id if self.replaces_id else Message.id == self.question["id"]
        db.session.execute(
            delete(Message).where(
                Message.conversation_id == self.conversation_id, (Message.id == reply_id) | in_exchange
            )
        )
        db.session.commit()


def save_replies(rows):
    """Store replies in progress, each a (conversation_id, id, text, status); commit.

    Returns the ids of the conversations that a transaction has locked, whose replies are to be stored later, and the
    ids of the replies that no longer are in progress in the database: deleted, or taken for abandoned.
    """
    locked_ids = touch_unlocked(db.session, {conversation_id for conversation_id, *_ in rows})
    rows = sorted(row for row in rows if row[0] not in locked_ids)
    values = [{"reply_id": id, "new_text": text, "new_status": status} for _, id, text, status in rows]
    lost_ids = set()
    if values and db.session.execute(SAVE_REPLY, values).rowcount != len(values):
        saved = select(Message.id).where(tuple_(Message.id, Message.status).in_([(row[1], row[3]) for row in rows]))
        lost_ids = {row[1] for row in rows} - set(db.session.scalars(saved))
    db.session.commit()
    return locked_ids, lost_ids


def save_heartbeats(ids):
    """Record that replies in progress are being generated, unless a transaction has locked them; commit."""
    in_progress = select(Message.id).where(Message.id.in_(ids), Message.status == "in_progress")
    unlocked = in_progress.with_for_update(skip_locked=True, key_share=True)
    heartbeat = update(Message.__table__).where(MESSAGE.id.in_(unlocked)).values(heartbeat_at=database_now())
    db.session.execute(heartbeat)
    db.session.commit()


def list_in_progress():
    """Return {id: whether it is to stop} of all replies in progress, those of other processes included."""
    with autocommit(db.engine).connect() as connection:
        query = select(Message.id, Message.stop_requested).where(Message.status == "in_progress")
        return dict(connection.execute(query).all())


def fail_abandoned():
    """End the replies whose process was killed. An edit that was not applied yet is deleted.

    Those of a conversation that a transaction has locked are left for the next time.
    """
    messages = Message.__table__
    abandoned = (messages.c.status == "in_progress") & (messages.c.heartbeat_at < database_now(-HEARTBEAT_TIMEOUT))
    with autocommit(db.engine).connect() as connection:
        rows = connection.execute(select(messages).where(abandoned)).all()
    if not rows:
        return
    with db.engine.begin() as connection:
        locked_ids = touch_unlocked(connection, {row.conversation_id for row in rows})
        unlocked = [row for row in rows if row.conversation_id not in locked_ids]
        edited_ids = [row.replaces_id for row in unlocked if row.replaces_id]
        connection.execute(delete(messages).where(messages.c.replaces_id.in_(edited_ids)))
        abandoned &= messages.c.id.in_([row.id for row in unlocked])
        connection.execute(update(messages).where(abandoned).values(status="failed", heartbeat_at=None))
