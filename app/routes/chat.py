"""Conversations, messages and replies."""

from base64 import urlsafe_b64decode, urlsafe_b64encode
from datetime import UTC, datetime
from functools import partial
from itertools import chain, islice

from flask import Blueprint, abort, current_app, g, request, stream_with_context
from flask_login import current_user, login_required
from orjson import Fragment
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from werkzeug.exceptions import HTTPException

from app import db
from app.bot import BotError
from app.database import MAX_ID, fold_case, format_timestamp
from app.errors import error_message, log_error, to_http_exception
from app.models import Conversation, Message
from app.models.conversation import touch
from app.models.exchange import Exchange
from app.responses import (
    conditional_response,
    event_stream,
    format_event,
    format_event_id,
    hash_version,
    is_not_modified,
)
from app.threads import run_long_query
from app.validation import (
    get_idempotency_key,
    get_int_arg,
    get_last_event_id,
    get_str_arg,
    get_string,
    prefers_async,
    wants_stream,
)

MAX_NAME_LENGTH = 255
MAX_TEXT_LENGTH = 100_000
MAX_PAGE_SIZE = 100
DEFAULT_PAGE_SIZE = 50
LIST_PARAMETERS = ("limit", "before", "messages", "q", "order", "cursor")
MAX_MESSAGES_PER_CONVERSATION = 1000  # in a list of conversations that says how many

bp = Blueprint("chat", __name__)


@bp.before_request
def fail_abandoned_replies():
    """End the replies whose process was killed."""
    current_app.extensions["replies"].fail_abandoned()


@bp.get("/api/conversations")
@login_required
def list_conversations():
    """List the conversations of the current user with their messages."""
    filters = get_list_args()
    list_func = partial(list_page if "limit" in filters else list_all, filters)
    return read_long(list_func, "search") if "folded" in filters else list_func()


def read_long(func, purpose):
    """Return what a function that reads many messages returns, see run_long_query().

    SQLite would stop the event loop meanwhile.
    """
    user_id, is_sqlite = current_user.id, db.engine.dialect.name == "sqlite"
    if is_sqlite:
        db.session.connection()  # for the thread, which must not wait for the pool's locks: they are gevent's
    else:
        db.session.close()  # holds no connection while other long queries run
    return run_long_query(func, user_id, purpose, in_thread=is_sqlite)


def list_all(filters):
    """Return all conversations."""
    if request.if_none_match:  # else this would take a tenth of the time
        etag = get_etag(Conversation.list_versions(current_user.id, **filters))
        if is_not_modified(etag):
            return conditional_response(None, etag)
    rows = list_with_messages(filters)
    has_details = not request.args.keys().isdisjoint(LIST_PARAMETERS)
    return conditional_response([conversation_to_dict(row, has_details) for row in rows], get_etag(rows))


def list_with_messages(filters):
    """Return the rows of Conversation.list_for_user(), read as a long query if they are not as short as a page."""
    list_func = partial(Conversation.list_for_user, current_user.id, **filters)
    if "folded" in filters or filters.get("messages") == 0:  # part of a long query, or short
        return list_func()
    rows = list_func(if_short=True)
    is_long = rows and rows[0].messages_json is None  # the condition is the same for all rows
    return read_long(list_func, "list") if is_long else rows


def list_page(filters):
    """Return a page of conversations, each with its newest messages."""
    limit = filters["limit"]
    filters = {"messages": MAX_MESSAGES_PER_CONVERSATION, **filters, "limit": limit + 1}
    versions = Conversation.list_versions(current_user.id, **filters)
    etag = get_etag(versions)
    if is_not_modified(etag):
        return conditional_response(None, etag)
    if filters.pop("folded", None):  # the search is not repeated
        filters["ids"] = [row.id for row in versions]
    if count := Conversation.count_fitting(current_user.id, **filters):
        filters.update(limit=min(limit, count), fits=True)  # a list of which nothing is cut takes half of the time
    else:
        filters["limit"] = 1
    rows = Conversation.list_for_user(current_user.id, **filters)
    has_next_page = len(versions) > filters["limit"]
    next_page = get_next_page(rows[-1], "recent" in filters) if rows and has_next_page else None
    return conditional_response([conversation_to_dict(row, has_details=True) for row in rows], etag, next_page)


