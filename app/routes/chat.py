"""Talk: conversations and their messages."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain

import click
import orjson
from flask import Blueprint, abort, current_app, g, request
from flask_login import current_user, login_required
from orjson import Fragment
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.orm.exc import StaleDataError
from werkzeug.exceptions import BadGateway, GatewayTimeout, HTTPException, InternalServerError, NotFound

from app import db
from app.bot import BotError, BotTimeout, simulated_bot, with_pauses
from app.models import Conversation, Message, User
from app.models.user import hash_password
from app.routes import (
    PAGE,
    http_error,
    number_parameter,
    revalidated,
    sentence,
    string_field,
    text_parameter,
    trouble,
    unavailable,
)
from app.routes.auth import claimed_session
from app.sql import MAX_ID

NAME_LENGTH = 255
TEXT_LENGTH = 100_000

MESSAGES = 1000  # at most so many messages in each conversation of a list that says how many
PAUSE = 15  # seconds of the bot's silence after which a stream shows that it is alive
DEMO_PASSWORD = "demo password"
DEMO = {
    "charles": {
        "The analytical engine": ["Hello", "Can a machine compose music?", "I think it might"],
        "Notes": ["Note G is about the Bernoulli numbers"],
    },
    "alan": {"Can machines think?": ["Good morning", "Can you play the imitation game?"]},
    "barbara": {"A first draft": []},
}

bp = Blueprint("chat", __name__, cli_group=None)


@bp.get("/api/conversations")
@login_required
def list_conversations():
    """List the caller's conversations with their messages."""
    limit = number_parameter("limit", 1, PAGE)
    before = number_parameter("before", 1, MAX_ID)
    if before and not limit:
        abort(400, "before goes with limit")
    found = Conversation.listed(
        current_user,
        limit=limit and limit + 1,
        before=before,
        messages=number_parameter("messages", 0, MESSAGES),
        q=text_parameter("q", NAME_LENGTH),
    )
    if limit is None or len(found) <= limit:
        return revalidated(found)
    return revalidated(found[:limit], before=found[limit - 1]["id"])


@bp.post("/api/conversations")
@login_required
def create_conversation():
    """Open a conversation."""
    conversation = Conversation(name=string_field("name", 1, NAME_LENGTH), user_id=current_user.id)
    db.session.add(conversation)
    try:
        db.session.commit()
    except IntegrityError:  # the account was deleted just before
        abort(401)
    return conversation.summary(), 201


@bp.get("/api/conversations/<id:conversation_id>")
@login_required
def show_conversation(conversation_id):
    """Show one of the caller's conversations with its messages."""
    messages = number_parameter("messages", 0, MESSAGES)
    found = Conversation.listed(current_user, only=conversation_id, messages=messages)
    return revalidated(found[0]) if found else abort(404, "Conversation not found")


@bp.get("/api/conversations/<id:conversation_id>/messages")
@login_required
def list_messages(conversation_id):
    """List a stretch of one of the caller's conversations, oldest first: its newest messages, or those before one."""
    limit = number_parameter("limit", 1, PAGE) or 50
    before = number_parameter("before", 1, MAX_ID)
    own_conversation(conversation_id)
    found = db.session.execute(Message.stretch(conversation_id, limit + 1, before)).all()
    page = found[-limit:]
    following = {"before": page[0].id} if len(found) > limit else {}
    return revalidated([Fragment(message.json) for message in page], **following)


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
def send_message(conversation_id):
    """Send a message and get the bot's reply: whole, or piece by piece for who accepts text/event-stream."""
    claim, history = own_history(conversation_id)
    turn = Turn(
        claim=claim,
        conversation_id=conversation_id,
        text=string_field("text", 1, TEXT_LENGTH),
        key=idempotency_key(),
        asked_at=datetime.now(UTC),
    )
    streams = request.accept_mimetypes.best_match(["application/json", "text/event-stream"]) == "text/event-stream"
    answer = turn.replayed()
    if answer is None:
        db.session.close()  # holds no connection while the bot thinks
        pieces = current_app.extensions["bot"]([*history, ("user", turn.text)])
        if streams:
            return stream(turn, pieces)
        answer = turn.stored("".join(pieces))
    pair, headers = answer
    if streams:
        return event_stream([event("done", pair)], headers)
    return pair, 201, headers


@bp.cli.command("demo")
def demo():
    """Fill the database with a few users and conversations, for a front end to show."""
    password = hash_password(DEMO_PASSWORD, current_app.config["PASSWORD_HASH_METHOD"])
    for username, talks in DEMO.items():
        user = User(username=username, password_hash=password)
        for name, texts in talks.items():
            conversation = Conversation(name=name)
            history = []
            for text in texts:
                history.append(("user", text))
                history.append(("bot", "".join(simulated_bot(history))))
            now = datetime.now(UTC)
            conversation.messages = [Message(sender=sender, text=said, created_at=now) for sender, said in history]
            user.conversations.append(conversation)
        db.session.add(user)
    try:
        db.session.commit()
    except IntegrityError:
        raise click.ClickException("the demo's users exist already") from None
    except SQLAlchemyError as error:
        raise click.ClickException(trouble(error)) from None
    click.echo(f"Log in as {', '.join(DEMO)}; the password is: {DEMO_PASSWORD}")


