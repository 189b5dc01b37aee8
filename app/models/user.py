"""Users and their sessions."""

from __future__ import annotations

import secrets
from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING

from flask_login import UserMixin
from sqlalchemy import String, bindparam, case, delete, event, false, func, select, update
from sqlalchemy.orm import Mapped, mapped_column, relationship
from sqlalchemy.orm.attributes import set_committed_value

from app import db
from app.database import MAX_ID, autocommit, iso8601, json_array, json_object

if TYPE_CHECKING:
    from app.models.conversation import Conversation


class User(UserMixin, db.Model):
    """A user with a name and a password."""

    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int | None] = mapped_column(unique=True)  # equals id, see set_user_id()
    username: Mapped[str] = mapped_column(String(80), unique=True)
    password_hash: Mapped[str] = mapped_column(String(255))
    is_logged_in: Mapped[bool] = mapped_column(default=False)
    last_login: Mapped[datetime | None]
    last_logout: Mapped[datetime | None]
    session_token: Mapped[str | None] = mapped_column(String(43), unique=True)
    is_disabled: Mapped[bool] = mapped_column(default=False, server_default=false())

    conversations: Mapped[list[Conversation]] = relationship(back_populates="user", passive_deletes=True)

    __table_args__ = {"sqlite_autoincrement": True}

    @classmethod
    def get_by_username(cls, username):
        """Return the user of a name, or None."""
        return db.session.scalar(select(cls).filter_by(username=username))

    @classmethod
    def get_by_session_token(cls, session_token, valid_from):
        """Return the user whose session has a token, or None; sessions opened before `valid_from` have ended."""
        parameters = {"session_token": session_token, "valid_from": valid_from}
        bind = {"bind": autocommit(db.engine)}  # no transaction, which would lock SQLite, before a write either
        return db.session.scalar(cls.select_by_session_token(), parameters, bind_arguments=bind)

    @classmethod
    @cache  # building this statement takes a third of the time of GET /api/current_user
    def select_by_session_token(cls):
        """Select the user of the parameters of get_by_session_token()."""
        is_online = cls.is_online(bindparam("valid_from", type_=cls.last_login.type))
        return select(cls).where(cls.session_token == bindparam("session_token"), is_online)

    @classmethod
    def is_online(cls, valid_from):
        """Return the SQL condition that a user is logged in, not counting sessions opened before `valid_from`."""
        return cls.is_logged_in & (cls.last_login >= valid_from)

    @classmethod
    def list_status(cls, valid_from, after=0, limit=MAX_ID):
        """Return a JSON array of the status of `limit` users with ids above `after`, and the last id if more follow."""
        parameters = {"valid_from": valid_from, "after": after, "limit": limit}
        users, last_id, newest_id = db.session.execute(cls.select_status(), parameters).one()
        return users, last_id if last_id != newest_id else None

    @classmethod
    @cache  # building this statement takes half the time of a request that lists 200 users
    def select_status(cls):
        """Select the status of users as JSON, the id of the last of them, and the id of the newest user."""
        is_online = cls.is_online(bindparam("valid_from", type_=cls.last_login.type))
        status_json = json_object(
            user_id=cls.user_id,
            username=cls.username,
            status=case((is_online, "Online"), else_="Offline"),
            last_login=iso8601(cls.last_login),
            last_logout=iso8601(cls.last_logout),
        )
        page = select(cls.id, status_json.label("json")).where(cls.id > bindparam("after")).order_by(cls.id)
        page = page.limit(bindparam("limit")).subquery()
        newest = select(func.max(cls.id)).scalar_subquery()
        return select(json_array(page.c.json), func.max(page.c.id), newest)

    def get_id(self):
        """Return the session token: Flask-Login's alternative id, which the cookie carries."""
        return self.session_token

    def log_in(self, valid_from, password_hash=None):
        """Open a session, or join that of the user's other devices; optionally store the password's hash anew.

        Returns the user as stored, or None if the user was given another hash, disabled or deleted since it was loaded.
        """
        token = case((User.is_online(valid_from), User.session_token), else_=secrets.token_urlsafe(32))
        return self.update_if(
            User.password_hash == self.password_hash,
            User.is_disabled.is_(False),
            is_logged_in=True,
            last_login=max(datetime.now(UTC), valid_from),  # the clock may have been set back since
            session_token=token,
            password_hash=password_hash or self.password_hash,
        )

    def log_out(self):
        """End the session on all devices; return None if it has ended already."""
        return self.end_session(User.session_token == self.session_token)

    def end_session(self, *conditions, **values):
        """End the session on all devices, if the user has one, and change other values; see update_if()."""
        last_logout = datetime.now(UTC) if self.is_logged_in else self.last_logout
        return self.update_if(*conditions, is_logged_in=False, session_token=None, last_logout=last_logout, **values)

    def change_password(self, password_hash):
        """Store a new password, and open a new session; return None if the old one has ended already."""
        return self.update_if(
            User.session_token == self.session_token,
            password_hash=password_hash,
            session_token=secrets.token_urlsafe(32),
        )

    def update_if(self, *conditions, **values):
        """Change the user's row if the conditions hold for it; return the user as stored, else None."""
        statement = update(User).where(User.id == self.id, *conditions).values(**values).returning(User)
        return db.session.scalar(statement, execution_options={"populate_existing": True})

    def delete(self):
        """Delete the user with all conversations; return False if the session has ended."""
        statement = delete(User).where(User.id == self.id, User.session_token == self.session_token)
        return db.session.execute(statement).rowcount == 1

    def to_dict(self):
        """Return what the API shows users of themselves."""
        return {"id": self.id, "user_id": self.user_id, "username": self.username}


@event.listens_for(User, "after_insert")
def set_user_id(mapper, connection, user):
    """Set the user_id of a new user to the id."""
    table = User.__table__
    connection.execute(update(table).where(table.c.id == user.id).values(user_id=user.id))
    set_committed_value(user, "user_id", user.id)
