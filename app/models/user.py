"""Who someone is: password, sessions, presence."""

from __future__ import annotations

import re
import sys
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from flask_login import UserMixin
from sqlalchemy import Computed, String
from sqlalchemy.orm import Mapped, mapped_column, relationship
from werkzeug.security import check_password_hash, generate_password_hash

from app import db
from app.sql import MAX_ID, json_array, json_object, utc_text

if TYPE_CHECKING:
    from app.models.conversation import Conversation

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
TICK = timedelta(microseconds=1)


class User(UserMixin, db.Model):
    """A person with a name and a password."""

    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int] = mapped_column(Computed("id", persisted=True), unique=True)
    username: Mapped[str] = mapped_column(String(80), unique=True)
    password_hash: Mapped[str] = mapped_column(String(255))
    is_logged_in: Mapped[bool] = mapped_column(default=False)
    last_login: Mapped[datetime | None]
    last_logout: Mapped[datetime | None]

    conversations: Mapped[list[Conversation]] = relationship(back_populates="user", passive_deletes=True)

    __table_args__ = {"sqlite_autoincrement": True}

    moment = None  # when the session at hand was opened: the login that the cookie came from

    @classmethod
    def named(cls, username):
        """Return the user of that name, or None."""
        return db.session.scalar(NAMED, {"username": username})

    @classmethod
    def locked(cls, user_id):
        """Return the user as the row is now, and keep others from changing it until the transaction ends."""
        return db.session.scalar(LOCKED, {"user": user_id})

    @classmethod
    def claimed(cls, token, valid_from):
        """Return the session that a token (see get_id) names; None if it names none that can be alive.

        It is what ALIVE has to be told: {"user": the user's id, "moment": when it was opened}.
        """
        parts = re.fullmatch(r"([0-9]{1,18})\.([0-9]{1,17})", str(token))
        moment = parts and EPOCH + int(parts[2]) * TICK
        return {"user": int(parts[1]), "moment": moment} if parts and moment >= valid_from else None

    @classmethod
    def of_session(cls, claim):
        """Return the user whose session this is (see claimed), if it is alive, or None."""
        return cls._of_session(OF_SESSION, claim)

    @classmethod
    def _of_session(cls, statement, claim):
        user = db.session.scalar(statement, claim)
        if user:
            user.moment = claim["moment"]
        return user

    @classmethod
    def statuses(cls, valid_from, limit=MAX_ID, after=0):
        """Return at most `limit` users above `after` with their presence, oldest first, as one JSON text.

        And the user_id of the last of them, if there are more.
        """
        given = {"valid_from": valid_from, "limit": limit, "after": after}
        with db.engine.connect() as connection:
            users, last, newest = connection.execute(STATUSES, given).one()
        return users, last if last != newest else None

    def still_here(self):
        """Return this user, locked as by `locked`, or None if the session at hand has ended meanwhile."""
        return self._of_session(LOCKED_OF_SESSION, {"user": self.id, "moment": self.moment})

    def get_id(self):
        """Name the session at hand: what the cookie carries."""
        return f"{self.id}.{(self.moment - EPOCH) // TICK}"

    def log_in(self, valid_from):
        """Open a session; call with the row locked.

        Its moment is later than everything in the row, whatever the servers' clocks say: a cookie
        that was dead stays dead, and the new one lives.
        """
        past = [moment + TICK for moment in (self.last_login, self.last_logout) if moment]
        self.moment = self.last_login = max(datetime.now(UTC), valid_from, *past)
        self.is_logged_in = True

    def log_out(self):
        """End every session of this user; call with the row locked."""
        past = [moment for moment in (self.last_login, self.last_logout) if moment]
        self.last_logout = max(datetime.now(UTC), *past)
        self.is_logged_in = False

    def summary(self):
        """Return what the API tells a user about themselves."""
        return {"id": self.id, "user_id": self.user_id, "username": self.username}


# Statements are built once: that takes longer than to run them.
OF_ID = db.select(User).where(User.id == db.bindparam("user"))
LOCKED = OF_ID.with_for_update(key_share=True).execution_options(populate_existing=True)
ALIVE = User.is_logged_in & (User.last_logout.is_(None) | (User.last_logout < db.bindparam("moment")))
OF_SESSION, LOCKED_OF_SESSION = OF_ID.where(ALIVE), LOCKED.where(ALIVE)
NAMED = db.select(User).where(User.username == db.bindparam("username"))
ONLINE = User.is_logged_in & (User.last_login >= db.bindparam("valid_from"))
STATUS = json_object(
    user_id=User.user_id,
    username=User.username,
    status=db.case((ONLINE, "Online"), else_="Offline"),
    last_login=utc_text(User.last_login),
    last_logout=utc_text(User.last_logout),
)
STATUS_PAGE = (
    db.select(User.user_id, STATUS.label("json"))
    .where(User.user_id > db.bindparam("after"))
    .order_by(User.user_id)
    .limit(db.bindparam("limit"))
    .subquery()
)
STATUSES = db.select(
    json_array(STATUS_PAGE.c.json),
    db.func.max(STATUS_PAGE.c.user_id),
    db.select(db.func.max(User.user_id)).scalar_subquery(),
)


def hash_password(password, method):
    """Return a hash to store, by one of werkzeug's methods."""
    return _beside_the_event_loop(generate_password_hash, password, method)


def verify_password(user, password, method):
    """Tell whether this is the user's password. Nobody's (None) is wrong, after as much work."""
    if user is None:
        hash_password(password, method)
        return False
    try:
        return _beside_the_event_loop(check_password_hash, user.password_hash, password)
    except (ValueError, TypeError, OverflowError):  # the hash in the database is unreadable
        return False


def _beside_the_event_loop(function, *args):
    """Call in a real thread where gevent serves many clients in this one: a hash takes a third of a second."""
    monkey = sys.modules.get("gevent.monkey")
    if monkey is None or not monkey.is_module_patched("threading"):
        return function(*args)
    from gevent import get_hub

    return get_hub().threadpool.apply(function, args)
