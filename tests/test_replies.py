"""Replies: generated in the background, followed by any request of any process, and stored however they end."""

import gc
import re
import sqlite3
import threading
import time
import weakref
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial

import psycopg
import pytest
from sqlalchemy import insert, select
from sqlalchemy.engine import make_url
from sqlalchemy.exc import IntegrityError
from werkzeug.exceptions import ServiceUnavailable

from app import db
from app.bot import BotBusy, BotError, BotMessageTooLong, BotTimeout, BotTruncated
from app.models import Message
from app.models.exchange import Exchange
from app.replies import MAX_ERRORS
from tests.conftest import (
    PASSWORD,
    REPLY_INTERVALS,
    SERVER_URL,
    SHARED_SESSIONS,
    create_logged_in_client,
    create_other_client,
    on_postgresql,
    on_sqlite,
)
from tests.helpers.bots import ASYNC, STREAM, Gate, read_events, start_reply
from tests.helpers.data import add_conversations, age_heartbeats, count_messages, get_texts
from tests.helpers.server import TIMEOUT, run_concurrently, run_in_background, wait_until

WAYS_TO_SEND = {"waiting": ({}, 201), "stream": (STREAM, 200), "async": (ASYNC, 202)}
each_way = pytest.mark.parametrize(("headers", "success"), WAYS_TO_SEND.values(), ids=WAYS_TO_SEND)
waiting_or_streaming = pytest.mark.parametrize("headers", [{}, STREAM], ids=["waiting", "stream"])


@pytest.fixture
def app(make_app, bot):
    return make_app(bot, **SHARED_SESSIONS)


def wait_for_end(client, conversation_id, message_id):
    """Return a message as soon as it is not in progress."""
    return wait_until(
        lambda: (
            (message := client.get_message(conversation_id, message_id).json).get("status") != "in_progress" and message
        )
    )


def wait_for_text(client, conversation_id, message_id, text):
    """Wait until a message has a text."""
    wait_until(lambda: client.get_message(conversation_id, message_id).json["text"] == text)


@pytest.mark.parametrize(
    "preference",
    ["respond-async", "Respond-Async", "respond-async, wait=10", "wait=10,respond-async", "respond-async; x"],
)
def test_send_with_respond_async_returns_202_and_reply_in_progress(ada, bot, gate, conversation_id, preference):
    bot.steps = [gate.wait, "Hello"]
    response = ada.send_message(conversation_id, headers={"Prefer": preference})
    assert response.status_code == 202
    assert response.headers["Preference-Applied"] == "respond-async"
    question, reply = response.json
    assert reply["sender"] == "bot"
    assert (reply["text"], reply["status"]) == ("", "in_progress")
    assert ada.list_messages(conversation_id) == [question, reply]
    gate.set()
    assert wait_for_end(ada, conversation_id, reply["id"]) == {
        "id": reply["id"],
        "sender": "bot",
        "text": "Hello",
        "created_at": reply["created_at"],
    }


@pytest.mark.parametrize("preference", ["", "respond-asynchronously", "wait=10", "return=minimal", "x=respond-async"])
def test_send_with_other_preference_waits(ada, conversation_id, preference):
    response = ada.send_message(conversation_id, headers={"Prefer": preference})
    assert response.status_code == 201
    assert "Preference-Applied" not in response.headers


def test_send_stores_both_messages_before_bot_is_asked(ada, bot, conversation_id):
    client, stored = create_other_client(ada), []
    bot.steps = [lambda: stored.extend(client.list_messages(conversation_id)), "Hello"]
    question, reply = ada.send_message(conversation_id).json
    assert stored == [question, {**reply, "text": "", "status": "in_progress"}]


def test_reply_in_progress_is_stored_as_it_grows(ada, bot, gate, conversation_id):
    bot.steps = ["One ", "two ", gate.wait, "three"]
    _, reply = start_reply(ada, conversation_id)
    wait_for_text(ada, conversation_id, reply["id"], "One two ")
    assert ada.list_messages(conversation_id)[1] == {**reply, "text": "One two "}
    gate.set()
    assert wait_for_end(ada, conversation_id, reply["id"])["text"] == "One two three"


def test_concurrent_sends_are_stored_as_exchanges_in_turn(app, ada, bot, conversation_id):
    clients = [create_other_client(ada) for _ in range(8)]
    both = threading.Barrier(8)
    bot.steps = [lambda: both.wait(TIMEOUT), "Reply"]
    responses = run_concurrently(8, lambda number: clients[number].send_message(conversation_id, f"Text {number}"))
    assert {response.status_code for response in responses} == {201}
    messages = ada.list_messages(conversation_id)
    assert [message["sender"] for message in messages] == ["user", "bot"] * 8
    pairs = {response.json[0]["id"]: response.json for response in responses}
    assert messages == [message for id in sorted(pairs) for message in pairs[id]]


def test_send_is_stored_after_reply_that_is_still_in_progress(ada, bot, gate, conversation_id):
    bot.scripts = {"First": ["One ", gate.wait, "two"], "Second": ["Three"]}
    first = start_reply(ada, conversation_id, "First")
    second = ada.send_message(conversation_id, "Second").json
    gate.set()
    wait_for_end(ada, conversation_id, first[1]["id"])
    messages = ada.list_messages(conversation_id)
    assert get_texts(messages) == ["First", "One two", "Second", "Three"]
    assert messages[2:] == second


def yield_from_list(history, **kwargs):
    return ["One ", "two"]


def yield_from_iterator(history, **kwargs):
    return iter(("One ", "two"))


def yield_from_generator(history, **kwargs):
    yield "One "
    yield "two"


def yield_characters(history, **kwargs):
    return "One two"


@pytest.mark.parametrize("bot", [yield_from_list, yield_from_iterator, yield_from_generator, yield_characters])
def test_bot_may_return_any_iterable(ada, conversation_id, bot):
    assert ada.send_message(conversation_id).json[1]["text"] == "One two"
    events = read_events(ada.send_message(conversation_id, headers=STREAM))
    assert events[-1][1][1]["text"] == "One two"