def get_list_args():
    """Return the filters of Conversation.select_for_user() from the query string, or abort with 400."""
    limit, before = get_int_arg("limit", maximum=MAX_PAGE_SIZE), get_int_arg("before")
    order, q = get_str_arg("order", MAX_NAME_LENGTH), get_str_arg("q", MAX_NAME_LENGTH)
    last_updated_at, last_id = get_cursor()
    if order not in (None, "recent"):
        abort(400, "order must be recent")
    if before and not limit:
        abort(400, "before requires limit")
    if before and order:
        abort(400, "order=recent requires cursor instead of before")
    if last_id is not None and not (limit and order):
        abort(400, "cursor requires limit and order=recent")
    filters = {
        "messages": get_int_arg("messages", minimum=0, maximum=MAX_MESSAGES_PER_CONVERSATION),
        "folded": q and fold_case(q),
        "limit": limit,
        "before": before,
        "recent": order,
        "last_updated_at": last_updated_at,
        "last_id": last_id,
    }
    return {name: value for name, value in filters.items() if value is not None}


def get_cursor():
    """Return (updated_at, id) of the query string's cursor, or (None, None); abort with 400 if it is invalid."""
    cursor = get_str_arg("cursor", MAX_NAME_LENGTH)
    if cursor is None:
        return None, None
    try:
        updated_at, id = urlsafe_b64decode(cursor).decode().split()
        return datetime.fromisoformat(updated_at).astimezone(UTC), min(abs(int(id)), MAX_ID)
    except (ValueError, OverflowError):
        abort(400, "cursor must come from a Link header")


def get_next_page(last, is_recent):
    """Return the query parameters of the page after the one that a conversation is the last of."""
    if not is_recent:
        return {"before": last.id}
    return {"cursor": urlsafe_b64encode(f"{last.updated_at.isoformat()} {last.id}".encode()).decode()}


def get_etag(rows):
    """Return the ETag of conversations and their messages: a hash of all columns but `messages_json`."""
    column_count = len(Conversation.__table__.columns)
    return hash_version([row[:column_count] for row in rows])


def conversation_to_dict(row, has_details):
    """Return a row of Conversation.list_for_user() as the API shows it."""
    conversation = Conversation.to_dict(row)
    if has_details:
        conversation["created_at"] = format_timestamp(row.created_at)
        conversation["updated_at"] = format_timestamp(row.updated_at)
    return {**conversation, "messages": Fragment(row.messages_json)}


@bp.post("/api/conversations")
@login_required
def create_conversation():
    """Create a conversation."""
    conversation = Conversation(name=get_string("name", MAX_NAME_LENGTH), user_id=current_user.id)
    db.session.add(conversation)
    try:
        db.session.commit()
    except IntegrityError:  # the account was deleted just before
        abort(401)
    return conversation.to_dict(), 201


@bp.get("/api/conversations/<id:conversation_id>")
@login_required
def get_conversation(conversation_id):
    """Return a conversation with its messages."""
    messages = get_int_arg("messages", minimum=0, maximum=MAX_MESSAGES_PER_CONVERSATION)
    etag = get_conversation_etag(conversation_id)
    if is_not_modified(etag):
        return conditional_response(None, etag)
    filters = {"id": conversation_id}
    if messages is not None:
        filters["messages"] = messages
    rows = list_with_messages(filters)
    if not rows:  # it was deleted just now
        abort(404, "Conversation not found")
    return conditional_response(conversation_to_dict(rows[0], has_details=True), etag)


def get_conversation_etag(conversation_id):
    """Return the ETag of a conversation and its messages; abort with 404 if it is missing or another user's."""
    rows = Conversation.list_versions(current_user.id, id=conversation_id)
    return get_etag(rows) if rows else abort(404, "Conversation not found")


@bp.route("/api/conversations/<id:conversation_id>", methods=["PUT", "PATCH"])
@login_required
def rename_conversation(conversation_id):
    """Rename a conversation."""
    conversation = get_conversation_or_404(conversation_id)
    conversation.name = get_string("name", MAX_NAME_LENGTH)
    db.session.commit()
    return conversation.to_dict()


@bp.delete("/api/conversations/<id:conversation_id>")
@login_required
def delete_conversation(conversation_id):
    """Delete a conversation with its messages."""
    db.session.delete(get_conversation_or_404(conversation_id))
    db.session.commit()
    return "", 204


def get_conversation_or_404(conversation_id):
    """Return the current user's conversation; abort with 404 if it is missing or another user's."""
    return Conversation.get_for_user(conversation_id, current_user.id) or abort(404, "Conversation not found")


