"""Replies: generated in the background, stored however they end, stopped, and told of by any process."""

import sqlite3
import threading
import time
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from functools import partial

import psycopg
import pytest
from flask import abort
from sqlalchemy import insert
from sqlalchemy.engine import make_url
from sqlalchemy.exc import IntegrityError

from app import db
from app.bot import BotBusy, BotError, BotMessageTooLong, BotTimeout, BotTruncated
from app.models import Message
from tests.conftest import (
    PASSWORD,
    SERVER_URL,
    SHARED_SESSIONS,
    create_logged_in_client,
    create_other_client,
    on_postgresql,
    on_sqlite,
)
from tests.helpers.bots import (
    ASYNC,
    STREAM,
    WAYS,
    Gate,
    each_way,
    join_deltas,
    read_events,
    start_reply,
    wait_for_end,
    wait_for_text,
    waiting_or_streaming,
)
from tests.helpers.data import (
    add_abandoned_exchange,
    add_conversations,
    age_heartbeats,
    count_messages,
    execute,
    get_answer,
    get_texts,
)
from tests.helpers.queries import record_queries
from tests.helpers.server import TIMEOUT, run_concurrently, run_in_background, wait_until

STOPPED = "The server was stopped"
SECRET = "what the bot looked for"
SILENT = [lambda: time.sleep(0.05), ""] * 1200  # steps of a bot that says nothing for long, and can be stopped


@pytest.fixture
def app(make_app, bot):
    return make_app(bot, **SHARED_SESSIONS)


@contextmanager
def sending(client, conversation_id, text, headers=None):
    """Send a message in the background and wait until its reply has a text; yield the future of the response."""
    sender = create_other_client(client)
    with run_in_background(lambda: sender.send_message(conversation_id, headers=headers)) as [response]:
        wait_until(lambda: text in get_texts(client.list_messages(conversation_id)))
        yield response


# Sending


@pytest.mark.parametrize("preference", ["respond-async", "Respond-Async, wait=10", "wait=10,respond-async; x"])
def test_send_with_respond_async_returns_202_and_reply_in_progress(ada, bot, gate, conversation_id, preference):
    bot.steps = [gate.wait, "Hello"]
    response = ada.send_message(conversation_id, headers={"Prefer": preference})
    assert (response.status_code, response.headers["Preference-Applied"]) == (202, "respond-async")
    question, reply = response.json
    assert (reply["sender"], reply["text"], reply["status"]) == ("bot", "", "in_progress")
    assert ada.list_messages(conversation_id) == [question, reply]
    gate.set()
    complete = {"id": reply["id"], "sender": "bot", "text": "Hello", "created_at": reply["created_at"]}
    assert wait_for_end(ada, conversation_id) == [question, complete]


@on_sqlite
@pytest.mark.parametrize("preference", ["", "respond-asynchronously", "wait=10", "return=minimal", "x=respond-async"])
def test_send_with_other_preference_waits(ada, conversation_id, preference):
    response = ada.send_message(conversation_id, headers={"Prefer": preference})
    assert (response.status_code, "Preference-Applied" in response.headers) == (201, False)


def test_concurrent_sends_are_stored_as_exchanges_in_turn(ada, bot, conversation_id):
    clients = [create_other_client(ada) for _ in range(8)]
    all_called = threading.Barrier(8)
    bot.steps = [lambda: all_called.wait(TIMEOUT), "Reply"]
    responses = run_concurrently(8, lambda number: clients[number].send_message(conversation_id, f"Text {number}"))
    assert {response.status_code for response in responses} == {201}
    exchanges = sorted((response.json for response in responses), key=lambda exchange: exchange[0]["id"])
    assert ada.list_messages(conversation_id) == [message for exchange in exchanges for message in exchange]