def test_bot_is_called_with_user_and_conversation(make_app):
    calls = []

    def bot(history, user_id, conversation_id):
        calls.append((history[-1], user_id, conversation_id))
        return ["Hello"]

    client = create_logged_in_client(make_app(bot), "ada")
    conversation_id = client.create_conversation()
    client.send_message(conversation_id, "Hi")
    assert calls == [(("user", "Hi"), client.user_id, conversation_id)]


def test_history_has_messages_with_text_before_new_one(ada, bot, gate, conversation_id):
    bot.scripts = {
        "failed": ["Cut ", BotError("cut")],
        "stopped": [gate.wait],
        "removed": [BotError("down")],
        "in progress": ["Growing ", gate.wait],
    }
    ada.send_message(conversation_id, "complete")
    ada.send_message(conversation_id, "failed")
    _, empty = start_reply(ada, conversation_id, "stopped")
    ada.stop_reply(conversation_id, empty["id"])
    ada.send_message(conversation_id, "removed")
    _, growing = start_reply(ada, conversation_id, "in progress")
    wait_for_text(ada, conversation_id, growing["id"], "Growing ")
    ada.send_message(ada.create_conversation(), "another conversation")
    ada.send_message(conversation_id, "new")
    assert bot.histories[-1] == [
        ("user", "complete"),
        ("bot", "Hello there."),
        ("user", "failed"),
        ("bot", "Cut "),
        ("user", "stopped"),
        ("user", "in progress"),
        ("bot", "Growing "),
        ("user", "new"),
    ]


def test_history_has_at_most_bot_history_chars(make_app, bot):
    client = create_logged_in_client(make_app(bot, BOT_HISTORY_CHARS=1000), "ada")
    conversation_id = client.create_conversation()
    for number in range(10):
        client.send_message(conversation_id, f"{number}" * 300)
    sizes = [sum(len(text) for _, text in history) for history in bot.histories]
    assert max(sizes) <= 1000
    assert bot.histories[-1][-1] == ("user", "9" * 300)
    assert ("user", "8" * 300) in bot.histories[-1]


def test_history_has_at_most_200_messages_before_the_new_one(app, ada, bot):
    [conversation_id] = add_conversations(app, ada, 1, messages=250)
    ada.send_message(conversation_id, "new")
    [history] = bot.histories
    texts = [message["text"] for message in ada.list_messages(conversation_id)]
    assert [text for _, text in history] == texts[50:251]


ENDS = {
    "complete": (["One ", "two"], None, "One two"),
    "cut at the model's limit": (["One ", BotTruncated("limit")], "truncated", "One "),
    "longer than 100,000 characters": (["é" * 60_000] * 2, "truncated", "é" * 100_000),
    "endless": (["x" * 1000] * 1000, "truncated", "x" * 100_000),
    "failed": (["One ", "two", BotError("cut")], "failed", "One two"),
    "timed out": (["One ", BotTimeout("stalled")], "failed", "One "),
    "bug of the bot": (["One ", ZeroDivisionError("a bug")], "failed", "One "),
    "chunk that is no string": (["One ", 2], "failed", "One "),
    "blank chunks around the text": (["", " \n", "One ", "", " ", "two\n"], None, "One  two\n"),
    "NUL and surrogates": (["\0", "One\0 ", "\ud800", "two\udfff"], None, "One two"),
}


@each_way
def test_reply_with_text_is_stored_with_status(ada, bot, headers, success):
    for end, (steps, status, text) in ENDS.items():
        bot.steps = steps
        conversation_id = ada.create_conversation()
        response = ada.send_message(conversation_id, headers=headers)
        assert response.status_code == success, end
        question, reply = ada.list_messages(conversation_id)
        reply = wait_for_end(ada, conversation_id, reply["id"])
        assert (reply.get("status"), reply["text"]) == (status, text), end
        assert ("status" in reply) == (status is not None), end
        assert ada.list_messages(conversation_id) == [question, reply], end
        if success == 201:
            assert response.json == [question, reply], end


FAILURES = {
    "error": ([BotError("secret")], 502, "The bot failed to answer"),
    "time-out": ([BotTimeout("secret")], 504, "The bot took too long to answer"),
    "busy": ([BotBusy("secret", 7)], 503, "The bot is busy, try again later"),
    "too long a message": ([BotMessageTooLong("secret")], 413, "The message is too long for the bot"),
    "bug": ([ZeroDivisionError("secret")], 500, "Internal server error"),
    "exit": ([SystemExit("secret")], 500, "Internal server error"),
    "chunk that is no string": ([b"secret"], 500, "Internal server error"),
    "no chunk": ([], 502, "The bot failed to answer"),
    "cut before the first chunk": ([BotTruncated("secret")], 502, "The bot failed to answer"),
    "blank chunks": ([" ", "\n", "\0", "\ud800", ""], 502, "The bot failed to answer"),
}


@waiting_or_streaming
def test_failure_before_first_chunk_leaves_nothing(app, ada, bot, headers):
    for failure, (steps, status, sentence) in FAILURES.items():
        bot.steps = steps
        conversation_id = ada.create_conversation()
        response = ada.send_message(conversation_id, headers=headers)
        assert (response.status_code, response.json) == (status, {"error": sentence}), failure
        assert response.headers.get("Retry-After") == ("7" if status == 503 else None), failure
        assert count_messages(app) == 0, failure
        bot.steps = ["Hello"]
        assert ada.send_message(conversation_id).json == ada.list_messages(conversation_id), failure
        delete_conversation(ada, conversation_id)


def test_failure_after_202_leaves_nothing(app, ada, bot, gate, conversation_id):
    client = create_other_client(ada)
    for failure, (steps, status, _) in FAILURES.items():
        gate.clear()
        bot.steps = [gate.wait, *steps]
        question, reply = start_reply(ada, conversation_id)
        with run_in_background(partial(client.follow_reply, conversation_id, reply["id"])) as [following]:
            gate.set()
        wait_until(lambda: count_messages(app) == 0)
        assert following.result().status_code in (status, 404), failure  # 404 if it was deleted before
        for message in (question, reply):
            assert ada.get_message(conversation_id, message["id"]).status_code == 404, failure


