"""Who you are: signup, login, logout, who is online."""

import math
import time
import unicodedata

from flask import Blueprint, abort, current_app, g, request, session
from flask_login import current_user, login_required, login_user, logout_user
from limits.errors import StorageError
from orjson import Fragment
from sqlalchemy.exc import IntegrityError
from werkzeug.exceptions import TooManyRequests

from app import db, limiter, login_manager
from app.models import User
from app.models.user import hash_password, verify_password
from app.routes import string_field

USERNAME_LENGTH = 80
PASSWORD_LENGTH = 1024

bp = Blueprint("auth", __name__)


@login_manager.user_loader
def session_user(token):
    """Return the user of the session cookie, or None."""
    user = User.of_session(token, current_app.config["SESSIONS_VALID_FROM"])
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
    password = string_field("password", current_app.config["PASSWORD_MIN_LENGTH"], PASSWORD_LENGTH)
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
    username, password = username_field(), string_field("password", 1, PASSWORD_LENGTH)
    limits = login_limits(username)
    throttle("test", *limits)

    method = current_app.config["PASSWORD_HASH_METHOD"]
    known = User.named(username)
    db.session.close()  # holds no connection while the hash is made
    if not verify_password(known, password, method):
        throttle("hit", *limits)
        abort(401, "Invalid username or password")
    throttle("test", *limits)  # of many guesses at once, none is answered once the limit is reached

    renewed = None if known.password_hash.startswith(f"{method}$") else hash_password(password, method)
    user = User.locked(known.id)
    if user is None or user.password_hash != known.password_hash:
        abort(401, "Invalid username or password")
    user.password_hash = renewed or user.password_hash
    user.log_in(current_app.config["SESSIONS_VALID_FROM"])
    db.session.commit()
    login_user(user)
    g.user_id = user.user_id
    session.permanent = True
    return {"message": "Login successful", "user": user.summary()}


@bp.post("/api/logout/<id:user_id>")
@login_required
def logout(user_id):
    """End all sessions of the caller, on every device."""
    if user_id != current_user.user_id:
        abort(403, "Cannot logout different user")
    moment = current_user.moment
    user = User.locked(current_user.id)
    if user is None or not user.has_session(moment, current_app.config["SESSIONS_VALID_FROM"]):
        abort(401)
    user.log_out()
    db.session.commit()
    logout_user()
    return {"message": f"User {user_id} logged out successfully"}


@bp.get("/api/current_user")
@login_required
def me():
    """Tell whose session this is."""
    return {"user": current_user.summary()}


@bp.get("/api/users/status")
def users_status():
    """List who is online."""
    return {"users": [Fragment(status) for status in User.statuses(current_app.config["SESSIONS_VALID_FROM"])]}


def username_field():
    """Return the body's username as names are compared, in NFKC; or abort with 400."""
    username = unicodedata.normalize("NFKC", string_field("username", 1, USERNAME_LENGTH))
    if len(username) > USERNAME_LENGTH:
        abort(400, f"username must be 1 to {USERNAME_LENGTH} characters long after NFKC")
    if username != username.strip() or any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in username):
        abort(400, "username must not begin or end with a blank or contain control characters")
    return username


def login_limits(username):
    """Return what throttles a guesser: tries at one name from one address, and ten times that from the address."""
    limit = current_app.config["LOGIN_RATE_LIMIT"]
    wider = type(limit)(limit.amount * 10, limit.multiples)
    return (limit, "login", request.remote_addr, username), (wider, "login", request.remote_addr)


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