CALLS_ON_MESSAGES = {
    "get": lambda client, *ids: client.get_message(*ids),
    "versions": lambda client, *ids: client.list_versions(*ids),
    "current": lambda client, *ids: client.show_branch(*ids),
    "edit": lambda client, *ids: client.edit_message(*ids, "Edited"),
    "follow": lambda client, *ids: client.follow_reply(*ids),
    "stop": lambda client, *ids: client.stop_reply(*ids),
}


@pytest.mark.parametrize("call", CALLS_ON_MESSAGES.values(), ids=CALLS_ON_MESSAGES)
def test_call_on_message_that_is_not_in_the_conversation_returns_404(ada, bob, bot, conversation_id, call):
    exchange = ada.send_message(conversation_id).json
    foreign = bob.send_message(bob.create_conversation()).json[0]
    others_id = ada.create_conversation()
    for ids in ((conversation_id, foreign["id"]), (others_id, exchange[0]["id"]), (conversation_id, 999)):
        assert get_answer(call(ada, *ids)) == (404, {"error": "Message not found"})
    assert (ada.list_messages(conversation_id), len(bot.histories)) == (exchange, 2)


# The bot


@pytest.mark.parametrize("to_iterable", [list, iter, "".join])
@on_sqlite
def test_bot_may_return_any_iterable(make_app, to_iterable):
    client = create_logged_in_client(make_app(lambda history, **kwargs: to_iterable(["One ", "two"])), "ada")
    assert client.send_message(client.create_conversation()).json[1]["text"] == "One two"


def test_bot_is_called_with_user_and_conversation(make_app):
    client = create_logged_in_client(make_app(lambda history, **kwargs: [repr(kwargs)]), "ada")
    _, conversation_id = client.create_conversation(), client.create_conversation()
    _, reply = client.send_message(conversation_id).json
    assert reply["text"] == repr({"user_id": client.user_id, "conversation_id": conversation_id})


def test_history_has_messages_with_text_and_no_question_of_a_failed_reply_without(ada, bot, gate, conversation_id):
    bot.scripts = {
        "failed early": [BotError("down")],
        "blank": [" \u200b"],
        "failed late": ["Cut ", BotError("cut")],
        "stopped": SILENT,
        "in progress": ["Growing ", gate.wait],
    }
    for text in ("complete", "failed early", "failed late", "blank"):
        ada.send_message(conversation_id, text)
    _, stopped = start_reply(ada, conversation_id, "stopped")
    ada.stop_reply(conversation_id, stopped["id"])
    _, growing = start_reply(ada, conversation_id, "in progress")
    wait_for_text(ada, conversation_id, growing["id"], "Growing ")
    ada.send_message(ada.create_conversation(), "another conversation")
    ada.send_message(conversation_id, "new")
    assert bot.histories[-1] == [
        ("user", "complete"),
        ("bot", "Hello there."),
        ("user", "failed late"),
        ("bot", "Cut "),
        ("user", "stopped"),
        ("user", "in progress"),
        ("bot", "Growing "),
        ("user", "new"),
    ]


def test_history_has_at_most_bot_history_chars(make_app, bot):
    client = create_logged_in_client(make_app(bot, BOT_HISTORY_CHARS=1000), "ada")
    conversation_id = client.create_conversation()
    bot.steps = ["x" * 100]
    for number in range(5):
        client.send_message(conversation_id, f"{number}" * 300)
    exchange = [("user", "3" * 300), ("bot", "x" * 100)]
    assert bot.histories[-1] == [("bot", "x" * 100), *exchange, ("user", "4" * 300)]


def test_history_leaves_out_a_blank_reply_of_an_earlier_version_of_the_program(app, ada, bot, conversation_id):
    _, reply = ada.send_message(conversation_id, "First").json
    execute(app, "UPDATE message SET text = :text WHERE id = :id", text="\u200b", id=reply["id"])
    ada.send_message(conversation_id, "Second")
    assert bot.histories[-1] == [("user", "First"), ("user", "Second")]