def test_follower_that_read_a_reply_before_it_failed_gets_its_error(app, ada, bot, gate, conversation_id):
    bot.steps = [gate.wait, BotBusy("secret", 7)]
    _, reply = start_reply(ada, conversation_id)
    replies = app.extensions["replies"]
    with app.app_context():
        exchange = Exchange.get(ada.user_id, Message.get(conversation_id, reply["id"]))
        db.session.close()
        gate.set()
        wait_until(lambda: not replies.replies)
        with pytest.raises(ServiceUnavailable):
            list(replies.get(exchange).follow())


def test_errors_of_deleted_replies_are_kept_for_the_last_ones_only(app, ada, bot, conversation_id):
    bot.steps = [BotError("secret")]
    for _ in range(MAX_ERRORS + 1):
        ada.send_message(conversation_id)
    assert len(app.extensions["replies"].errors) == MAX_ERRORS


def is_collected(reference):
    gc.collect()
    return reference() is None


def test_errors_of_deleted_replies_keep_no_history(app, ada, bot, gate, conversation_id):
    bot.steps = [gate.wait, partial(raise_when_called, None)]
    with run_in_background(lambda: create_other_client(ada).send_message(conversation_id)) as [sending]:
        [reply] = wait_until(lambda: [weakref.ref(reply) for reply in app.extensions["replies"].replies.values()])
        gate.set()
        assert sending.result(TIMEOUT).status_code == 504
    wait_until(lambda: is_collected(reply))


def raise_when_called(history, **kwargs):
    raise BotTimeout("before there is an iterable")


def return_none(history, **kwargs):
    """Return nothing that can be iterated over."""


@pytest.mark.parametrize(("bot", "status"), [(raise_when_called, 504), (return_none, 500)])
def test_bot_that_returns_no_iterable_leaves_nothing(app, ada, conversation_id, bot, status):
    assert ada.send_message(conversation_id).status_code == status
    assert count_messages(app) == 0


@pytest.mark.parametrize("steps", [[ZeroDivisionError("a bug")], ["One ", ZeroDivisionError("a bug")]])
@waiting_or_streaming
def test_bug_of_bot_is_logged_once_with_traceback_and_request_id(ada, bot, conversation_id, caplog, headers, steps):
    bot.steps = steps
    response = ada.send_message(conversation_id, headers=headers)
    assert response.data
    [record] = [record for record in caplog.records if record.exc_info]
    assert record.exc_info[0] is ZeroDivisionError
    assert record.request_id == response.headers["X-Request-ID"]


def test_failure_of_bot_is_logged_without_traceback(ada, bot, conversation_id, caplog):
    bot.steps = [BotError("status 500")]
    response = ada.send_message(conversation_id)
    [record] = [record for record in caplog.records if record.levelname == "WARNING"]
    assert record.getMessage() == "The bot failed: BotError: status 500"
    assert record.request_id == response.headers["X-Request-ID"]
    assert not record.exc_info


class FaultySource:
    """A bot whose iterable raises an error when it is closed or cancelled."""

    def __init__(self, gate, error):
        self.gate, self.error = gate, error

    def __call__(self, history, **kwargs):
        return self

    def __iter__(self):
        yield "One "
        self.gate.wait()
        yield "two"

    def close(self):
        raise self.error

    def cancel(self):
        raise self.error


FAULTS = [ZeroDivisionError("a bug"), BotError("cut"), SystemExit(1)]


@pytest.mark.parametrize("error", FAULTS, ids=repr)
def test_bot_that_fails_when_closed_or_cancelled_ends_its_reply(make_app, gate, error):
    client = create_logged_in_client(make_app(FaultySource(gate, error)), "ada")
    gate.set()
    assert client.send_message(client.create_conversation()).json[1]["text"] == "One two"


@pytest.mark.parametrize("error", FAULTS, ids=repr)
def test_bot_that_fails_when_closed_or_cancelled_can_be_stopped(make_app, gate, error):
    client = create_logged_in_client(make_app(FaultySource(gate, error)), "ada")
    conversation_id = client.create_conversation()
    _, reply = start_reply(client, conversation_id)
    wait_for_text(client, conversation_id, reply["id"], "One ")
    stopped = client.stop_reply(conversation_id, reply["id"]).json
    assert stopped == {**reply, "text": "One ", "status": "stopped"}
    assert client.get_message(conversation_id, reply["id"]).json == stopped


INVALID_SENDS = {
    "no JSON": ({"data": "{", "content_type": "application/json"}, 400),
    "no object": ({"json": []}, 400),
    "no text": ({"json": {}}, 400),
    "no string": ({"json": {"text": 5}}, 400),
    "blank": ({"json": {"text": " \u200b"}}, 400),
    "too long": ({"json": {"text": "x" * 100_001}}, 400),
    "NUL": ({"json": {"text": "a\0"}}, 400),
    "another type": ({"data": "text=Hello", "content_type": "text/plain"}, 415),
}


@each_way
@on_sqlite
def test_send_of_invalid_body_returns_error_as_json(app, ada, bot, conversation_id, headers, success):
    for body, (request, status) in INVALID_SENDS.items():
        response = ada.post(f"/api/conversations/{conversation_id}/messages", headers=headers, **request)
        assert (response.status_code, list(response.json)) == (status, ["error"]), body
    assert (count_messages(app), bot.histories) == (0, [])


@each_way
def test_send_to_missing_or_foreign_conversation_returns_404(ada, bob, bot, conversation_id, headers, success):
    for response in (bob.send_message(conversation_id, headers=headers), ada.send_message(999, headers=headers)):
        assert (response.status_code, response.json) == (404, {"error": "Conversation not found"})
    assert bot.histories == []


