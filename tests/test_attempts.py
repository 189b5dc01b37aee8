"""Attempts at a reply: retries, regenerated replies, and processes that were taken for dead while they were not."""

import sqlite3
import threading
from contextlib import closing, contextmanager
from functools import partial

import pytest
from flask import abort
from sqlalchemy import event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError
from werkzeug.exceptions import NotFound

from app import db
from app.bot import BotError
from tests.conftest import SHARED_SESSIONS, create_other_client, on_sqlite
from tests.helpers.bots import ASYNC, STREAM, Gate, join_deltas, read_events, start_reply
from tests.helpers.data import age_heartbeats, count_messages, get_answer, get_texts
from tests.helpers.server import TIMEOUT, run_in_background, wait_until

SECRET = "what the bot looked for"
KEY = {"Idempotency-Key": "key"}


@pytest.fixture
def app(make_app, bot):
    return make_app(bot, **SHARED_SESSIONS)


@pytest.fixture
def late_process(make_app, other_bot, ada):
    """A function that returns a client like other_process, which looks for abandoned replies at its first request."""
    return lambda: create_other_client(ada, make_app(other_bot, **SHARED_SESSIONS))


class Pause:
    """Keeps an application from storing replies from now on, as if it had lost the database, until it is released."""

    def __init__(self, app, monkeypatch):
        self.released = Gate()
        self.waiting = threading.Event()
        self.store = app.extensions["replies"].store
        monkeypatch.setattr(app.extensions["replies"], "store", self.wait_and_store)

    def wait_and_store(self):
        self.waiting.set()
        self.released.wait()
        self.store()


@pytest.fixture
def pause_storing(app, monkeypatch):
    """A function that returns a Pause that begins now."""
    pauses = []

    def start():
        pauses.append(Pause(app, monkeypatch))
        return pauses[-1]

    yield start
    for pause in pauses:
        pause.released.set()


def take_for_dead(app, pause, late_process):
    """Let the paused application look as if it had been killed; return a client of the process that looks."""
    wait_until(pause.waiting.is_set)
    age_heartbeats(app, 31)
    return late_process()


def start_growing_reply(client, conversation_id):
    """Send a message; return the reply as soon as its first words are stored."""
    _, reply = start_reply(client, conversation_id)
    return wait_until(lambda: (stored := client.get_message(conversation_id, reply["id"]).json)["text"] and stored)


def get_status(client, conversation_id, message_id):
    return client.get_message(conversation_id, message_id).json.get("status", "complete")


def fail_reply(client, bot, conversation_id, *steps):
    """Send a message with an Idempotency-Key whose reply fails after some steps; return the two messages."""
    bot.steps = [*steps, BotError("cut")]
    return client.send_message(conversation_id, headers=KEY).json


# A process that was taken for dead


def test_reply_that_was_taken_for_abandoned_is_complete_in_the_end(
    app, ada, bot, gate, conversation_id, pause_storing, late_process
):
    pause = pause_storing()
    bot.steps = ["One ", gate.wait, "two"]
    with run_in_background(lambda: create_other_client(ada).send_message(conversation_id)) as [sending]:
        assert take_for_dead(app, pause, late_process).list_messages(conversation_id)[1]["status"] == "failed"
        gate.set()
        pause.released.set()
        response = sending.result(TIMEOUT)
    assert (response.status_code, get_texts(response.json)) == (201, ["Hello", "One two"])
    assert ada.list_messages(conversation_id) == response.json


def test_reply_that_was_taken_for_abandoned_is_in_progress_again(
    app, ada, bot, gate, conversation_id, pause_storing, late_process
):
    pause = pause_storing()
    bot.steps = ["One ", gate.wait, "two"]
    _, reply = start_reply(ada, conversation_id)
    client = take_for_dead(app, pause, late_process)
    assert get_status(client, conversation_id, reply["id"]) == "failed"
    etag = client.get_message(conversation_id, reply["id"]).headers["ETag"]
    pause.released.set()
    wait_until(lambda: get_status(client, conversation_id, reply["id"]) == "in_progress")
    response = client.get_message(conversation_id, reply["id"], headers={"If-None-Match": etag})
    assert (response.status_code, response.json["text"]) == (200, "One ")