@bp.get("/api/messages")
@login_required
def search_messages():
    """List the messages of the current user that contain a text, the newest first."""
    q = get_str_arg("q", MAX_NAME_LENGTH) or abort(400, "q is required")
    limit = get_int_arg("limit", maximum=MAX_PAGE_SIZE) or DEFAULT_PAGE_SIZE
    before, user_id = get_int_arg("before"), current_user.id
    rows = read_long(lambda: Conversation.search_messages(user_id, q, limit + 1, before), "search")
    results = [search_result_to_dict(message, name, q) for message, name in rows[:limit]]
    next_page = {"before": results[-1]["id"]} if len(rows) > limit else None
    return conditional_response(results, hash_version([results, next_page]), next_page)


def search_result_to_dict(message, conversation_name, q):
    """Return a message that was found as the API shows it: with its conversation and the text around the match."""
    result = message.to_dict()
    del result["text"]
    conversation = {"id": message.conversation_id, "name": conversation_name}
    return {**result, "conversation": conversation, **message.get_match(q)}


@bp.get("/api/conversations/<id:conversation_id>/messages")
@login_required
def list_messages(conversation_id):
    """List messages of a conversation, oldest first: the newest ones, or those before one."""
    limit = get_int_arg("limit", maximum=MAX_PAGE_SIZE) or DEFAULT_PAGE_SIZE
    before = get_int_arg("before")
    etag = get_conversation_etag(conversation_id)
    if is_not_modified(etag):
        return conditional_response(None, etag)
    rows = db.session.execute(Message.select_page(conversation_id, limit, before)).all()
    next_page = None
    if rows:
        older = Message.select_ids(conversation_id, before=rows[0].id).order_by(Message.id.desc())
        next_page = db.session.scalar(older.limit(1)) and {"before": rows[0].id}
    return conditional_response([Fragment(row.json) for row in rows], etag, next_page)


@bp.post("/api/conversations/<id:conversation_id>/messages")
@login_required
def send_message(conversation_id):
    """Send a message and return it with the bot's reply, see respond_with_reply()."""
    text, key = get_string("text", MAX_TEXT_LENGTH), get_idempotency_key()
    replies = current_app.extensions["replies"]
    with replies.lock_conversation(current_user.id, conversation_id):
        exchange = Exchange.add(conversation_id, current_user.id, text, current_app.config["BOT_HISTORY_CHARS"], key)
        if exchange is None:
            abort(404, "Conversation not found")
        if exchange.is_other_text:
            abort(409, "Idempotency-Key was used for another text in this conversation")
        reply = replies.start_or_join(exchange, g.request_id)
    return respond_with_reply(reply, 201, is_new=exchange.history is not None)


@bp.put("/api/conversations/<id:conversation_id>/messages/<id:message_id>")
@login_required
def edit_message(conversation_id, message_id):
    """Edit a message of the user, drop what follows it, and return it with the bot's new reply."""
    text = get_string("text", MAX_TEXT_LENGTH)
    replies = current_app.extensions["replies"]
    with replies.lock_conversation(current_user.id, conversation_id):
        exchange = get_edited_exchange(conversation_id, message_id, text)
        reply = replies.start_or_join(exchange, g.request_id)
    return respond_with_reply(reply, 200, is_new=exchange.history is not None)


def get_edited_exchange(conversation_id, message_id, text):
    """Return the exchange that edits a message, or that does so already with this text; abort with 404 or 409."""
    if not touch(conversation_id, current_user.id):
        abort(404, "Conversation not found")
    message = Message.get(conversation_id, message_id) or abort(404, "Message not found")
    if message.sender == "bot":
        abort(409, "Only a message of the user can be edited: edit the one that this message replies to")
    exchange = Exchange.get(current_user.id, message)
    if exchange and exchange.reply.get("status") == "in_progress":
        if exchange.question["text"] != text:
            abort(409, "The reply to this message is in progress: stop it first")
        return exchange
    if Message.get_pending_edit(conversation_id, "user"):
        abort(409, "Another message of this conversation is being edited")
    attempt = exchange.attempt + 1 if exchange else 1
    return Exchange.edit(message, current_user.id, text, current_app.config["BOT_HISTORY_CHARS"], attempt)