CALLS_ON_MESSAGES = {
    "get": lambda client, *ids: client.get_message(*ids),
    "edit": lambda client, *ids: client.edit_message(*ids, "Edited"),
    "follow": lambda client, *ids: client.follow_reply(*ids),
    "stop": lambda client, *ids: client.stop_reply(*ids),
}


@pytest.mark.parametrize("call", CALLS_ON_MESSAGES.values(), ids=CALLS_ON_MESSAGES)
def test_call_on_missing_or_foreign_message_returns_404(ada, bob, client, bot, conversation_id, call):
    question, reply = ada.send_message(conversation_id).json
    foreign = bob.send_message(foreign_id := bob.create_conversation()).json[0]
    assert call(bob, conversation_id, question["id"]).json == {"error": "Conversation not found"}
    assert call(ada, foreign_id, foreign["id"]).json == {"error": "Conversation not found"}
    assert call(ada, conversation_id, foreign["id"]).json == {"error": "Message not found"}
    assert call(ada, ada.create_conversation(), question["id"]).json == {"error": "Message not found"}
    assert call(ada, conversation_id, 999).json == {"error": "Message not found"}
    assert call(ada, 999, question["id"]).json == {"error": "Conversation not found"}
    assert call(client, conversation_id, question["id"]).status_code == 401
    assert ada.list_messages(conversation_id) == [question, reply]
    assert len(bot.histories) == 2


def test_get_message_returns_message_as_listed(ada, conversation_id):
    for message in ada.send_message(conversation_id).json:
        assert ada.get_message(conversation_id, message["id"]).json == message


PATHS = {
    "list": "/api/conversations",
    "page": "/api/conversations?limit=10",
    "recent": "/api/conversations?limit=10&order=recent",
    "search": "/api/conversations?q=Conversation",
    "conversation": "/api/conversations/{0}",
    "messages": "/api/conversations/{0}/messages",
    "message": "/api/conversations/{0}/messages/{1}",
}


def has_changed(client, path, response):
    """Return whether a path has another ETag than at an earlier response."""
    return client.get(path, headers={"If-None-Match": response.headers["ETag"]}).status_code != 304


def test_etag_changes_whenever_reply_does(ada, bot, gate, conversation_id):
    first = Gate()
    bot.scripts = {"Hello": [first.wait, "One ", gate.wait]}
    question, reply = start_reply(ada, conversation_id)
    paths = [path.format(conversation_id, reply["id"]) for path in PATHS.values()]
    changes = [
        first.set,
        lambda: ada.stop_reply(conversation_id, reply["id"]),
        lambda: ada.edit_message(conversation_id, question["id"], "Edited"),
    ]
    for change in changes:
        responses = {path: ada.get(path) for path in paths}
        for path, response in responses.items():
            assert not has_changed(ada, path, response), path
        change()
        for path, response in responses.items():
            wait_until(partial(has_changed, ada, path, response))
            assert ada.get(path).data != response.data, path


def test_reply_goes_on_without_its_sender(app, ada, bot, gate, conversation_id):
    bot.steps = ["One ", gate.wait, "two"]
    with ada.send_message(conversation_id, headers=STREAM, buffered=False) as response:
        assert next(response.iter_encoded())
    gate.set()
    reply = ada.list_messages(conversation_id)[1]
    assert wait_for_end(ada, conversation_id, reply["id"])["text"] == "One two"


def log_out(client):
    assert client.logout().status_code == 200


def change_password(client):
    passwords = {"current_password": PASSWORD, "new_password": "battery staple"}
    assert client.put("/api/password", json=passwords).status_code == 200


@pytest.mark.parametrize("end_session", [log_out, change_password])
@waiting_or_streaming
def test_reply_goes_on_after_end_of_session(app, ada, bot, gate, conversation_id, headers, end_session):
    bot.steps = ["One ", gate.wait, "two"]
    with run_in_background(lambda: ada.send_message(conversation_id, headers=headers)) as [sending]:
        client = app.test_client()
        client.login("ada")
        wait_until(lambda: "One " in get_texts(client.list_messages(conversation_id)))
        end_session(client)
        gate.set()
    response = sending.result()
    assert response.status_code < 300
    pair = response.json if headers == {} else read_events(response)[-1][1]
    assert get_texts(pair) == ["Hello", "One two"]


def delete_conversation(client, conversation_id):
    assert client.delete(f"/api/conversations/{conversation_id}").status_code == 204


def delete_account(client, conversation_id):
    assert client.delete("/api/account", json={"password": PASSWORD}).status_code == 204


each_deletion = pytest.mark.parametrize("delete", [delete_conversation, delete_account])


@each_deletion
@pytest.mark.parametrize("text", ["One ", ""], ids=["after the first chunk", "before the first chunk"])
def test_deletion_ends_reply(app, ada, bot, conversation_id, delete, text):
    cancelled = Gate()
    bot.steps = [text, *[lambda: cancelled.wait(0.05), ""] * 1200]
    with run_in_background(lambda: create_other_client(ada).send_message(conversation_id)) as [sending]:
        wait_until(lambda: bot.histories)
        delete(ada, conversation_id)
        response = sending.result(TIMEOUT)
    assert (response.status_code, response.json) == (404, {"error": "Conversation not found"})
    wait_until(lambda: bot.closed)
    assert count_messages(app) == 0


@each_deletion
@waiting_or_streaming
def test_deletion_just_before_end_of_reply_leaves_nothing(app, ada, bot, conversation_id, delete, headers):
    client = create_other_client(ada)
    bot.steps = ["One ", lambda: delete(client, conversation_id)]
    response = ada.send_message(conversation_id, headers=headers)
    if headers == {}:
        assert (response.status_code, response.json) == (404, {"error": "Conversation not found"})
    else:
        assert read_events(response)[-1] == ("error", {"error": "Conversation not found"}, None)
    assert count_messages(app) == 0