def test_silent_reply_that_was_taken_for_abandoned_is_in_progress_again(
    app, ada, bot, gate, conversation_id, pause_storing, late_process
):
    bot.steps = ["One ", gate.wait]
    reply = start_growing_reply(ada, conversation_id)
    pause = pause_storing()
    client = take_for_dead(app, pause, late_process)
    assert get_status(client, conversation_id, reply["id"]) == "failed"
    pause.released.set()
    wait_until(lambda: get_status(client, conversation_id, reply["id"]) == "in_progress")


def test_stop_of_a_reply_that_was_taken_for_abandoned_stops_it(
    app, ada, bot, gate, conversation_id, pause_storing, late_process
):
    bot.steps = ["One ", *[lambda: gate.wait(0.05), ""] * 1200]
    pause = pause_storing()
    _, reply = start_reply(ada, conversation_id)
    client = take_for_dead(app, pause, late_process)
    assert client.stop_reply(conversation_id, reply["id"]).json["status"] == "failed"
    pause.released.set()
    wait_until(lambda: get_status(client, conversation_id, reply["id"]) == "stopped")
    wait_until(lambda: bot.closed)


def test_follower_of_a_reply_that_was_taken_for_abandoned_gets_the_rest(
    app, ada, bot, gate, conversation_id, pause_storing, late_process
):
    bot.steps = ["One ", gate.wait, "two"]
    reply = start_growing_reply(ada, conversation_id)
    pause = pause_storing()
    client = take_for_dead(app, pause, late_process)
    events = read_events(client.follow_reply(conversation_id, reply["id"]))
    assert events[-1][0] == "error"
    gate.set()
    pause.released.set()
    wait_until(lambda: get_status(client, conversation_id, reply["id"]) == "complete")
    headers = {"Last-Event-ID": events[-1][2]}
    rest = read_events(client.follow_reply(conversation_id, reply["id"], headers=headers))
    assert join_deltas([*events, *rest]) == "One two"
    assert rest[-1][0] == "done"


def test_retry_in_the_same_process_ends_the_attempt_that_was_taken_for_dead(
    app, ada, bot, conversation_id, pause_storing, late_process
):
    gates = [Gate(), Gate()]
    bot.steps = ["Old ", gates[0].wait, "end"]
    pause = pause_storing()
    sender = create_other_client(ada)
    with run_in_background(lambda: sender.send_message(conversation_id, headers=KEY)) as [sending]:
        take_for_dead(app, pause, late_process).list_messages(conversation_id)
        bot.steps = ["New ", gates[1].wait, "end"]
        ada.send_message(conversation_id, headers={**KEY, **ASYNC})
        gates[0].set()
        wait_until(lambda: bot.closed)  # before anything could be stored
        pause.released.set()
        assert sending.result(TIMEOUT).status_code == 503
    gates[1].set()
    wait_until(lambda: get_texts(ada.list_messages(conversation_id)) == ["Hello", "New end"])


def test_sender_of_an_edit_that_was_taken_for_abandoned_gets_503(
    app, ada, bot, gate, conversation_id, pause_storing, late_process
):
    question, reply = ada.send_message(conversation_id).json
    bot.steps = [gate.wait, "New"]
    pause = pause_storing()
    editor = create_other_client(ada)
    with run_in_background(lambda: editor.edit_message(conversation_id, question["id"], "Edited")) as [editing]:
        assert take_for_dead(app, pause, late_process).list_messages(conversation_id) == [question, reply]
        gate.set()
        wait_until(lambda: app.extensions["replies"].ended)
        pause.released.set()
        assert editing.result(TIMEOUT).status_code == 503
    assert ada.list_messages(conversation_id) == [question, reply]


def test_own_reply_is_not_taken_for_abandoned(app, ada, bot, gate, conversation_id, pause_storing):
    pause_storing()
    bot.steps = [gate.wait, "One"]
    _, reply = start_reply(ada, conversation_id)
    age_heartbeats(app, 31)
    app.extensions["replies"].checked_at = 0
    assert get_status(ada, conversation_id, reply["id"]) == "in_progress"