def test_history_has_at_most_200_messages_before_the_new_one(app, ada, bot):
    [conversation_id] = add_conversations(app, ada, 1, messages=250)
    ada.send_message(conversation_id, "new")
    texts = get_texts(ada.list_messages(conversation_id))
    assert [text for _, text in bot.histories[0]] == texts[50:251]


# How replies end

ENDS = {
    "complete": (["One ", "two"], None, "One two"),
    "cut at the model's limit": (["One ", BotTruncated("limit")], "truncated", "One "),
    "100,000 characters": (["x" * 60_000, "y" * 40_000], None, "x" * 60_000 + "y" * 40_000),
    "longer than 100,000 characters": (["é" * 60_000] * 2, "truncated", "é" * 100_000),
    "endless": (["x" * 1000] * 1000, "truncated", "x" * 100_000),
    "blank chunks around the text": (["", "\u200b\n", "One ", "", " ", "two\n"], None, "One  two\n"),
    "blank lines before an indented line": (["\n \n", "  ", "  code\n", "  more"], None, "    code\n  more"),
    "NUL and lone surrogates": (["\0", "One\0 ", "\ud800", "two\udfff"], None, "One two"),
    "surrogate pairs over two chunks": (["\ud83d", "\ude42 One \ud83d", "\ude42"], None, "🙂 One 🙂"),
    "half a surrogate pair at the end": (["One", "\ud83d"], None, "One"),
}


@pytest.mark.parametrize(("steps", "status", "text"), ENDS.values(), ids=ENDS)
@waiting_or_streaming
def test_reply_is_stored_with_text_and_status(ada, bot, conversation_id, headers, steps, status, text):
    bot.steps = steps
    response = ada.send_message(conversation_id, headers=headers)
    _, reply = exchange = ada.list_messages(conversation_id)
    complete = {"id": reply["id"], "sender": "bot", "text": text, "created_at": reply["created_at"]}
    assert reply == complete | ({"status": status} if status else {})
    if headers == {}:
        assert get_answer(response) == (201, exchange)
    else:
        events = read_events(response)
        assert (join_deltas(events), events[-1][:2]) == (text, ("done", exchange))


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (BotError("secret"), "The bot failed to answer"),
        (BotTimeout("secret"), "The bot took too long to answer"),
        (ZeroDivisionError("secret"), "Internal server error"),
    ],
)
@each_way
def test_failure_after_first_chunk_keeps_text_and_reason(ada, bot, conversation_id, headers, error, sentence):
    bot.steps = ["One ", "two", error]
    response = ada.send_message(conversation_id, headers=headers)
    _, reply = messages = wait_for_end(ada, conversation_id)
    assert (reply["text"], reply["status"], reply["error"]) == ("One two", "failed", sentence)
    if headers == {}:
        assert get_answer(response) == (201, messages)
    elif headers == STREAM:
        assert read_events(response)[-1][:2] == ("error", {"error": sentence})


EARLY_FAILURES = {
    "error": ([BotError("secret")], 502, "The bot failed to answer"),
    "time-out": ([BotTimeout("secret")], 504, "The bot took too long to answer"),
    "busy": ([BotBusy("secret", 7)], 503, "The bot is busy, try again later"),
    "too long a message": ([BotMessageTooLong("secret")], 413, "The message is too long for the bot"),
    "bug": ([ZeroDivisionError("secret")], 500, "Internal server error"),
    "exit": ([SystemExit("secret")], 500, "Internal server error"),
    "error of its own": ([partial(abort, 404, "No such document")], 404, "No such document"),
    "chunk that is no string": ([b"secret"], 500, "Internal server error"),
    "no chunk": ([], 502, "The bot failed to answer"),
    "cut before the first chunk": ([BotTruncated("secret")], 502, "The bot failed to answer"),
    "blank chunks": ([" ", "\n", "\0", "\ud800", "\u200b", ""], 502, "The bot failed to answer"),
    "endless blank chunks": ([" " * 100] * 2000, 502, "The bot failed to answer"),
}