def test_replies_leave_no_thread_behind(ada, bot, conversation_id):
    threads = set(threading.enumerate())
    bot.scripts = {"fail": [BotError("down")], "cut": ["One ", BotError("cut")], "bug": [ZeroDivisionError("a bug")]}
    for text in ("Hello", "fail", "cut", "bug"):
        ada.send_message(conversation_id, text)
        with ada.send_message(conversation_id, text, headers=STREAM, buffered=False):
            """Close the stream without reading it."""
        ada.send_message(conversation_id, text, headers=ASYNC)
    wait_until(lambda: set(threading.enumerate()) <= threads)


CALLS_THAT_WAIT = {
    "send": lambda client, *ids: client.send_message(ids[0]),
    "send as stream": lambda client, *ids: client.send_message(ids[0], headers=STREAM),
    "edit": lambda client, *ids: client.edit_message(*ids, "Edited"),
    "join": lambda client, *ids: client.edit_message(ids[0], ids[1] + 2, "Second"),
    "follow": lambda client, *ids: client.follow_reply(ids[0], ids[1] + 2),
}


@pytest.mark.parametrize("call", CALLS_THAT_WAIT.values(), ids=CALLS_THAT_WAIT)
@pytest.mark.parametrize("text", ["", "One "], ids=["before the first chunk", "after the first chunk"])
def test_call_holds_no_database_connection_while_bot_is_silent(
    app, ada, bot, gate, conversation_id, monkeypatch, call, text
):
    question, _ = ada.send_message(conversation_id, "First").json
    bot.steps = [text, gate.wait, "two"]
    start_reply(ada, conversation_id, "Second")
    with app.app_context():
        pool = db.engine.pool
    calling = threading.Event()
    monkeypatch.setitem(app.before_request_funcs, None, [*app.before_request_funcs[None], calling.set])
    with run_in_background(lambda: call(create_other_client(ada), conversation_id, question["id"])) as [waiting]:
        assert calling.wait(TIMEOUT)
        time.sleep(0.2)  # the call has read what it needs
        wait_until(lambda: pool.checkedout() == 0)  # the thread that stores replies uses one now and then
        assert not waiting.done()
        gate.set()
    assert waiting.result().status_code < 300


def test_stop_returns_reply_as_stored(ada, bot, gate, conversation_id):
    bot.steps = ["One ", gate.wait, "two"]
    question, reply = start_reply(ada, conversation_id)
    wait_for_text(ada, conversation_id, reply["id"], "One ")
    response = ada.stop_reply(conversation_id, reply["id"])
    assert (response.status_code, response.json) == (200, {**reply, "text": "One ", "status": "stopped"})
    assert ada.list_messages(conversation_id) == [question, response.json]
    gate.set()
    wait_until(lambda: bot.closed)
    assert ada.list_messages(conversation_id) == [question, response.json]


def test_stop_by_id_of_users_message_stops_its_reply(ada, bot, gate, conversation_id):
    bot.steps = ["One ", gate.wait, "two"]
    question, reply = start_reply(ada, conversation_id)
    response = ada.stop_reply(conversation_id, question["id"])
    assert (response.json["id"], response.json["status"]) == (reply["id"], "stopped")


def test_stop_before_first_chunk_leaves_empty_reply(ada, bot, gate, conversation_id):
    bot.steps = [gate.wait, "One"]
    question, reply = start_reply(ada, conversation_id)
    stopped = ada.stop_reply(conversation_id, reply["id"]).json
    assert stopped == {**reply, "status": "stopped"}
    gate.set()
    wait_until(lambda: bot.closed)
    assert ada.list_messages(conversation_id) == [question, stopped]


def test_stop_returns_pair_to_waiting_sender(ada, bot, gate, conversation_id):
    bot.steps = ["One ", gate.wait, "two"]
    with run_in_background(lambda: create_other_client(ada).send_message(conversation_id)) as [sending]:
        question, reply = wait_until(lambda: ada.list_messages(conversation_id))
        wait_for_text(ada, conversation_id, reply["id"], "One ")
        stopped = ada.stop_reply(conversation_id, reply["id"]).json
    assert (sending.result().status_code, sending.result().json) == (201, [question, stopped])


@pytest.mark.parametrize("steps", [["One"], ["One ", BotError("cut")], ["One ", BotTruncated("limit")]])
def test_stop_of_reply_that_is_over_returns_it_unchanged(ada, bot, conversation_id, steps):
    bot.steps = steps
    pair = ada.send_message(conversation_id).json
    for message in pair:
        response = ada.stop_reply(conversation_id, message["id"])
        assert (response.status_code, response.json) == (200, pair[1])
    assert ada.list_messages(conversation_id) == pair


def test_concurrent_stops_return_the_same(ada, bot, gate, conversation_id):
    bot.steps = ["One ", gate.wait, "two"]
    _, reply = start_reply(ada, conversation_id)
    clients = [create_other_client(ada) for _ in range(4)]
    responses = run_concurrently(4, lambda number: clients[number].stop_reply(conversation_id, reply["id"]))
    assert [response.json for response in responses] == [ada.get_message(conversation_id, reply["id"]).json] * 4
    assert responses[0].json["status"] == "stopped"


def test_send_after_stop_is_stored_after_stopped_reply(ada, bot, gate, conversation_id):
    bot.scripts = {"First": ["One ", gate.wait]}
    first = start_reply(ada, conversation_id, "First")
    stopped = ada.stop_reply(conversation_id, first[1]["id"]).json
    second = ada.send_message(conversation_id, "Second").json
    assert ada.list_messages(conversation_id) == [first[0], stopped, *second]


class CancellableSource:
    """A bot whose iterable blocks until another thread cancels it."""

    def __init__(self):
        self.cancelled, self.closed = Gate(), Gate()

    def __call__(self, history, **kwargs):
        return self

    def __iter__(self):
        yield "One "
        self.cancelled.wait()
        raise BotError("cancelled")

    def close(self):
        self.closed.set()

    def cancel(self):
        self.cancelled.set()


