"""Who you are: signup, login, logout, who is online, one's own account."""

import math
import time
import unicodedata

import click
import orjson
from flask import Blueprint, abort, current_app, g, request, session
from flask_login import current_user, login_required, login_user, logout_user
from limits.errors import StorageError
from orjson import Fragment
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from werkzeug.exceptions import TooManyRequests

from app import db, limiter, login_manager
from app.models import User
from app.models.user import EPOCH, hash_password, verify_password
from app.routes import PAGE, number_parameter, revalidated, string_field, trouble
from app.sql import MAX_ID

USERNAME_LENGTH = 80
PASSWORD_LENGTH = 1024

bp = Blueprint("auth", __name__, cli_group=None)


@login_manager.user_loader
def session_user(token):
    """Return the user of the session cookie, or None."""
    claim = User.claimed(token, valid_from())
    user = claim and User.of_session(claim)
    g.user_id = user and user.user_id
    return user


@bp.get("/api/test")
def test():
    """Tell that the server is there."""
    return {"message": "Server is running"}


@bp.post("/api/signup")
def signup():
    """Make a user."""
    username = username_field()
    password = password_field("password", current_app.config["PASSWORD_MIN_LENGTH"])
    throttle("hit", (current_app.config["SIGNUP_RATE_LIMIT"], "signup", request.remote_addr))
    taken = User.named(username) is not None
    db.session.close()  # holds no connection while the hash is made
    if taken:
        abort(400, "Username already exists")
    user = User(username=username, password_hash=hash_password(password, current_app.config["PASSWORD_HASH_METHOD"]))
    db.session.add(user)
    try:
        db.session.commit()
    except IntegrityError:
        abort(400, "Username already exists")
    return {"message": "User created successfully", "user_id": user.user_id}, 201


@bp.post("/api/login")
def login():
    """Open a session."""
    username, password = username_field(), password_field("password")
    user = authenticated(username, User.named(username), password) or abort(401, "Invalid username or password")
    open_session(user)
    return {"message": "Login successful", "user": user.summary()}


@bp.post("/api/logout/<id:user_id>")
@login_required
def logout(user_id):
    """End all sessions of the caller, on every device."""
    if user_id != current_user.user_id:
        abort(403, "Cannot logout different user")
    user = current_user.still_here() or abort(401)
    user.log_out()
    db.session.commit()
    close_session()
    return {"message": f"User {user_id} logged out successfully"}


@bp.get("/api/current_user")
@login_required
def me():
    """Tell whose session this is."""
    return {"user": current_user.summary()}


@bp.get("/api/users/status")
def users_status():
    """List who is online."""
    limit = number_parameter("limit", 1, PAGE)
    after = number_parameter("after", 0, MAX_ID)
    if after is not None and not limit:
        abort(400, "after goes with limit")
    users, last = User.statuses(valid_from(), limit or MAX_ID, after or 0)
    following = {"after": last} if last else {}
    return revalidated({"users": Fragment(users)}, **following)


@bp.put("/api/password")
@login_required
def change_password():
    """Give the caller a new password: every other session ends, this one goes on."""
    current = password_field("current_password")
    new = password_field("new_password", current_app.config["PASSWORD_MIN_LENGTH"])
    user = still_authenticated(current, new)
    user.log_out()
    open_session(user)
    return {"message": "Password changed successfully"}


@bp.delete("/api/account")
@login_required
def delete_account():
    """Delete the caller and all that is theirs."""
    db.session.delete(still_authenticated(password_field("password")))
    db.session.commit()
    close_session()
    return "", 204


@bp.cli.command("users")
def list_users():
    """List the users and who is online, which here is who logged in and not out since.

    The moment since which sessions count is the server's, and this is another process.
    """
    try:
        users, _ = User.statuses(EPOCH)
    except SQLAlchemyError as error:
        raise click.ClickException(trouble(error)) from None
    for user in orjson.loads(users):
        click.echo(
            f"{user['user_id']:>6}  {user['status']:<7}  {user['last_login'] or 'never':<27}  {user['username']}"
        )


def valid_from():
    """Return the moment before which no session counts."""
    return current_app.config["SESSIONS_VALID_FROM"]


def claimed_session():
    """Return the session that the cookie names (see User.claimed) for a statement to confirm; or abort with 401."""
    return User.claimed(session.get("_user_id"), valid_from()) or abort(401)


def username_field():
    """Return the body's username as names are compared, in NFKC; or abort with 400."""
    username = unicodedata.normalize("NFKC", string_field("username", 1, USERNAME_LENGTH))
    if len(username) > USERNAME_LENGTH:
        abort(400, f"username must be 1 to {USERNAME_LENGTH} characters long after NFKC")
    if username != username.strip() or any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in username):
        abort(400, "username must not begin or end with a blank or contain control characters")
    return username


def password_field(name, shortest=1):
    """Return a password of the body, to the byte; or abort with 400."""
    return string_field(name, shortest, PASSWORD_LENGTH)


def authenticated(username, known, password, new_password=None):
    """Return the user `known` by that username with the row locked if the password is right, else None.

    Nobody (None) costs as much time as a wrong password. Throttled. The hash is renewed for a new password, or
    if it is of another cost than the setting.
    """
    limit = current_app.config["LOGIN_RATE_LIMIT"]
    wider = type(limit)(limit.amount * 10, limit.multiples)
    limits = (limit, "login", request.remote_addr, username), (wider, "login", request.remote_addr)
    method = current_app.config["PASSWORD_HASH_METHOD"]

    throttle("test", *limits)
    db.session.close()  # holds no connection while hashes are made
    if not verify_password(known, password, method):
        throttle("hit", *limits)
        return None
    throttle("test", *limits)  # of many guesses at once, none is answered once the limit is reached
    renewed = None
    if new_password or not known.password_hash.startswith(f"{method}$"):
        renewed = hash_password(new_password or password, method)
    user = User.locked(known.id)
    if user is None:
        return None
    if user.password_hash != known.password_hash:  # another request was faster
        return authenticated(username, user, password, new_password)
    user.password_hash = renewed or user.password_hash
    return user


def still_authenticated(password, new_password=None):
    """Return the caller as `authenticated` does, or abort: 403 for a wrong password, 401 if the session is over."""
    caller = current_user._get_current_object()
    if authenticated(caller.username, caller, password, new_password) is None:
        abort(403, "Wrong password")
    return caller.still_here() or abort(401)


def open_session(user):
    """Begin a session of a user whose row is locked: in the database, then in the cookie."""
    user.log_in(valid_from())
    db.session.commit()
    login_user(user)
    session.permanent = True
    g.user_id = user.user_id


def close_session():
    """Take the cookie back from the browser; the database has ended the session already."""
    logout_user()
    session.clear()


def throttle(act, *limits):
    """Abort with 429 if one of `limits`, each (limit, *key), is used up; `act` is "hit" to count this try, else "test".

    With the store away nothing is throttled: people can still log in, and the log says so.
    """
    for limit, *key in limits:
        try:
            if getattr(limiter.limiter, act)(limit, *key):
                continue
            wait = limiter.limiter.get_window_stats(limit, *key).reset_time - time.time()
        except StorageError as error:
            current_app.logger.warning("Throttling is off, its store is away: %s", error)
            return
        raise TooManyRequests("Too many tries, wait a little", retry_after=max(1, math.ceil(wait)))