@pytest.mark.parametrize(("steps", "status", "sentence"), EARLY_FAILURES.values(), ids=EARLY_FAILURES)
@each_way
def test_failure_before_first_chunk_keeps_question_and_reason(
    ada, bot, conversation_id, other_process, headers, steps, status, sentence
):
    bot.steps = steps
    response = ada.send_message(conversation_id, "Kept", headers=headers)
    if headers == ASYNC:
        assert response.status_code == 202
    else:
        assert get_answer(response) == (status, {"error": sentence})
        assert response.headers.get("Retry-After") == ("7" if status == 503 else None)
    question, reply = wait_for_end(other_process, conversation_id)
    assert (question["text"], "status" in question) == ("Kept", False)
    assert (reply["text"], reply["status"], reply["error"]) == ("", "failed", sentence)
    bot.steps = ["Hello"]
    assert ada.send_message(conversation_id).json == ada.list_messages(conversation_id)[2:]


def test_long_reason_with_nul_is_stored_as_far_as_it_fits(ada, bot, conversation_id):
    bot.steps = [partial(abort, 409, "\0" + "x" * 300)]
    ada.send_message(conversation_id)
    assert wait_for_end(ada, conversation_id)[1]["error"] == "x" * 255


@pytest.mark.parametrize("bot", [lambda history, **kwargs: None, lambda history, **kwargs: 1 / 0])
@on_sqlite
def test_bot_that_returns_no_iterable_fails(ada, conversation_id, bot):
    assert get_answer(ada.send_message(conversation_id)) == (500, {"error": "Internal server error"})
    assert ada.list_messages(conversation_id)[1]["status"] == "failed"


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), BotError("status 500")], ids=repr)
@pytest.mark.parametrize("text", ["One ", ""], ids=["after the first chunk", "before the first chunk"])
@waiting_or_streaming
def test_failure_is_logged_once_with_request_id_and_a_traceback_if_it_is_a_bug(
    ada, bot, conversation_id, caplog, headers, text, error
):
    bot.steps = [text, error]
    response = ada.send_message(conversation_id, headers=headers)
    [record] = [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert record.request_id == response.headers["X-Request-ID"]
    assert str(error) in caplog.text
    assert ("Traceback" in caplog.text) == isinstance(error, ZeroDivisionError)


def test_database_error_of_a_bot_is_logged_without_its_text(app, ada, bot, conversation_id, caplog):
    def query():
        with app.app_context():
            db.session.execute(db.select(db.literal(SECRET)).select_from(db.text("missing")))

    bot.steps = [query]
    assert ada.send_message(conversation_id).status_code == 503
    wait_until(lambda: "The reply failed" in caplog.text)
    assert SECRET not in caplog.text


@pytest.mark.parametrize(("text", "status"), [("One ", 201), ("", 504)])
def test_reply_ends_after_bot_max_seconds(make_app, bot, text, status):
    client = create_logged_in_client(make_app(bot, BOT_MAX_SECONDS=1), "ada")
    bot.steps = [text, *SILENT]
    conversation_id = client.create_conversation()
    assert client.send_message(conversation_id).status_code == status
    _, reply = client.list_messages(conversation_id)
    assert (reply["text"], reply["status"]) == (text, "truncated" if text else "failed")
    wait_until(lambda: bot.closed)


# A reply does not belong to the request that asked for it


def test_reply_goes_on_without_its_sender(ada, bot, gate, conversation_id):
    bot.steps = ["One ", gate.wait, "two"]
    with ada.send_message(conversation_id, headers=STREAM, buffered=False) as response:
        assert next(response.iter_encoded())
    gate.set()
    assert get_texts(wait_for_end(ada, conversation_id)) == ["Hello", "One two"]


@waiting_or_streaming
def test_reply_goes_on_after_end_of_session(ada, bot, gate, conversation_id, headers):
    bot.steps = ["One ", gate.wait, "two"]
    with sending(ada, conversation_id, "One ", headers) as response:
        ada.logout()
        gate.set()
    messages = response.result().json if headers == {} else read_events(response.result())[-1][1]
    assert get_texts(messages) == ["Hello", "One two"]


each_deletion = pytest.mark.parametrize("path", ["/api/conversations/1", "/api/account"])


@each_deletion
@pytest.mark.parametrize("text", ["One ", ""], ids=["after the first chunk", "before the first chunk"])
def test_deletion_ends_reply(app, ada, bot, conversation_id, second_client, path, text):
    bot.steps = [text, *SILENT]
    with sending(ada, conversation_id, text) as response:
        assert second_client.delete(path, json={"password": PASSWORD}).status_code == 204
        assert get_answer(response.result(TIMEOUT)) == (404, {"error": "Conversation not found"})
    wait_until(lambda: bot.closed)
    assert count_messages(app) == 0


@each_deletion
@waiting_or_streaming
def test_deletion_just_before_end_of_reply_leaves_nothing(app, ada, bot, conversation_id, path, headers):
    client = create_other_client(ada)
    bot.steps = ["One ", lambda: client.delete(path, json={"password": PASSWORD})]
    response = ada.send_message(conversation_id, headers=headers)
    if headers == {}:
        assert get_answer(response) == (404, {"error": "Conversation not found"})
    else:
        assert read_events(response)[-1] == ("error", {"error": "Conversation not found"}, None)
    assert count_messages(app) == 0


CALLS_THAT_WAIT = {
    "send": lambda client, *ids: client.send_message(ids[0]),
    "send as stream": lambda client, *ids: client.send_message(ids[0], headers=STREAM),
    "edit": lambda client, *ids: client.edit_message(*ids, "Edited"),
    "join": lambda client, *ids: client.edit_message(ids[0], ids[1] + 2, "Second"),
    "follow": lambda client, *ids: client.follow_reply(ids[0], ids[1] + 2),
}


@pytest.mark.parametrize("call", CALLS_THAT_WAIT.values(), ids=CALLS_THAT_WAIT)
def test_call_holds_no_database_connection_while_bot_is_silent(app, ada, bot, gate, conversation_id, call):
    question, _ = ada.send_message(conversation_id, "First").json
    bot.steps = [gate.wait, "two"]
    start_reply(ada, conversation_id, "Second")
    with app.app_context():
        pool = db.engine.pool
    with run_in_background(lambda: call(create_other_client(ada), conversation_id, question["id"])) as [waiting]:
        time.sleep(0.3)  # the call has read what it needs
        wait_until(lambda: pool.checkedout() == 0)  # the thread that stores replies uses one now and then
        assert not waiting.done()
        gate.set()
    assert waiting.result().status_code < 300


# Stop


@pytest.mark.parametrize("text", ["One ", ""], ids=["after the first chunk", "before the first chunk"])
@waiting_or_streaming
def test_stop_returns_reply_as_stored_and_the_exchange_to_its_sender(
    ada, bot, conversation_id, second_client, headers, text
):
    bot.steps = [text, *SILENT]
    with sending(ada, conversation_id, text, headers) as response:
        question, reply = ada.list_messages(conversation_id)
        stopped = {**reply, "text": text, "status": "stopped"}
        assert get_answer(second_client.stop_reply(conversation_id, reply["id"])) == (200, stopped)
    if headers == {}:
        assert get_answer(response.result()) == (201, [question, stopped])
    else:
        assert read_events(response.result())[-1][:2] == ("done", [question, stopped])
    wait_until(lambda: bot.closed)
    assert ada.list_messages(conversation_id) == [question, stopped]


@pytest.mark.parametrize("steps", [["One"], ["One ", BotError("cut")], [BotError("down")]])
def test_stop_of_reply_that_is_over_returns_it_unchanged(ada, bot, conversation_id, second_client, steps):
    bot.steps = steps
    ada.send_message(conversation_id)
    exchange = ada.list_messages(conversation_id)
    for message in exchange:
        assert get_answer(second_client.stop_reply(conversation_id, message["id"])) == (200, exchange[1])
    assert ada.list_messages(conversation_id) == exchange


class BlockingSource:
    """What a bot returns: it blocks until it is cancelled, and its close() and cancel() raise an error."""

    def __init__(self, error):
        self.cancelled, self.closed, self.error = Gate(), Gate(), error

    def __iter__(self):
        yield "One "
        self.cancelled.wait()
        yield "two"

    def close(self):
        self.closed.set()
        raise self.error

    def cancel(self):
        self.cancelled.set()
        raise self.error


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), BotError("cut"), SystemExit(1)], ids=repr)
@pytest.mark.parametrize("is_stopped", [True, False], ids=["stopped", "complete"])
def test_end_of_reply_cancels_and_closes_what_bot_returned(make_app, error, is_stopped):
    source = BlockingSource(error)
    client = create_logged_in_client(make_app(lambda history, **kwargs: source), "ada")
    conversation_id = client.create_conversation()
    _, reply = start_reply(client, conversation_id)
    wait_for_text(client, conversation_id, reply["id"], "One ")
    client.stop_reply(conversation_id, reply["id"]) if is_stopped else source.cancelled.set()
    assert source.closed.wait()
    _, reply = wait_for_end(client, conversation_id)
    assert (reply["text"], reply.get("status")) == (("One ", "stopped") if is_stopped else ("One two", None))


