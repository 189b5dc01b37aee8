"""Conversations, messages and replies."""

from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from itertools import chain, islice
from threading import Lock
from weakref import WeakValueDictionary

import orjson
from flask import Blueprint, abort, current_app, g, make_response, request, stream_with_context
from flask_login import current_user, login_required
from orjson import Fragment
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from werkzeug.exceptions import HTTPException

from app import db
from app.database import MAX_ID, fold_case
from app.errors import error_message
from app.models import Conversation, Message
from app.models.exchange import Exchange, lock_conversation
from app.replies import exchange_to_list
from app.responses import conditional_response, event_stream, format_event, hash_version, is_not_modified
from app.threads import acquire, run_long_query
from app.validation import (
    get_bool,
    get_choice_arg,
    get_id,
    get_idempotency_key,
    get_int_arg,
    get_json,
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
LIST_PARAMETERS = ("limit", "before", "messages", "q", "order", "cursor", "archived")
MAX_MESSAGES_PER_CONVERSATION = 1000  # in a list of conversations that says how many

bp = Blueprint("chat", __name__)
send_locks = WeakValueDictionary()  # by user and conversation


@bp.before_request
def fail_abandoned_replies():
    """End the replies whose process was killed."""
    current_app.extensions["replies"].fail_abandoned()


@bp.get("/api/conversations")
@login_required
def list_conversations():
    """List the conversations of the current user with their messages."""
    filters = get_list_filters()
    limit = filters["limit"]
    if limit:
        filters["limit"] = limit + 1  # one more tells whether there is a next page
        filters["messages"] = MAX_MESSAGES_PER_CONVERSATION if filters["messages"] is None else filters["messages"]
    rows, etag = read_conversations(**filters)
    page, next_page = rows[:limit], None
    if len(rows) > len(page):
        last = page[-1]
        cursor = {"cursor": f"{last.updated_at} {last.id}"}
        next_page = cursor if filters["order"] else {"before": last.id}
    has_details = not request.args.keys().isdisjoint(LIST_PARAMETERS)
    return conditional_response([conversation_to_dict(row, has_details) for row in page], etag, next_page)


def read_conversations(**filters):
    """Return (rows of Conversation.list_for_user() with messages, ETag); no rows if the client has them."""
    with_messages = filters["messages"] != 0
    if request.if_none_match:  # else this would take a tenth of the time
        etag = get_etag(read_rows(is_long=filters.get("folded") is not None, **filters))
        if is_not_modified(etag):
            return [], etag
    rows = read_rows(is_long=with_messages or filters.get("folded") is not None, with_messages=with_messages, **filters)
    return rows, get_etag(rows)


def read_rows(is_long=False, **filters):
    """Return the rows of Conversation.list_for_user() of the current user."""
    read = partial(Conversation.list_for_user, current_user.id, **filters)
    return read_long(read) if is_long else read()


def read_long(func):
    """Return what a function that reads many messages returns, see run_long_query().

    SQLite would stop the event loop meanwhile: a native thread reads by a connection that this one takes from the pool.
    """
    user_id = current_user.id
    db.session.close()  # holds no connection while other long queries run
    connect = partial(db.session.connection, execution_options={"begin_immediate": False})
    return run_long_query(func, user_id, connect if db.engine.dialect.name == "sqlite" else None)


def get_list_filters():
    """Return the arguments of Conversation.list_for_user() from the query string, or abort with 400."""
    limit, before = get_int_arg("limit", maximum=MAX_PAGE_SIZE), get_int_arg("before")
    updated_at, last_id = get_cursor()
    order, archived = get_choice_arg("order", "recent"), get_choice_arg("archived", "true", "false")
    q = get_str_arg("q", MAX_NAME_LENGTH)
    if before and not limit:
        abort(400, "before requires limit")
    if before and order:
        abort(400, "order=recent requires cursor instead of before")
    if updated_at and not (limit and order):
        abort(400, "cursor requires limit and order=recent")
    return {
        "folded": q and fold_case(q),
        "archived": archived and archived == "true",
        "before": before,
        "updated_at": updated_at,
        "last_id": last_id,
        "order": order,
        "limit": limit,
        "messages": get_messages_arg(),
    }


def get_messages_arg():
    """Return how many messages of a conversation are asked for, or None; abort with 400 if that is invalid."""
    return get_int_arg("messages", minimum=0, maximum=MAX_MESSAGES_PER_CONVERSATION)


def get_cursor():
    """Return (updated_at, id) of the query string's cursor, or (None, None); abort with 400 if it is invalid."""
    cursor = get_str_arg("cursor", MAX_NAME_LENGTH)
    if cursor is None:
        return None, None
    try:
        updated_at, id = cursor.split()
        return datetime.fromisoformat(updated_at).astimezone(UTC), min(abs(int(id)), MAX_ID)
    except (ValueError, OverflowError):
        abort(400, "cursor must come from a Link header")


def get_etag(rows):
    """Return the ETag of conversations and their messages: a hash of all columns but `messages_json`."""
    return hash_version([row[:-1] for row in rows])


def conversation_to_dict(row, has_details=True):
    """Return a row of read_conversations() as the API shows it."""
    details = {"archived": bool(row.archived), "created_at": row.created_at, "updated_at": row.updated_at}
    fields = Conversation.to_dict(row) | (details if has_details else {})
    return {**fields, "messages": Fragment(row.messages_json)}


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
    with_versions = get_versions_arg()
    rows, etag = read_conversations(id=conversation_id, messages=get_messages_arg())
    if etag == get_etag([]):  # there is no row
        abort(404, "Conversation not found")
    return conditional_response(rows and conversation_with_versions(rows[0], with_versions), etag)


def get_versions_arg():
    """Return whether the versions of messages are asked for; abort with 400 if that is invalid."""
    return get_int_arg("versions", minimum=0, maximum=1) == 1


def conversation_with_versions(row, with_versions):
    """Return a row of read_conversations() as the API shows it, see add_versions()."""
    return {**conversation_to_dict(row), "messages": add_versions(row.messages_json, row.id, with_versions)}


def add_versions(messages_json, conversation_id, with_versions):
    """Return the messages of a JSON array; those that have several versions with the ids of all, if so asked."""
    if not with_versions:
        return Fragment(messages_json)
    versions, messages = Message.map_versions(conversation_id), orjson.loads(messages_json)
    return [
        {**message, "versions": versions[message["id"]]} if message["id"] in versions else message
        for message in messages
    ]


@bp.put("/api/conversations/<id:conversation_id>")
@login_required
def rename_conversation(conversation_id):
    """Rename a conversation."""
    conversation = get_conversation_or_404(conversation_id)
    conversation.name = get_string("name", MAX_NAME_LENGTH)
    db.session.commit()
    return conversation.to_dict()


@bp.patch("/api/conversations/<id:conversation_id>")
@login_required
def change_conversation(conversation_id):
    """Rename a conversation, archive it, or bring it back."""
    conversation, fields = get_conversation_or_404(conversation_id), get_json()
    if not fields.keys() & {"name", "archived"}:
        abort(400, "name or archived is required")
    if "name" in fields:
        conversation.name = get_string("name", MAX_NAME_LENGTH)
    if "archived" in fields:
        conversation.archived_at = (conversation.archived_at or datetime.now(UTC)) if get_bool("archived") else None
    db.session.commit()
    return {**conversation.to_dict(), **conversation.get_details()}


@bp.delete("/api/conversations/<id:conversation_id>")
@login_required
def delete_conversation(conversation_id):
    """Delete a conversation with its messages."""
    db.session.delete(get_conversation_or_404(conversation_id))
    db.session.commit()
    return "", 204


def get_conversation_or_404(conversation_id):
    """Return the current user's conversation; abort with 404 if it is missing or another user's."""
    query = select(Conversation).filter_by(id=conversation_id, user_id=current_user.id)
    return db.one_or_404(query, description="Conversation not found")


@bp.put("/api/conversations/<id:conversation_id>/current")
@login_required
def show_branch(conversation_id):
    """Show the branch of a message: of several versions, this one and what followed it."""
    message_id, with_versions = get_id("message_id"), get_versions_arg()
    lock_conversation_or_404(conversation_id)
    message = Message.get(conversation_id, message_id) or abort(404, "Message not found")
    Message.show_branch(conversation_id, message.id)
    db.session.commit()
    rows = read_rows(is_long=True, with_messages=True, id=conversation_id)
    return conversation_with_versions(rows[0], with_versions) if rows else abort(404, "Conversation not found")


@bp.post("/api/conversations/<id:conversation_id>/title")
@login_required
def create_title(conversation_id):
    """Name a conversation after its first exchange, unless it is renamed meanwhile."""
    conversation = get_conversation_or_404(conversation_id)
    history = Message.list_first(conversation_id) or abort(409, "The conversation has no message")
    old_name = title = conversation.name
    if not Conversation.start_title(conversation_id, current_app.config["BOT_TIMEOUT"]):
        abort(409, "A title of this conversation is being generated")
    try:
        title = current_app.extensions["replies"].create_title(current_user.id, history, g.request_id)
    finally:
        conversation = Conversation.end_title(conversation_id, old_name, title)
    return conversation.to_dict() if conversation else abort(404, "Conversation not found")


@bp.get("/api/messages")
@login_required
def search_messages():
    """List the messages of the current user that contain a text, the newest first."""
    q = get_str_arg("q", MAX_NAME_LENGTH) or abort(400, "q is required")
    limit = get_int_arg("limit", maximum=MAX_PAGE_SIZE) or DEFAULT_PAGE_SIZE
    before, user_id = get_int_arg("before"), current_user.id
    rows = read_long(lambda: Conversation.search_messages(user_id, q, limit + 1, before))
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
    before, with_versions = get_int_arg("before"), get_versions_arg()
    conversations = read_rows(id=conversation_id) or abort(404, "Conversation not found")
    etag = get_etag(conversations)
    if is_not_modified(etag):
        return conditional_response(None, etag)
    rows = db.session.execute(Message.select_page(conversation_id, limit + 1, before)).all()
    page = rows[-limit:]
    next_page = {"before": page[0].id} if len(rows) > limit else None
    messages_json = f"[{','.join(row.json for row in page)}]"
    return conditional_response(add_versions(messages_json, conversation_id, with_versions), etag, next_page)


@bp.get("/api/conversations/<id:conversation_id>/messages/<id:message_id>")
@login_required
def get_message(conversation_id, message_id):
    """Return a message as it is now."""
    return get_message_or_404(conversation_id, message_id).to_dict()


@bp.get("/api/conversations/<id:conversation_id>/messages/<id:message_id>/versions")
@login_required
def list_versions(conversation_id, message_id):
    """List the versions of a message, oldest first."""
    return [message.to_dict() for message in get_message_or_404(conversation_id, message_id).list_versions()]


@bp.post("/api/conversations/<id:conversation_id>/messages")
@login_required
def send_message(conversation_id):
    """Send a message and return it with the bot's reply."""
    text, key = get_string("text", MAX_TEXT_LENGTH), get_idempotency_key()
    with send_lock(conversation_id):
        exchange = repeat_exchange(conversation_id, text, key)
        exchange = exchange or Exchange.add(conversation_id, current_user.id, text, key)
        reply = start_or_get_reply(exchange)
    return respond_with_reply(exchange, reply, 201)


@bp.put("/api/conversations/<id:conversation_id>/messages/<id:message_id>")
@login_required
def edit_message(conversation_id, message_id):
    """Add another version of a message of the user, or of its reply, and return both."""
    text, key = get_string("text", MAX_TEXT_LENGTH), get_idempotency_key()
    with send_lock(conversation_id):
        message = Message.get(conversation_id, message_id) or abort(404, "Message not found")
        if message.sender == "bot":
            abort(409, "Only a message of the user can be edited: edit the one that this message replies to")
        exchange = repeat_exchange(conversation_id, text, key) or get_exchange_in_progress(message, text)
        exchange = exchange or Exchange.add_version(message, current_user.id, text, key)
        reply = start_or_get_reply(exchange)
    return respond_with_reply(exchange, reply, 200)


@contextmanager
def send_lock(conversation_id):
    """Lock the current user's conversation until the transaction ends; abort with 404 if there is none.

    Sends of this process take turns before they do in the database, where each that waits would hold a connection.
    """
    with acquire(send_locks.setdefault((current_user.id, conversation_id), Lock())):
        lock_conversation_or_404(conversation_id)
        yield


def lock_conversation_or_404(conversation_id):
    """Lock the current user's conversation to change its messages; abort with 404 if it is missing or another's."""
    if not lock_conversation(conversation_id, current_user.id):
        abort(404, "Conversation not found")


def repeat_exchange(conversation_id, text, key):
    """Return the exchange of an earlier request with an idempotency key, or None; abort with 409 for another text.

    If its reply has failed and nothing came after it, it gets another one.
    """
    message = key and Message.get_by_key(conversation_id, key)
    if not message:
        return None
    exchange = Exchange.get(current_user.id, message)
    if exchange.question["text"] != text:
        abort(409, "Idempotency-Key was used for another text in this conversation")
    if exchange.has_failed:
        question = message if message.sender == "user" else message.parent
        exchange = Exchange.get(current_user.id, question)  # another repeat may have added a reply
        if exchange.has_failed and exchange.is_last():
            return Exchange.add_version(question, current_user.id, text)
    return exchange


def get_exchange_in_progress(message, text):
    """Return the exchange of a message if its reply is in progress, or None; abort with 409 for another text."""
    exchange = Exchange.get(current_user.id, message)
    if not (exchange and exchange.is_in_progress):
        return None
    if message.text != text:
        abort(409, "The reply to this message is in progress: stop it first")
    return exchange


@bp.get("/api/conversations/<id:conversation_id>/messages/<id:message_id>/events")
@login_required
def follow_reply(conversation_id, message_id):
    """Return a reply as server-sent events, from the beginning or from Last-Event-ID."""
    exchange = get_exchange_or_404(conversation_id, message_id)
    offset, has_end = get_last_event_id(exchange.reply["id"])
    if has_end:
        return "", 204
    reply = current_app.extensions["replies"].get(exchange)
    return stream_reply(reply, reply.follow(offset or 0), offset)


@bp.post("/api/conversations/<id:conversation_id>/messages/<id:message_id>/stop")
@login_required
def stop_reply(conversation_id, message_id):
    """Stop a reply, if it is in progress, and return it as stored."""
    exchange = get_exchange_or_404(conversation_id, message_id)
    replies = current_app.extensions["replies"]
    reply = replies.get(exchange)
    replies.stop(reply)
    db.session.close()  # holds no connection while the end is stored
    wait_for(reply)
    return reply.to_list()[1]


def get_message_or_404(conversation_id, message_id):
    """Return a message of the current user's conversation; abort with 404 if either is missing."""
    get_conversation_or_404(conversation_id)
    return Message.get(conversation_id, message_id) or abort(404, "Message not found")


def get_exchange_or_404(conversation_id, message_id):
    """Return the exchange of a message of the current user's conversation; abort with 404 if either is missing."""
    message = get_message_or_404(conversation_id, message_id)
    return Exchange.get(current_user.id, message) or abort(404, "The message has no reply")


def start_or_get_reply(exchange):
    """Return the reply of an exchange; if that is new, commit it and generate the reply, see ReplyManager.start()."""
    replies = current_app.extensions["replies"]
    return replies.start(exchange, g.request_id) if exchange.is_new else replies.get(exchange)


def respond_with_reply(exchange, reply, status):
    """Return an exchange when its reply is over; as server-sent events or at once, if the client prefers that.

    A reply that fails now without a text is the error of this request; one that was over before is returned.
    """
    db.session.close()  # holds no connection while the bot works, and no lock for a repeated send
    if not exchange.is_in_progress:
        response = stream_reply(reply, reply.follow()) if wants_stream() else make_response(reply.to_list(), status)
        response.headers["Idempotent-Replayed"] = "true"
        return response
    if prefers_async():
        return [exchange.question, exchange.reply], 202, {"Preference-Applied": "respond-async"}
    if wants_stream():
        return stream_reply(reply, wait_for_first(reply))
    wait_for(reply)
    return get_ended_exchange(reply), status


def wait_for(reply):
    """Wait until a reply is over and stored."""
    for _ in reply.follow():
        pass


def wait_for_first(reply):
    """Wait for the first text, the end, or SILENCE_INTERVAL; raise the error of a reply that failed without a text."""
    updates = reply.follow()
    first = list(islice(updates, 1))
    if not first:
        get_ended_exchange(reply)
    return chain(first, updates)


def get_ended_exchange(reply):
    """Return the exchange of a reply that is over; raise the error of one that failed without a text."""
    question, answer = reply.to_list()
    if answer.get("status") == "failed" and not answer["text"]:
        raise reply.error
    return [question, answer]


def stream_reply(reply, updates, offset=None):
    """Return a reply as server-sent events of `updates`, which begin at an offset; None: from the start event on."""
    db.session.close()  # holds no connection while the bot works
    events = generate_events(reply, updates, offset)
    return event_stream(stream_with_context(events))


def generate_events(reply, updates, offset):
    """Yield the events of a reply. `end` in the id of the last one says that nothing follows."""
    g.log_fields["characters"] = 0
    if offset is None:
        offset = 0
        yield format_event("start", exchange_to_list(reply.exchange, text="", status="in_progress"))
    try:
        for text in updates:
            offset += len(text or "")
            g.log_fields["characters"] += len(text or "")
            id = f"{reply.id} {offset}"
            yield format_event("delta", {"text": text}, id) if text else b": the bot is working\n\n"
        exchange = reply.to_list()
    except HTTPException as error:
        yield format_event("error", {"error": error_message(error)})
        return
    last_id = f"{reply.id} {offset} end"
    if exchange[1].get("status") == "failed":
        yield format_event("error", {"error": exchange[1]["error"]}, last_id)
    else:
        yield format_event("done", exchange, last_id)