def test_retry_takes_over_a_reply_whose_process_was_taken_for_dead(
    app, ada, bot, conversation_id, pause_storing, late_process, other_bot
):
    pause = pause_storing()
    gates = [Gate(), Gate()]
    bot.steps = ["Old ", gates[0].wait, "end"]
    other_bot.steps = ["New ", gates[1].wait, "end"]
    sender = create_other_client(ada)
    with run_in_background(lambda: sender.send_message(conversation_id, headers=KEY)) as [sending]:
        client = take_for_dead(app, pause, late_process)
        _, reply = client.send_message(conversation_id, headers={**KEY, **ASYNC}).json
        wait_until(lambda: client.get_message(conversation_id, reply["id"]).json["text"] == "New ")
        pause.released.set()
        assert sending.result(TIMEOUT).status_code == 503
        gates[0].set()
    wait_until(lambda: bot.closed)
    gates[1].set()
    wait_until(lambda: get_status(client, conversation_id, reply["id"]) == "complete")
    assert get_texts(client.list_messages(conversation_id)) == ["Hello", "New end"]


@pytest.mark.parametrize("steps", [[], ["Old"]], ids=["failed", "complete"])
def test_end_of_a_reply_that_was_taken_over_changes_nothing(
    app, ada, bot, conversation_id, pause_storing, late_process, other_bot, gate, steps
):
    pause = pause_storing()
    bot.steps = [gate.wait, *(steps or [BotError("down")])]
    sender = create_other_client(ada)
    with run_in_background(lambda: sender.send_message(conversation_id, headers=KEY)) as [sending]:
        wait_until(pause.waiting.is_set)
        gate.set()
        wait_until(lambda: app.extensions["replies"].ended)
        age_heartbeats(app, 31)
        stored = late_process().send_message(conversation_id, headers=KEY).json
        pause.released.set()
        assert sending.result(TIMEOUT).status_code == (503 if steps else 502)
    assert ada.list_messages(conversation_id) == stored
    assert stored[1]["text"] == "Hello from the other process."


def test_discarded_edit_leaves_a_later_one_alone(
    app, ada, bot, conversation_id, pause_storing, late_process, other_bot, gate
):
    question, _ = ada.send_message(conversation_id).json
    pause = pause_storing()
    bot.steps, other_bot.steps = [gate.wait, BotError("down")], [gate.wait, "New"]
    ada.edit_message(conversation_id, question["id"], "First", headers=ASYNC)
    age_heartbeats(app, 31)
    client = late_process()
    assert client.edit_message(conversation_id, question["id"], "Second", headers=ASYNC).status_code == 202
    pause.released.set()
    wait_until(lambda: not app.extensions["replies"].replies)
    gate.set()
    wait_until(lambda: get_texts(ada.list_messages(conversation_id)) == ["Second", "New"])
    assert count_messages(app) == 2


@on_sqlite
def test_read_succeeds_if_abandoned_replies_cannot_be_ended_now(
    app, ada, bot, gate, conversation_id, database, late_process, monkeypatch, caplog
):
    monkeypatch.setattr("app.models.exchange.SWEEP_LOCK_TIMEOUT", 0)
    bot.steps = ["One ", gate.wait]
    reply = start_growing_reply(ada, conversation_id)
    path = make_url(database).database
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as connection:
        age_heartbeats(app, 31)
        connection.execute("BEGIN IMMEDIATE")
        assert late_process().get_message(conversation_id, reply["id"]).json["text"] == "One "
    assert "Abandoned replies cannot be ended now" in caplog.text


@contextmanager
def pause_commits_of_replies():
    """Let threads that generate replies wait after a commit; yield an event that is set then, and one to set."""
    waiting, released = threading.Event(), Gate()

    def wait(session):
        if threading.current_thread().name.startswith("reply-"):
            waiting.set()
            released.wait()

    event.listen(db.session, "after_commit", wait)
    try:
        yield waiting, released
    finally:
        event.remove(db.session, "after_commit", wait)