# Several processes


PATHS = ["", "?limit=10", "?q=Conversation", "/1", "/1/messages", "/1/messages/2", "/1/messages/2/versions"]


@pytest.mark.parametrize("path", PATHS)
def test_reply_of_killed_process_is_failed(app, ada, conversation_id, other_process, path):
    add_abandoned_exchange(app, conversation_id, seconds=0)
    first = ada.get(f"/api/conversations{path}")
    assert '"status":"in_progress"' in first.text.replace(" ", "")
    age_heartbeats(app, 31)
    etag = first.headers.get("ETag", "")
    response = other_process.get(f"/api/conversations{path}", headers={"If-None-Match": etag})
    assert response.status_code == 200
    assert f'"status":"failed","error":"{STOPPED}"' in response.text.replace(": ", ":").replace(", ", ",")
    assert '"One "' in response.text


def test_twenty_followers_at_another_process_need_no_more_queries_than_one(app, ada, bot, gate, other_process):
    bot.steps = ["One ", gate.wait]
    exchanges = [(id, start_reply(ada, id)[1]["id"]) for id in (ada.create_conversation() for _ in range(20))]
    counts = []
    for followed in (exchanges[:1], exchanges):
        for exchange in followed:
            create_other_client(other_process).follow_reply(*exchange, buffered=False)
        with record_queries(other_process.application) as queries:
            time.sleep(1)
        counts.append(len(queries))
    assert 0 < counts[1] <= counts[0] + 5