def test_stop_cancels_and_closes_what_bot_returned(make_app):
    source = CancellableSource()
    client = create_logged_in_client(make_app(source), "ada")
    conversation_id = client.create_conversation()
    _, reply = start_reply(client, conversation_id)
    wait_for_text(client, conversation_id, reply["id"], "One ")
    assert client.stop_reply(conversation_id, reply["id"]).json["status"] == "stopped"
    assert source.closed.wait()
    assert client.get_message(conversation_id, reply["id"]).json["status"] == "stopped"


def test_other_process_sees_reply_grow_and_end(ada, bot, gate, conversation_id, other_process):
    bot.steps = ["One ", gate.wait, "two"]
    question, reply = start_reply(ada, conversation_id)
    wait_for_text(other_process, conversation_id, reply["id"], "One ")
    assert other_process.list_messages(conversation_id) == [question, {**reply, "text": "One "}]
    gate.set()
    assert wait_for_end(other_process, conversation_id, reply["id"])["text"] == "One two"


def test_other_processes_see_a_reply_grow_and_stop_it_within_a_second():
    save_interval, poll_interval = REPLY_INTERVALS
    assert save_interval <= 1
    assert 2 * poll_interval <= 1  # to notice the request, and to read how the reply ended


@pytest.mark.parametrize("text", ["", "One "], ids=["before the first chunk", "after the first chunk"])
def test_stop_in_other_process_stops_reply(ada, bot, gate, conversation_id, other_process, text):
    bot.steps = [text, gate.wait, "two"]
    question, reply = start_reply(ada, conversation_id)
    response = other_process.stop_reply(conversation_id, reply["id"])
    assert response.status_code == 200
    assert response.json["status"] == "stopped"
    assert ada.list_messages(conversation_id) == [question, response.json]
    gate.set()
    wait_until(lambda: bot.closed)


def test_deletion_in_other_process_ends_reply(app, ada, bot, gate, conversation_id, other_process):
    bot.steps = ["One ", *[lambda: gate.wait(0.05), ""] * 1200]
    with run_in_background(lambda: create_other_client(ada).send_message(conversation_id)) as [sending]:
        wait_until(lambda: other_process.list_messages(conversation_id))
        delete_conversation(other_process, conversation_id)
    assert sending.result().status_code == 404
    wait_until(lambda: bot.closed)
    assert count_messages(app) == 0


@pytest.fixture
def killed_process(app, ada):
    """A function that sends a message whose reply is left in progress, as a process leaves it that is killed."""

    def add_exchange(conversation_id, text="One ", **values):
        values = {"conversation_id": conversation_id, "created_at": datetime.now(UTC), **values}
        old = datetime.now(UTC) - timedelta(seconds=31)
        with app.app_context():
            add = insert(Message).returning(Message.id)
            question_id = db.session.scalar(add.values(sender="user", text="Killed", **values))
            reply = {"sender": "bot", "text": text, "status": "in_progress", "heartbeat_at": old, **values}
            reply_id = db.session.scalar(add.values(**reply))
            db.session.commit()
        return question_id, reply_id

    return add_exchange


def find_statuses(response):
    """Return the statuses in a JSON response."""
    return re.findall(r'"status" ?: ?"(\w+)"', response.text)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_reply_of_killed_process_is_failed(ada, conversation_id, killed_process, other_process, path):
    _, reply_id = killed_process(conversation_id)
    path = path.format(conversation_id, reply_id)
    response = other_process.get(path)
    assert find_statuses(response) == ["failed"]
    assert "One " in response.text
    assert other_process.get(path, headers={"If-None-Match": response.headers["ETag"]}).status_code == 304


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_etag_changes_when_reply_of_killed_process_fails(app, ada, conversation_id, killed_process, make_app, path):
    _, reply_id = killed_process(conversation_id)
    age_heartbeats(app, -31)
    path = path.format(conversation_id, reply_id)
    response = ada.get(path)
    assert find_statuses(response) == ["in_progress"]
    age_heartbeats(app, 31)
    client = create_other_client(ada, make_app(**SHARED_SESSIONS))  # which looks for such replies at its first request
    response = client.get(path, headers={"If-None-Match": response.headers["ETag"]})
    assert response.status_code == 200
    assert find_statuses(response) == ["failed"]


def test_heartbeat_of_silent_reply_is_renewed(app, ada, bot, gate, conversation_id, monkeypatch):
    monkeypatch.setattr("app.replies.HEARTBEAT_INTERVAL", 0.1)
    bot.steps = [gate.wait, "Hello"]
    _, reply = start_reply(ada, conversation_id)
    started_at = load_heartbeat(app, reply["id"])
    age_heartbeats(app, 20)
    wait_until(lambda: load_heartbeat(app, reply["id"]) >= started_at)


def load_heartbeat(app, id):
    with app.app_context():
        return db.session.scalar(select(Message.heartbeat_at).filter_by(id=id))


def test_stop_of_reply_of_killed_process_returns_it_as_failed(conversation_id, killed_process, other_process):
    _, reply_id = killed_process(conversation_id)
    assert other_process.stop_reply(conversation_id, reply_id).json["status"] == "failed"


def test_send_after_reply_of_killed_process_works(conversation_id, killed_process, other_process, other_bot):
    killed_process(conversation_id)
    assert other_process.send_message(conversation_id, "Again").status_code == 201
    assert other_bot.histories == [[("user", "Killed"), ("bot", "One "), ("user", "Again")]]


def test_shutdown_stores_replies_in_progress_as_failed(app, ada, bot, gate, conversation_id):
    bot.scripts = {"silent": [gate.wait]}
    bot.steps = ["One ", gate.wait, "two"]
    _, silent = start_reply(ada, conversation_id, "silent")
    with run_in_background(lambda: create_other_client(ada).send_message(conversation_id, "growing")) as [sending]:
        wait_until(lambda: "One " in get_texts(ada.list_messages(conversation_id)))
        app.extensions["replies"].shutdown(timeout=0)
    response = sending.result()
    assert (response.status_code, response.json[1]["text"], response.json[1]["status"]) == (201, "One ", "failed")
    assert ada.get_message(conversation_id, silent["id"]).json == {**silent, "status": "failed"}
    assert ada.list_messages(conversation_id)[2:] == response.json