@bp.errorhandler(StaleDataError)
def gone(error):
    """Answer 404 when a conversation was deleted just before it was changed."""
    return http_error(NotFound("Conversation not found"))


@bp.errorhandler(BotError)
def bot_error(error):
    """Answer 502, or 504 when the bot took too long. Nothing was stored, so it is safe to try again."""
    return http_error(gateway_error(error))


def gateway_error(error):
    """Return the HTTPException that tells people of a BotError; the log has the reason."""
    current_app.logger.warning("The bot failed: %s", error)
    if isinstance(error, BotTimeout):
        return GatewayTimeout("The bot took too long to answer")
    return BadGateway("The bot failed to answer")


def own_conversation(conversation_id):
    """Return the caller's conversation, or abort with 404, whether it is missing or another's."""
    return Conversation.owned(conversation_id, current_user) or abort(404, "Conversation not found")


def own_history(conversation_id):
    """Return the caller's session and what the bot is shown of one of their conversations; or abort with 401 or 404.

    One statement confirms the session and reads the history, so that a send needs no @login_required.
    """
    claim = claimed_session()
    history = Conversation.history(conversation_id, claim, current_app.config["BOT_HISTORY"] - 1)
    if not history:  # the session is over, the conversation is not the caller's, or it is empty
        current_user.is_authenticated or abort(401)
        own_conversation(conversation_id)
    g.user_id = claim["user"]
    return claim, history


def idempotency_key():
    """Return the request's Idempotency-Key, or None; abort with 400 if it is not what it should be."""
    key = request.headers.get("Idempotency-Key")
    if key is not None and not re.fullmatch("[!-~]{1,255}", key):
        abort(400, "Idempotency-Key must be 1 to 255 visible ASCII characters")
    return key


@dataclass
class Turn:
    """A message on its way to a reply, and its user's session (see User.claimed), which may end meanwhile."""

    claim: dict
    conversation_id: int
    text: str
    key: str | None
    asked_at: datetime

    def stored(self, reply):
        """Store the message and its reply, both or neither; return the pair in the wire format and its headers.

        Aborts with 401 if the session is over by now, with 404 if the conversation is gone. If an equal send was
        faster, the pair is the one that it has stored.
        """
        if not reply.strip():
            raise BotError("the bot said nothing")
        try:
            pair = Conversation.add_pair(self.conversation_id, self.claim, self.text, self.asked_at, reply, self.key)
        except IntegrityError:  # an equal send was faster
            return self.replayed() or abort(404, "Conversation not found")
        if pair is None:
            abort(404, "Conversation not found") if User.of_session(self.claim) else abort(401)
        return [Fragment(message) for message in pair], {}

    def replayed(self):
        """Return the pair and the headers if a send of this key is stored already; abort with 409 for another text."""
        stored = self.key and Message.pair_of(self.conversation_id, self.key)
        if not stored:
            return None
        text, pair = stored
        if text != self.text:
            abort(409, "Idempotency-Key was used for another text in this conversation")
        return [Fragment(message) for message in pair], {"Idempotent-Replayed": "true"}


def stream(turn, pieces):
    """Answer with server-sent events: the pieces as they come, at last the stored pair.

    A bot that fails before its first piece gets a status of its own. What was said until it breaks off, or until
    the client goes away, is stored: nobody loses what they have read.
    """
    app = current_app._get_current_object()
    pieces = with_pauses(pieces, PAUSE)
    first = next(pieces, "")
    if first == "":
        raise BotError("the bot said nothing")

    def last_event(said, failure=None):
        with app.app_context():
            try:
                pair, _ = turn.stored("".join(said))
            except HTTPException as error:
                failure = failure or error
            except BotError as error:
                failure = failure or gateway_error(error)
            except SQLAlchemyError as error:
                failure = unavailable(error)
            return event("error", {"error": sentence(failure)}) if failure else event("done", pair)

    def events():
        said, failure = [], None
        try:
            for piece in chain([first], pieces):
                said.append(piece or "")
                yield b": thinking\n\n" if piece is None else event("delta", {"text": piece})
        except BotError as error:
            with app.app_context():
                failure = gateway_error(error)
        except Exception as error:
            app.logger.exception("The bot has a bug")
            failure = InternalServerError(original_exception=error)
        except BaseException:  # the client went away, or the server stops
            last_event(said)
            raise
        yield last_event(said, failure)

    response = event_stream(events())
    response.call_on_close(pieces.close)
    return response


def event(name, data):
    """Return a server-sent event."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), orjson.dumps(data))


def event_stream(events, headers=()):
    """Return a response of server-sent events that neither caches nor proxies hold back."""
    headers = {"X-Accel-Buffering": "no", **dict(headers)}
    return current_app.response_class(events, mimetype="text/event-stream", headers=headers)