@pytest.mark.parametrize("text", ["One ", ""])
def test_calls_on_reply_of_killed_process(app, ada, conversation_id, other_process, other_bot, text):
    question_id, reply_id = add_abandoned_exchange(app, conversation_id, text)
    failed = other_process.stop_reply(conversation_id, reply_id).json
    assert (failed["text"], failed["status"], failed["error"]) == (text, "failed", STOPPED)
    events = read_events(other_process.follow_reply(conversation_id, reply_id))
    assert events[-1] == ("error", {"error": STOPPED}, f"{reply_id} {len(text)} end")
    other_process.send_message(conversation_id, "Again")
    other_process.edit_message(conversation_id, question_id, "Killed")
    before = [("user", "Killed"), ("bot", text)] if text else []
    assert other_bot.histories == [[*before, ("user", "Again")], [("user", "Killed")]]


@pytest.mark.parametrize("text", ["One ", ""], ids=["after the first chunk", "before the first chunk"])
@waiting_or_streaming
def test_process_that_was_taken_for_dead_loses_its_reply(app, ada, bot, conversation_id, other_process, headers, text):
    bot.steps = [text, *SILENT]
    with sending(ada, conversation_id, text, headers) as response:
        age_heartbeats(app, 31)
        messages = other_process.list_messages(conversation_id)
    assert (messages[1]["text"], messages[1]["status"], messages[1]["error"]) == (text, "failed", STOPPED)
    if headers == STREAM and text:
        assert read_events(response.result())[-1][:2] == ("error", {"error": STOPPED})
    else:
        assert get_answer(response.result()) == ((201, messages) if text else (503, {"error": STOPPED}))
    wait_until(lambda: bot.closed)
    assert ada.list_messages(conversation_id) == messages