def test_edit_that_ends_while_it_is_applied_loses_no_message(app, ada, bot, conversation_id):
    question, _ = ada.send_message(conversation_id).json
    editor = create_other_client(ada)
    edit = partial(editor.edit_message, conversation_id, question["id"], "Edited")
    with pause_commits_of_replies() as (waiting, released), run_in_background(edit) as [editing]:
        wait_until(waiting.is_set)
        with run_in_background(lambda: app.extensions["replies"].shutdown(timeout=0)):
            wait_until(lambda: not app.extensions["replies"].replies)
            released.set()
        editing.result(TIMEOUT)
    edited, reply = ada.list_messages(conversation_id)
    assert (edited["text"], reply["text"], reply["status"]) == ("Edited", "", "failed")


@contextmanager
def failing_commits_of_replies(name):
    """Let the commits of threads that generate replies fail, before or after they are done."""

    def fail(session):
        if threading.current_thread().name.startswith("reply-"):
            raise OperationalError("COMMIT", {}, Exception("the connection is lost"))

    event.listen(db.session, name, fail)
    try:
        yield
    finally:
        event.remove(db.session, name, fail)


def test_edit_whose_commit_was_done_and_failed_loses_no_message(app, ada, bot, conversation_id):
    question, _ = ada.send_message(conversation_id, headers=KEY).json
    with failing_commits_of_replies("after_commit"):
        edited = ada.edit_message(conversation_id, question["id"], "Edited")
    assert (edited.status_code, edited.json[1]["status"]) == (200, "failed")
    assert ada.list_messages(conversation_id) == edited.json
    assert ada.send_message(conversation_id, headers=KEY).status_code == 201


def test_edit_whose_commit_failed_changes_nothing_and_allows_another(app, ada, bot, conversation_id):
    question, reply = ada.send_message(conversation_id).json
    with failing_commits_of_replies("before_commit"):
        assert ada.edit_message(conversation_id, question["id"], "Edited").status_code == 503
    assert ada.list_messages(conversation_id) == [question, reply]
    assert ada.edit_message(conversation_id, question["id"], "Again").status_code == 200


# Following a reply of which there are several attempts


@pytest.mark.parametrize("last_id", ["4", "4 end"])
def test_last_event_id_of_a_failed_attempt_gets_the_whole_retry(ada, bot, conversation_id, last_id):
    _, reply = fail_reply(ada, bot, conversation_id, "Old ")
    bot.steps = ["New ", "reply"]
    ada.send_message(conversation_id, headers=KEY)
    response = ada.follow_reply(conversation_id, reply["id"], headers={"Last-Event-ID": last_id})
    events = read_events(response)
    assert [name for name, _, _ in events] == ["start", "delta", "done"]
    assert join_deltas(events) == "New reply"


def test_last_event_id_of_a_replaced_reply_gets_the_whole_new_one(ada, bot, conversation_id):
    question, _ = ada.send_message(conversation_id).json
    for last_id in ("6", "12 end"):
        bot.steps = ["A new one"]
        ada.edit_message(conversation_id, question["id"], "Hello")
        response = ada.follow_reply(conversation_id, question["id"], headers={"Last-Event-ID": last_id})
        events = read_events(response)
        assert (events[0][0], join_deltas(events), events[-1][0]) == ("start", "A new one", "done")


def test_retry_is_resumed_after_each_event(ada, bot, conversation_id):
    _, reply = fail_reply(ada, bot, conversation_id, "Old ")
    bot.steps = ["New ", "reply"]
    events = read_events(ada.send_message(conversation_id, headers={**KEY, **STREAM}))
    ids = [id for name, _, id in events if name == "delta"]
    for id in ids:
        response = ada.follow_reply(conversation_id, reply["id"], headers={"Last-Event-ID": id})
        assert join_deltas(read_events(response)) == "New reply"[int(id.split()[0]) :]
    response = ada.follow_reply(conversation_id, reply["id"], headers={"Last-Event-ID": events[-1][2]})
    assert response.status_code == 204