@bp.get("/api/conversations/<id:conversation_id>/messages/<id:message_id>")
@login_required
def get_message(conversation_id, message_id):
    """Return a message as it is now."""
    etag = get_conversation_etag(conversation_id)
    message = get_message_or_404(conversation_id, message_id)
    return conditional_response(message.to_dict(), etag)


@bp.get("/api/conversations/<id:conversation_id>/messages/<id:message_id>/events")
@login_required
def follow_reply(conversation_id, message_id):
    """Return a reply as server-sent events, from the beginning or from Last-Event-ID."""
    exchange = get_exchange_or_404(conversation_id, message_id)
    offset, is_over = get_last_event_id(exchange.attempt)
    is_in_progress = exchange.reply.get("status") == "in_progress"
    # A reply whose process was taken for dead may have grown after its end.
    if is_over and not is_in_progress and offset >= len(exchange.reply["text"]):
        return "", 204
    replies = current_app.extensions["replies"]
    if is_in_progress:
        replies.check_followers(current_user.id)
    return stream_reply(replies.get(exchange), offset)


@bp.post("/api/conversations/<id:conversation_id>/messages/<id:message_id>/stop")
@login_required
def stop_reply(conversation_id, message_id):
    """Stop a reply in progress and return it as stored."""
    exchange = get_exchange_or_404(conversation_id, message_id)
    replies = current_app.extensions["replies"]
    reply = replies.get(exchange)
    replies.stop(exchange)
    db.session.close()  # holds no connection while another process stops
    consume(reply.follow())
    return reply.to_list()[1]


def get_message_or_404(conversation_id, message_id):
    """Return a message of the current user's conversation; abort with 404 if either is missing."""
    get_conversation_or_404(conversation_id)
    return Message.get(conversation_id, message_id) or abort(404, "Message not found")


def get_exchange_or_404(conversation_id, message_id):
    """Return the exchange of a message of the current user's conversation; abort with 404 if either is missing."""
    message = get_message_or_404(conversation_id, message_id)
    return Exchange.get(current_user.id, message) or abort(404, "The message has no reply")


def respond_with_reply(reply, status, is_new):
    """Return an exchange when its reply is over; as server-sent events or at once, if the client prefers that.

    The reply is generated in the background, whatever becomes of this request, which has begun it if `is_new`.
    """
    replies = current_app.extensions["replies"]
    exchange = reply.exchange
    is_over = exchange.reply.get("status") != "in_progress"
    headers = {"Idempotent-Replayed": "true"} if is_over else {}
    if prefers_async() and not is_over:
        return [exchange.question, exchange.reply], 202, {"Preference-Applied": "respond-async"}
    if not (is_over or is_new):
        replies.check_followers(current_user.id)
    if wants_stream():
        return stream_reply(reply, headers=headers)
    consume(replies.follow(reply))
    return reply.to_list(), status, headers


def consume(updates):
    """Wait until a reply is over and stored. Raises the bot's error if it failed before its first chunk."""
    for _ in updates:
        pass


def stream_reply(reply, offset=None, headers=()):
    """Return a reply as server-sent events; with an offset, only the text from that character on.

    The head waits for the first chunk, but not longer than SILENCE_INTERVAL, so that an early failure has a status.
    """
    db.session.close()  # holds no connection while the bot works
    updates = current_app.extensions["replies"].follow(reply, offset or 0)
    first = list(islice(updates, 1))
    events = generate_events(reply, chain(first, updates), offset)
    return event_stream(stream_with_context(events), dict(headers))


def generate_events(reply, updates, offset):
    """Yield the events of a reply. The id of the last one says that nothing follows."""
    attempt = reply.exchange.attempt
    if offset is None:
        offset = 0
        start = {**reply.exchange.reply, "text": "", "status": "in_progress"}
        yield format_event("start", [reply.exchange.question, start])
    try:
        for text in updates:
            offset += len(text or "")
            id = format_event_id(offset, attempt)
            yield format_event("delta", {"text": text}, id) if text else b": the bot is working\n\n"
        exchange = reply.to_list()
    except (BotError, HTTPException, SQLAlchemyError) as error:
        log_error(error)
        yield format_event("error", {"error": error_message(to_http_exception(error))})
        return
    last_id = format_event_id(offset, attempt, is_last=True)
    if exchange[1].get("status") == "failed":
        yield format_event("error", {"error": error_message(to_http_exception(reply.error))}, last_id)
    else:
        yield format_event("done", exchange, last_id)
