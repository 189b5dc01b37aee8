"""Talk: conversations and their messages."""

from datetime import UTC, datetime

from flask import Blueprint, abort, current_app
from flask_login import current_user, login_required
from orjson import Fragment
from sqlalchemy.exc import IntegrityError

from app import db
from app.bot import simulated_bot
from app.models import Conversation, Message, User
from app.routes import string_field

NAME_LENGTH = 255
TEXT_LENGTH = 100_000
HISTORY = 20

bp = Blueprint("chat", __name__)


@bp.get("/api/conversations")
@login_required
def list_conversations():
    """List the caller's conversations with their messages."""
    return Conversation.whole(current_user)


@bp.post("/api/conversations")
@login_required
def create_conversation():
    """Open a conversation."""
    conversation = Conversation(name=string_field("name", 1, NAME_LENGTH), user_id=current_user.id)
    db.session.add(conversation)
    db.session.commit()
    return conversation.summary(), 201


@bp.put("/api/conversations/<id:conversation_id>")
@login_required
def rename_conversation(conversation_id):
    """Give one of the caller's conversations a new name."""
    conversation = own_conversation(conversation_id)
    conversation.name = string_field("name", 1, NAME_LENGTH)
    db.session.commit()
    return conversation.summary()


@bp.delete("/api/conversations/<id:conversation_id>")
@login_required
def delete_conversation(conversation_id):
    """Delete one of the caller's conversations with all its messages."""
    db.session.delete(own_conversation(conversation_id))
    db.session.commit()
    return "", 204


@bp.post("/api/conversations/<id:conversation_id>/messages")
@login_required
def send_message(conversation_id):
    """Send a message and get the bot's answer: both are stored, or neither."""
    asked_at = datetime.now(UTC)
    conversation = own_conversation(conversation_id)
    text = string_field("text", 1, TEXT_LENGTH)
    history = [*conversation.history(HISTORY), ("user", text)]
    db.session.close()  # holds no connection while the bot thinks
    reply = "".join(simulated_bot(history))
    return [Fragment(message) for message in store(conversation_id, text, asked_at, reply)], 201


def own_conversation(conversation_id):
    """Return the caller's conversation, or abort with 404, whether it is missing or another's."""
    return Conversation.owned(conversation_id, current_user) or abort(404, "Conversation not found")


def store(conversation_id, text, asked_at, reply):
    """Store a message and its reply, if the session still lives (else 401) and the conversation still is (else 404)."""
    user = User.locked(current_user.id)
    if user is None or not user.has_session(current_user.moment, current_app.config["SESSIONS_VALID_FROM"]):
        abort(401)
    try:
        pair = Message.add_pair(conversation_id, text, asked_at, reply)
        db.session.commit()
    except IntegrityError:
        abort(404, "Conversation not found")
    return pair