def test_follower_in_other_process_gets_an_error_when_a_retry_begins(
    ada, bot, gate, conversation_id, other_process, monkeypatch
):
    monkeypatch.setattr("app.replies.POLL_INTERVAL", 0.5)
    bot.steps = ["Old ", gate.wait, BotError("cut")]
    _, reply = ada.send_message(conversation_id, headers={**KEY, **ASYNC}).json
    wait_until(lambda: ada.get_message(conversation_id, reply["id"]).json["text"])
    response = other_process.follow_reply(conversation_id, reply["id"], buffered=False)
    blocks = response.iter_encoded()
    assert b'"Old "' in next(blocks) + next(blocks)
    gate.set()
    wait_until(lambda: get_status(ada, conversation_id, reply["id"]) == "failed")
    bot.steps = ["New reply"]
    ada.send_message(conversation_id, headers=KEY)
    rest = b"".join(blocks)
    response.close()
    assert b"event: error" in rest
    assert b"reply" not in rest


# A retry that ends before its first chunk


def test_stop_of_a_retry_before_its_first_chunk_keeps_the_text(ada, bot, gate, conversation_id):
    _, reply = fail_reply(ada, bot, conversation_id, "Old ")
    bot.steps = [gate.wait]
    ada.send_message(conversation_id, headers={**KEY, **ASYNC})
    stopped = ada.stop_reply(conversation_id, reply["id"]).json
    assert stopped == {**reply, "text": "Old ", "status": "stopped"}
    assert ada.get_message(conversation_id, reply["id"]).json == stopped


def test_stream_of_a_retry_that_is_stopped_before_its_first_chunk_has_the_text(app, ada, bot, gate, conversation_id):
    _, reply = fail_reply(ada, bot, conversation_id, "Old ")
    bot.steps = [gate.wait]
    sender = create_other_client(ada)
    with run_in_background(lambda: sender.send_message(conversation_id, headers={**KEY, **STREAM})) as [sending]:
        wait_until(lambda: app.extensions["replies"].replies)
        ada.stop_reply(conversation_id, reply["id"])
        events = read_events(sending.result(TIMEOUT))
    assert events[1:] == read_events(ada.follow_reply(conversation_id, reply["id"]))[1:]
    assert join_deltas(events) == "Old "


def test_shutdown_during_a_retry_before_its_first_chunk_keeps_the_text(app, ada, bot, gate, conversation_id):
    messages = fail_reply(ada, bot, conversation_id, "Old ")
    bot.steps = [gate.wait]
    ada.send_message(conversation_id, headers={**KEY, **ASYNC})
    app.extensions["replies"].shutdown(timeout=0)
    assert ada.list_messages(conversation_id) == messages


def test_edit_of_a_dropped_message_returns_message_not_found(ada, bot, gate, conversation_id, other_process):
    first = ada.send_message(conversation_id).json[0]
    bot.scripts = {"Slow": ["Slow ", *[lambda: gate.wait(0.05), ""] * 1200]}
    _, slow = start_reply(ada, conversation_id, "Slow")
    wait_until(lambda: ada.get_message(conversation_id, slow["id"]).json["text"])
    ada.edit_message(conversation_id, first["id"], "Edited")
    response = other_process.follow_reply(conversation_id, slow["id"])
    assert get_answer(response) == (404, {"error": "Message not found"})


def count_bot_failures(caplog):
    return sum("The reply failed" in record.getMessage() for record in caplog.records)


def test_database_error_of_a_bot_is_logged_without_its_text(app, ada, bot, conversation_id, caplog):
    def query():
        with app.app_context():
            db.session.execute(db.select(db.literal(SECRET)).select_from(db.text("missing")))

    bot.steps = [query]
    start_reply(ada, conversation_id)
    wait_until(lambda: count_bot_failures(caplog) == 1)
    assert SECRET not in caplog.text


def test_bot_that_aborts_leaves_nothing(app, ada, bot, conversation_id):
    bot.steps = [partial(abort, 404, "No such document")]
    assert get_answer(ada.send_message(conversation_id)) == (404, {"error": "No such document"})
    assert count_messages(app) == 0


class NeedsArguments(NotFound):
    """An HTTPException that cannot be copied."""

    def __init__(self, page):
        super().__init__(f"No page {page}")
        self.args = ()


def test_bot_that_raises_an_exception_that_cannot_be_copied_leaves_nothing(app, ada, bot, conversation_id):
    bot.steps = [NeedsArguments(1)]
    assert ada.send_message(conversation_id).status_code == 500
    assert count_messages(app) == 0
    assert not app.extensions["replies"].replies