@on_sqlite
def test_read_succeeds_if_abandoned_replies_cannot_be_ended_now(
    app, ada, conversation_id, database, other_process, monkeypatch
):
    monkeypatch.setattr("app.database.SQLITE_LOCK_TIMEOUT", 0)
    _, reply_id = add_abandoned_exchange(app, conversation_id)
    with database_unavailable(database):
        assert other_process.get_message(conversation_id, reply_id).json["text"] == "One "


def test_shutdown_stores_replies_in_progress_as_failed(app, ada, bot, gate, conversation_id):
    bot.scripts = {"silent": [gate.wait]}
    bot.steps = ["One ", gate.wait, "two"]
    silent = start_reply(ada, conversation_id, "silent")
    with sending(ada, conversation_id, "One ") as response:
        app.extensions["replies"].shutdown(timeout=0)
    messages = ada.list_messages(conversation_id)
    assert messages[:2] == [silent[0], {**silent[1], "status": "failed", "error": STOPPED}]
    assert get_answer(response.result()) == (201, messages[2:])
    assert (messages[3]["text"], messages[3]["status"], messages[3]["error"]) == ("One ", "failed", STOPPED)


def test_shutdown_waits_for_replies_in_progress(app, ada, bot, gate, conversation_id):
    bot.steps = ["One ", gate.wait, "two"]
    _, reply = start_reply(ada, conversation_id)
    with run_in_background(lambda: app.extensions["replies"].shutdown(timeout=TIMEOUT)):
        wait_for_text(ada, conversation_id, reply["id"], "One ")
        response = ada.send_message(conversation_id)
        gate.set()
    assert get_texts(wait_for_end(ada, conversation_id)) == ["Hello", "One two"]
    assert (response.status_code, response.headers["Retry-After"]) == (503, "2")


# Limits


def test_one_reply_more_than_max_concurrent_replies_returns_429(make_app, bot):
    app = make_app(bot, MAX_CONCURRENT_REPLIES=2)
    ada, bob = create_logged_in_client(app, "ada"), create_logged_in_client(app, "bob")
    conversation_id = ada.create_conversation()
    question, _ = ada.send_message(conversation_id, "complete").json
    bot.scripts = {"slow": ["One ", *SILENT]}
    slow = [start_reply(ada, conversation_id, "slow") for _ in range(2)]
    responses = [ada.send_message(conversation_id, headers=headers) for headers in WAYS.values()]
    for response in (*responses, ada.edit_message(conversation_id, question["id"], "Edited")):
        assert (response.status_code, list(response.json)) == (429, ["error"])
        assert int(response.headers["Retry-After"]) > 0
    assert get_texts(ada.list_messages(conversation_id))[::2] == ["complete", "slow", "slow"]
    assert bob.send_message(bob.create_conversation()).status_code == 201
    ada.stop_reply(conversation_id, slow[0][1]["id"])
    assert ada.send_message(conversation_id).status_code == 201


@pytest.mark.parametrize("steps", [["One"], [BotError("down")], ["One ", ZeroDivisionError("a bug")]])
def test_reply_that_is_over_does_not_count_for_max_concurrent_replies(make_app, bot, steps):
    client = create_logged_in_client(make_app(bot, MAX_CONCURRENT_REPLIES=1), "ada")
    conversation_id = client.create_conversation()
    bot.steps = steps
    assert 429 not in {client.send_message(conversation_id).status_code for _ in range(3)}


