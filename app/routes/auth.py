"""Users and sessions: sign-up, login, logout, status, password, account."""

import re
from pathlib import Path

from flask import Blueprint, abort, current_app, g, request, session
from flask_login import current_user, login_required, login_user, logout_user
from orjson import Fragment
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from app import db, login_manager
from app.database import SAFE_METHODS
from app.errors import database_unavailable
from app.models import User
from app.responses import conditional_response, hash_version
from app.security import authenticate, client_address, hash_password, needs_rehash, rate_limiter, verify_password
from app.validation import MAX_PASSWORD_LENGTH, check_new_password, check_username, get_checked, get_int_arg, get_string

MAX_PAGE_SIZE = 100

bp = Blueprint("auth", __name__)


@login_manager.user_loader
def load_user(session_token):
    """Return the logged-in user of a session token, or None."""
    if not isinstance(session_token, str) or not re.fullmatch(r"[\w-]{43}", session_token, re.ASCII):
        return None  # another app with this SECRET_KEY signed it
    user = User.get_by_session_token(session_token, current_app.config["SESSIONS_VALID_FROM"])
    if request.method not in SAFE_METHODS:
        db.session.close()  # holds no connection until the view needs one
    if user:
        g.user_id = user.user_id
    return user


@login_manager.unauthorized_handler
def unauthorized():
    """Abort with 401."""
    abort(401)


@bp.get("/api/test")
def test():
    """Return that the server is running."""
    return {"message": "Server is running"}


@bp.get("/api/health")
def health():
    """Return that the database answers, and that the file of a SQLite database still exists."""
    if db.engine.dialect.name == "sqlite" and not Path(db.engine.url.database).exists():
        raise database_unavailable()  # an open connection can still read a deleted file
    db.session.scalar(select(User.id).limit(1))
    return {"status": "ok"}


@bp.post("/api/signup")
def signup():
    """Create a user."""
    if current_app.config["SIGNUP"] == "closed":
        abort(403, "Sign-up is closed")
    username, password = get_checked("username", check_username), get_checked("password", check_new_password)
    rate_limiter.record(current_app.config["SIGNUP_RATE_LIMIT"], "signup", client_address())
    if get_user(username):
        abort(400, "Username already exists")
    user = User(username=username, password_hash=hash_password(password))
    db.session.add(user)
    try:
        db.session.commit()
    except IntegrityError:
        abort(400, "Username already exists")
    return {"message": "User created successfully", "user_id": user.user_id}, 201


@bp.post("/api/login")
def login():
    """Open a session."""
    user = open_session(get_checked("username", check_username), get_string("password", MAX_PASSWORD_LENGTH))
    db.session.commit()
    set_session_cookie(user)
    return {"message": "Login successful", "user": user.to_dict()}


@bp.post("/api/logout/<id:user_id>")
@login_required
def logout(user_id):
    """End the session of the current user on all devices."""
    if user_id != current_user.user_id:
        abort(403, "Cannot logout different user")
    current_user.log_out() or abort(401)
    db.session.commit()
    logout_user()
    session.clear()
    return {"message": f"User {user_id} logged out successfully"}


@bp.get("/api/current_user")
@login_required
def get_current_user():
    """Return the current user."""
    return {"user": current_user.to_dict()}


@bp.get("/api/users/status")
def list_users_status():
    """List who is online."""
    limit, after = get_int_arg("limit", maximum=MAX_PAGE_SIZE), get_int_arg("after", minimum=0)
    if after is not None and not limit:
        abort(400, "after requires limit")
    page = {"limit": limit, "after": after or 0} if limit else {}
    users, last_id = User.list_status(current_app.config["SESSIONS_VALID_FROM"], **page)
    next_page = last_id and {"after": last_id}
    return conditional_response({"users": Fragment(users)}, hash_version([users, next_page]), next_page)


@bp.put("/api/password")
@login_required
def change_password():
    """Change the password of the current user, and end the session on all other devices."""
    current_password = get_string("current_password", MAX_PASSWORD_LENGTH)
    new_password = get_checked("new_password", check_new_password)
    reauthenticate(current_password)
    user = current_user.change_password(hash_password(new_password)) or abort(401)
    db.session.commit()
    set_session_cookie(user)
    return {"message": "Password changed successfully"}


@bp.delete("/api/account")
@login_required
def delete_account():
    """Delete the current user with all conversations."""
    reauthenticate(get_string("password", MAX_PASSWORD_LENGTH))
    current_user.delete() or abort(401)
    db.session.commit()
    logout_user()
    session.clear()
    return "", 204


def open_session(username, password):
    """Return the user with a session; abort with 401 if the password is wrong, 403 if the account is disabled."""
    user = get_user(username)
    is_right = authenticate(username, user, password)
    while is_right:
        if user.is_disabled:
            abort(403, "This account is disabled")
        new_hash = hash_password(password) if needs_rehash(user.password_hash, password) else None
        if logged_in := user.log_in(current_app.config["SESSIONS_VALID_FROM"], new_hash):
            return logged_in
        user = get_user(username)  # its hash was changed meanwhile: by another login, or with the password
        is_right = user and verify_password(user.password_hash, password)
    return abort(401, "Invalid username or password")


def get_user(username):
    """Return the user of a name, or None, and hold no connection while a password is hashed."""
    user = User.get_by_username(username)
    db.session.close()
    return user


def reauthenticate(password):
    """Abort with 403 if the password is not that of the current user."""
    if not authenticate(current_user.username, current_user, password):
        abort(403, "Wrong password")


def set_session_cookie(user):
    """Let the response set the session cookie of a user."""
    login_user(user)
    session.permanent = True
    g.user_id = user.user_id