def test_shutdown_waits_for_replies_in_progress(app, ada, bot, gate, conversation_id):
    bot.steps = ["One ", gate.wait, "two"]
    _, reply = start_reply(ada, conversation_id)
    with run_in_background(lambda: app.extensions["replies"].shutdown(timeout=TIMEOUT)):
        wait_for_text(ada, conversation_id, reply["id"], "One ")
        response = ada.send_message(conversation_id)
        gate.set()
    assert wait_for_end(ada, conversation_id, reply["id"]) == {
        "id": reply["id"],
        "sender": "bot",
        "text": "One two",
        "created_at": reply["created_at"],
    }
    assert response.status_code == 503
    assert response.headers["Retry-After"]


def test_one_reply_more_than_max_concurrent_replies_returns_429(make_app, bot, gate):
    app = make_app(bot, MAX_CONCURRENT_REPLIES=2)
    ada, bob = create_logged_in_client(app, "ada"), create_logged_in_client(app, "bob")
    conversation_id = ada.create_conversation()
    question, reply = ada.send_message(conversation_id, "complete").json
    bot.scripts = {"slow": ["One ", gate.wait]}
    slow = [start_reply(ada, conversation_id, "slow") for _ in range(2)]
    for headers in ({}, STREAM, ASYNC):
        response = ada.send_message(conversation_id, headers=headers)
        assert (response.status_code, list(response.json)) == (429, ["error"])
        assert int(response.headers["Retry-After"]) > 0
    assert ada.edit_message(conversation_id, question["id"], "Edited").status_code == 429
    assert len(ada.list_messages(conversation_id)) == 6
    assert ada.list_messages(conversation_id)[:2] == [question, reply]
    assert bob.send_message(bob.create_conversation()).status_code == 201
    ada.stop_reply(conversation_id, slow[0][1]["id"])
    assert ada.send_message(conversation_id).status_code == 201


@pytest.mark.parametrize(
    "steps", [["One"], [BotError("down")], [ZeroDivisionError("a bug")], ["One ", BotError("cut")]]
)
def test_reply_that_is_over_does_not_count_for_max_concurrent_replies(make_app, bot, steps):
    client = create_logged_in_client(make_app(bot, MAX_CONCURRENT_REPLIES=1), "ada")
    conversation_id = client.create_conversation()
    bot.steps = steps
    for _ in range(3):
        assert client.send_message(conversation_id).status_code != 429


@pytest.mark.parametrize(("length", "status"), [(100_000, None), (100_001, "truncated")])
def test_reply_beyond_100000_characters_is_truncated(ada, bot, conversation_id, length, status):
    bot.steps = ["x" * 60_000, "y" * (length - 60_000)]
    _, reply = ada.send_message(conversation_id).json
    assert (len(reply["text"]), reply.get("status")) == (100_000, status)


def test_follower_beyond_max_followers_returns_429(app, ada, bot, gate, conversation_id, monkeypatch):
    monkeypatch.setattr("app.replies.MAX_FOLLOWERS", 2)
    bot.steps = ["One ", gate.wait]
    _, reply = start_reply(ada, conversation_id)
    followers = [partial(create_other_client(ada).follow_reply, conversation_id, reply["id"]) for _ in range(2)]
    with run_in_background(*followers) as followings:
        wait_until(lambda: app.extensions["replies"].followers[ada.user_id] == 2)
        refused = ada.follow_reply(conversation_id, reply["id"])
        assert refused.json == {"error": "Too many requests follow replies, try again later"}
        assert int(refused.headers["Retry-After"]) > 0
        gate.set()
        assert [following.result(TIMEOUT).status_code for following in followings] == [200, 200]
    assert ada.follow_reply(conversation_id, reply["id"]).status_code == 200


@waiting_or_streaming
def test_send_and_stop_are_not_refused_for_too_many_followers(ada, bot, conversation_id, monkeypatch, headers):
    monkeypatch.setattr("app.replies.MAX_FOLLOWERS", 0)
    assert ada.send_message(conversation_id, headers=headers).status_code < 300
    _, reply = ada.list_messages(conversation_id)
    assert ada.stop_reply(conversation_id, reply["id"]).status_code == 200


def test_repeats_beyond_max_followers_return_429(ada, bot, gate, conversation_id, monkeypatch):
    monkeypatch.setattr("app.replies.MAX_FOLLOWERS", 0)
    bot.steps = [gate.wait, "One"]
    headers = {"Idempotency-Key": "key"}
    ada.send_message(conversation_id, headers={**headers, **ASYNC})
    assert ada.send_message(conversation_id, headers=headers).status_code == 429
    assert ada.send_message(conversation_id, headers={**headers, **ASYNC}).status_code == 202
    gate.set()
    wait_until(lambda: ada.list_messages(conversation_id)[1]["text"] == "One")
    wait_until(lambda: "status" not in ada.list_messages(conversation_id)[1])
    assert ada.send_message(conversation_id, headers=headers).status_code == 201


def test_reply_ends_as_truncated_after_bot_max_seconds(make_app, bot, gate):
    client = create_logged_in_client(make_app(bot, BOT_MAX_SECONDS=1), "ada")
    bot.steps = ["One ", *[lambda: gate.wait(0.05), "more "] * 1200]
    response = client.send_message(client.create_conversation())
    assert response.status_code == 201
    assert response.json[1]["status"] == "truncated"
    assert response.json[1]["text"].startswith("One more ")
    wait_until(lambda: bot.closed)


def test_reply_without_chunk_returns_504_after_bot_max_seconds(make_app, bot, gate):
    app = make_app(bot, BOT_MAX_SECONDS=1)
    client = create_logged_in_client(app, "ada")
    bot.steps = [gate.wait, "One"]
    response = client.send_message(client.create_conversation())
    assert (response.status_code, response.json) == (504, {"error": "The bot took too long to answer"})
    assert count_messages(app) == 0