# The database


@contextmanager
def database_unavailable(url):
    """Refuse all connections to a database, or all transactions of SQLite, while the block is executed."""
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield
        return
    name, connections = make_url(url).database, "FROM pg_stat_activity WHERE datname = %s AND usename = user"
    with psycopg.connect(SERVER_URL.replace("postgres://", "postgresql://"), autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        try:
            connection.execute(f"SELECT pg_terminate_backend(pid, 60000) {connections}", [name])
            yield
        finally:
            connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")


@contextmanager
def ending_without_database(bot, gate, client, conversation_id, database, headers):
    """Make the database unavailable during a reply and let that end; yield the future of the sender's response."""
    bot.steps = ["One ", gate.wait, "two"]
    with sending(client, conversation_id, "One ", headers) as response, database_unavailable(database):
        gate.set()
        yield response


@waiting_or_streaming
def test_reply_that_ends_while_database_is_unavailable_is_stored_afterwards(
    ada, bot, gate, conversation_id, database, headers, caplog
):
    with ending_without_database(bot, gate, ada, conversation_id, database, headers) as response:
        time.sleep(1)
        assert not response.done()  # nothing is told before it is stored
    messages = response.result().json if headers == {} else read_events(response.result())[-1][1]
    assert get_texts(messages) == ["Hello", "One two"]
    assert ada.list_messages(conversation_id) == messages
    assert "Traceback" not in caplog.text


@waiting_or_streaming
def test_follower_is_told_when_end_of_reply_cannot_be_stored(
    ada, bot, gate, conversation_id, database, headers, monkeypatch
):
    monkeypatch.setattr("app.replies.STORE_TIMEOUT", 0.5)
    with ending_without_database(bot, gate, ada, conversation_id, database, headers) as sent:
        response = sent.result(TIMEOUT)
    unavailable = {"error": "The database is unavailable, try again later"}
    if headers == {}:
        assert get_answer(response) == (503, unavailable)
        assert int(response.headers["Retry-After"]) > 0
    else:
        assert read_events(response)[-1] == ("error", unavailable, None)
    assert get_texts(wait_for_end(ada, conversation_id)) == ["Hello", "One two"]


@on_postgresql
def test_follower_at_another_process_is_told_when_the_reply_cannot_be_read(
    ada, bot, gate, conversation_id, database, other_process, monkeypatch
):
    monkeypatch.setattr("app.replies.STORE_TIMEOUT", 0.5)
    bot.steps = ["One ", gate.wait, "two"]
    _, reply = start_reply(ada, conversation_id)
    response = other_process.follow_reply(conversation_id, reply["id"], buffered=False)
    with database_unavailable(database):
        assert read_events(response)[-1] == ("error", {"error": "The database is unavailable, try again later"}, None)
    gate.set()
    assert get_texts(wait_for_end(ada, conversation_id)) == ["Hello", "One two"]
    assert join_deltas(read_events(other_process.follow_reply(conversation_id, reply["id"]))) == "One two"


NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    "values",
    [
        {"sender": "tool"},
        {"sender": "bot", "status": "unknown"},
        {"sender": "bot", "status": None},
        {"sender": "bot", "status": "in_progress"},
        {"sender": "bot", "heartbeat_at": NOW},
        {"status": "in_progress", "heartbeat_at": NOW},
        {"conversation_id": 999},
        {"parent_id": 999},
    ],
)
def test_database_refuses_invalid_message(app, conversation_id, values):
    row = {"conversation_id": conversation_id, "sender": "user", "text": "", "created_at": NOW, **values}
    with app.app_context(), db.engine.begin() as connection, pytest.raises(IntegrityError):
        connection.execute(insert(Message.__table__).values(row))