@contextmanager
def database_unavailable(url):
    """Refuse all connections to a database, or all transactions of SQLite, while the block is executed."""
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield
        return
    name = make_url(url).database
    with psycopg.connect(SERVER_URL.replace("postgres://", "postgresql://"), autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        try:
            connection.execute(
                """SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity
                   WHERE datname = %s AND usename = current_user""",
                [name],
            )
            yield
        finally:
            connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")


@on_postgresql
def test_sends_that_wait_for_one_conversation_leave_connections_for_others(ada, conversation_id, database):
    sends = [partial(create_other_client(ada).send_message, conversation_id, headers=ASYNC) for _ in range(20)]
    with psycopg.connect(database.replace("postgres://", "postgresql://")) as connection:
        connection.execute("SELECT 1 FROM conversation WHERE id = %s FOR UPDATE", [conversation_id])
        with run_in_background(*sends) as sendings:
            wait_until(lambda: is_waiting_for_lock(connection))
            for _ in range(20):
                assert ada.get("/api/current_user").status_code == 200
                time.sleep(0.05)
            connection.rollback()
            statuses = [sending.result(TIMEOUT).status_code for sending in sendings]
    assert statuses == [202] * 20


def is_waiting_for_lock(connection):
    query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    return connection.execute(query).fetchone() > (0,)


@waiting_or_streaming
def test_reply_that_ends_while_database_is_unavailable_is_stored_afterwards(
    ada, bot, gate, conversation_id, database, headers, caplog
):
    bot.steps = ["One ", gate.wait, "two"]
    client = create_other_client(ada)
    with run_in_background(lambda: client.send_message(conversation_id, headers=headers)) as [sending]:
        wait_until(lambda: "One " in get_texts(ada.list_messages(conversation_id)))
        with database_unavailable(database):
            gate.set()
            time.sleep(1)
            assert not sending.done()
    response = sending.result()
    pair = response.json if headers == {} else read_events(response)[-1][1]
    assert get_texts(pair) == ["Hello", "One two"]
    assert ada.list_messages(conversation_id) == pair
    assert "Traceback" not in caplog.text


@waiting_or_streaming
def test_follower_is_told_when_end_of_reply_cannot_be_stored(
    ada, bot, gate, conversation_id, database, headers, monkeypatch
):
    monkeypatch.setattr("app.replies.STORE_TIMEOUT", 0.5)
    bot.steps = ["One ", gate.wait, "two"]
    client = create_other_client(ada)
    with run_in_background(lambda: client.send_message(conversation_id, headers=headers)) as [sending]:
        wait_until(lambda: "One " in get_texts(ada.list_messages(conversation_id)))
        with database_unavailable(database):
            gate.set()
            response = sending.result(TIMEOUT)
    unavailable = {"error": "The database is unavailable, try again later"}
    if headers == {}:
        assert (response.status_code, response.json) == (503, unavailable)
        assert int(response.headers["Retry-After"]) > 0
    else:
        assert read_events(response)[-1] == ("error", unavailable, None)
    wait_until(lambda: get_texts(ada.list_messages(conversation_id)) == ["Hello", "One two"])
    assert "status" not in ada.list_messages(conversation_id)[1]


NOW = datetime(2026, 1, 1, tzinfo=UTC)
INVALID_ROWS = {
    "unknown sender": {"sender": "tool"},
    "unknown status": {"sender": "bot", "status": "unknown"},
    "user's message in progress": {"sender": "user", "status": "in_progress", "heartbeat_at": NOW},
    "user's message that failed": {"sender": "user", "status": "failed"},
    "in progress without heartbeat": {"sender": "bot", "status": "in_progress"},
    "complete with heartbeat": {"sender": "bot", "status": "complete", "heartbeat_at": NOW},
    "stopped with heartbeat": {"sender": "bot", "status": "stopped", "heartbeat_at": NOW},
    "failed with heartbeat": {"sender": "bot", "status": "failed", "heartbeat_at": NOW},
    "truncated with heartbeat": {"sender": "bot", "status": "truncated", "heartbeat_at": NOW},
    "no status": {"sender": "bot", "status": None},
    "no conversation": {"sender": "bot", "conversation_id": 999},
}


def is_refused(app, values):
    """Return whether the database refuses a message of these values."""
    try:
        with app.app_context(), db.engine.begin() as connection:
            connection.execute(insert(Message.__table__).values(**values))
    except IntegrityError:
        return True
    return False


def test_database_refuses_invalid_messages(app, ada, conversation_id):
    valid = {"conversation_id": conversation_id, "text": "", "created_at": NOW}
    valid |= {"stop_requested": False, "status": "complete"}
    assert [row for row, values in INVALID_ROWS.items() if not is_refused(app, {**valid, **values})] == []
    assert not is_refused(app, {**valid, "sender": "user"})


def test_database_accepts_reply_of_each_status(app, ada, conversation_id):
    with app.app_context():
        for status in ("in_progress", "complete", "stopped", "failed", "truncated"):
            heartbeat_at = NOW if status == "in_progress" else None
            values = {"conversation_id": conversation_id, "text": "", "heartbeat_at": heartbeat_at}
            db.session.execute(insert(Message).values(sender="bot", status=status, **values))
        db.session.commit()
    assert count_messages(app) == 5


@on_postgresql
def test_send_to_a_busy_conversation_of_another_user_returns_404_at_once(app, ada, bob, conversation_id):
    with app.app_context(), db.engine.begin() as connection:
        connection.exec_driver_sql("SELECT id FROM conversation FOR UPDATE")
        with run_in_background(lambda: ada.send_message(conversation_id)) as [sending]:
            wait_until(lambda: app.extensions["replies"].conversation_locks)
            assert bob.send_message(conversation_id).status_code == 404
            assert not sending.done()
            connection.rollback()
    assert sending.result().status_code == 201
