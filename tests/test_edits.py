"""Editing a user's message and regenerating its reply: nothing changes until the new reply begins."""

import threading

import pytest
from sqlalchemy import event

from app import db
from app.bot import BotBusy, BotError, BotTimeout
from app.models import Message
from app.models.exchange import Exchange
from tests.conftest import SHARED_SESSIONS, create_logged_in_client, create_other_client
from tests.helpers.bots import ASYNC, STREAM, Gate, join_deltas, read_events
from tests.helpers.data import get_answer, get_texts
from tests.helpers.server import run_all, run_concurrently, run_in_background, wait_until


@pytest.fixture
def app(make_app, bot):
    return make_app(bot, **SHARED_SESSIONS)


@pytest.fixture
def messages(ada, bot, conversation_id):
    """The messages of a conversation with three exchanges."""
    for text in ("First", "Second", "Third"):
        ada.send_message(conversation_id, text)
    return ada.list_messages(conversation_id)


def start_edit(client, conversation_id, message_id, text):
    """Edit a message without waiting for the reply; return the pair."""
    response = client.edit_message(conversation_id, message_id, text, headers=ASYNC)
    assert response.status_code == 202
    assert response.headers["Preference-Applied"] == "respond-async"
    return response.json


def test_edit_returns_200_and_replaces_text_and_what_follows(ada, bot, conversation_id, messages):
    bot.steps = ["New reply"]
    response = ada.edit_message(conversation_id, messages[2]["id"], "Edited")
    assert response.status_code == 200
    question, reply = response.json
    assert question == {**messages[2], "text": "Edited"}
    assert list(reply) == ["id", "sender", "text", "created_at"]
    assert (reply["sender"], reply["text"]) == ("bot", "New reply")
    assert reply["id"] > messages[5]["id"]
    assert ada.list_messages(conversation_id) == [*messages[:2], question, reply]
    assert ada.get_message(conversation_id, messages[3]["id"]).status_code == 404


def test_edit_with_same_text_regenerates_reply(ada, bot, conversation_id, messages):
    bot.steps = ["New reply"]
    question, reply = ada.edit_message(conversation_id, messages[4]["id"], "Third").json
    assert question == messages[4]
    assert reply["text"] == "New reply"
    assert ada.list_messages(conversation_id) == [*messages[:5], reply]


def test_edit_gives_bot_history_before_edited_message(ada, bot, conversation_id, messages):
    ada.edit_message(conversation_id, messages[2]["id"], "Edited")
    assert bot.histories[-1] == [("user", "First"), ("bot", "Hello there."), ("user", "Edited")]


def test_edit_as_stream_sends_exchange_and_text(ada, bot, conversation_id, messages):
    bot.steps = ["New ", "reply"]
    response = ada.edit_message(conversation_id, messages[2]["id"], "Edited", headers=STREAM)
    assert response.status_code == 200
    events = read_events(response)
    name, [question, reply], _ = events[0]
    assert name == "start"
    assert question == {**messages[2], "text": "Edited"}
    assert (reply["text"], reply["status"]) == ("", "in_progress")
    assert join_deltas(events) == "New reply"
    assert events[-1][:2] == ("done", ada.list_messages(conversation_id)[2:])


@pytest.mark.parametrize("headers", [{}, STREAM, ASYNC], ids=["waiting", "stream", "async"])
def test_edit_changes_nothing_until_first_chunk(ada, bot, gate, conversation_id, messages, headers):
    bot.scripts = {"Edited": ["", gate.wait, "New "]}
    version = ada.get("/api/conversations").headers["ETag"]
    editor = create_other_client(ada)
    with run_in_background(
        lambda: editor.edit_message(conversation_id, messages[2]["id"], "Edited", headers=headers)
    ) as [editing]:
        wait_until(lambda: "Edited" in bot.texts)
        assert ada.list_messages(conversation_id) == messages
        assert ada.get(f"/api/conversations/{conversation_id}/messages").json == messages
        assert ada.get_message(conversation_id, messages[2]["id"]).json == messages[2]
        assert ada.get("/api/conversations?q=Edited").json == []
        assert ada.get("/api/messages?q=Edited").json == []
        gate.set()
    assert editing.result().status_code < 300
    wait_until(lambda: get_texts(ada.list_messages(conversation_id)[2:]) == ["Edited", "New "])
    assert ada.get("/api/conversations").headers["ETag"] != version


def test_edit_is_shown_from_first_chunk_on(ada, bot, gate, conversation_id, messages):
    bot.scripts = {"Edited": ["New ", gate.wait, "reply"]}
    question, reply = start_edit(ada, conversation_id, messages[2]["id"], "Edited")
    wait_until(lambda: ada.get_message(conversation_id, reply["id"]).json["text"] == "New ")
    assert ada.list_messages(conversation_id) == [*messages[:2], question, {**reply, "text": "New "}]


@pytest.mark.parametrize("index", [0, 1], ids=["question", "reply"])
def test_reply_of_pending_edit_can_be_read_and_followed(ada, bot, gate, conversation_id, messages, monkeypatch, index):
    monkeypatch.setattr("app.replies.SILENCE_INTERVAL", 0.1)  # the head comes before the first chunk
    bot.scripts = {"Edited": [gate.wait, "New ", "reply"]}
    exchange = start_edit(ada, conversation_id, messages[2]["id"], "Edited")
    assert ada.get_message(conversation_id, exchange[1]["id"]).json == exchange[1]
    response = ada.follow_reply(conversation_id, exchange[index]["id"], buffered=False)
    gate.set()
    events = read_events(response)
    assert events[0][:2] == ("start", exchange)
    assert events[-1][:2] == ("done", ada.list_messages(conversation_id)[2:])


FAILURES = {
    "error": ([BotError("down")], 502),
    "time-out": ([BotTimeout("stalled")], 504),
    "busy": ([BotBusy("busy", 7)], 503),
    "bug": ([ZeroDivisionError("a bug")], 500),
    "no chunk": ([], 502),
    "blank chunks": ([" ", "\n"], 502),
}


@pytest.mark.parametrize(("steps", "status"), FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("headers", [{}, STREAM], ids=["waiting", "stream"])
def test_edit_whose_bot_fails_before_first_chunk_changes_nothing(
    ada, bot, conversation_id, messages, headers, steps, status
):
    bot.scripts = {"Edited": steps}
    response = ada.edit_message(conversation_id, messages[2]["id"], "Edited", headers=headers)
    assert (response.status_code, list(response.json)) == (status, ["error"])
    assert ada.list_messages(conversation_id) == messages
    assert ada.edit_message(conversation_id, messages[2]["id"], "Edited again").status_code == 200


@pytest.mark.parametrize("headers", [{}, STREAM], ids=["waiting", "stream"])
def test_edit_whose_bot_fails_after_first_chunk_stores_failed_reply(ada, bot, conversation_id, messages, headers):
    bot.scripts = {"Edited": ["New ", BotError("cut")]}
    response = ada.edit_message(conversation_id, messages[2]["id"], "Edited", headers=headers)
    question, reply = ada.list_messages(conversation_id)[2:]
    assert (question["text"], reply["text"], reply["status"]) == ("Edited", "New ", "failed")
    if headers == STREAM:
        assert read_events(response)[-1][:2] == ("error", {"error": "The bot failed to answer"})
    else:
        assert (response.status_code, response.json) == (200, [question, reply])


def test_edit_of_message_of_bot_returns_409(ada, bot, conversation_id, messages):
    version = ada.get("/api/conversations").headers["ETag"]
    response = ada.edit_message(conversation_id, messages[3]["id"], "Edited")
    assert (response.status_code, response.json) == (
        409,
        {"error": "Only a message of the user can be edited: edit the one that this message replies to"},
    )
    assert ada.list_messages(conversation_id) == messages
    assert ada.get("/api/conversations").headers["ETag"] == version
    assert len(bot.histories) == 3


@pytest.fixture(params=[False, True], ids=["sent", "edited"])
def slow_exchange(request, ada, bot, gate, conversation_id, messages):
    """The messages of an exchange in progress, whose reply waits for the gate, sent or edited."""
    bot.scripts = {"Slow": ["Slow ", gate.wait, "reply"]}
    if request.param:
        return start_edit(ada, conversation_id, messages[2]["id"], "Slow")
    return ada.send_message(conversation_id, "Slow", headers=ASYNC).json


@pytest.fixture(params=["same process", "other process"])
def joiner(request, ada, other_process):
    """Another client with the session of ada."""
    return create_other_client(ada) if request.param == "same process" else other_process


def test_edit_with_same_text_returns_202_with_reply_in_progress(ada, bot, gate, conversation_id, slow_exchange, joiner):
    question, reply = start_edit(joiner, conversation_id, slow_exchange[0]["id"], "Slow")
    assert (question["id"], question["text"]) == (slow_exchange[0]["id"], "Slow")
    assert (reply["id"], reply["status"]) == (slow_exchange[1]["id"], "in_progress")
    gate.set()
    wait_until(lambda: ada.list_messages(conversation_id)[-1].get("status") is None)
    assert bot.texts.count("Slow") == 1


def test_edit_with_same_text_joins_stream_of_reply_in_progress(ada, bot, gate, conversation_id, slow_exchange, joiner):
    response = joiner.edit_message(
        conversation_id, slow_exchange[0]["id"], "Slow", headers=STREAM, buffered=False
    )  # the head comes with the first chunk
    gate.set()
    events = read_events(response)
    assert join_deltas(events) == "Slow reply"
    assert events[-1][:2] == ("done", ada.list_messages(conversation_id)[-2:])
    assert events[-1][1][1]["id"] == slow_exchange[1]["id"]
    assert bot.texts.count("Slow") == 1


def test_edit_with_other_text_while_reply_is_in_progress_returns_409(
    ada, bot, gate, conversation_id, slow_exchange, joiner
):
    response = joiner.edit_message(conversation_id, slow_exchange[0]["id"], "Other")
    assert (response.status_code, response.json) == (
        409,
        {"error": "The reply to this message is in progress: stop it first"},
    )
    gate.set()
    wait_until(lambda: get_texts(ada.list_messages(conversation_id)[-2:]) == ["Slow", "Slow reply"])


def test_edit_while_other_message_is_being_edited_returns_409(ada, bot, gate, conversation_id, messages):
    bot.scripts = {"Edited": [gate.wait, "New reply"]}
    start_edit(ada, conversation_id, messages[0]["id"], "Edited")
    response = ada.edit_message(conversation_id, messages[2]["id"], "Other")
    assert (response.status_code, list(response.json)) == (409, ["error"])
    gate.set()
    wait_until(lambda: get_texts(ada.list_messages(conversation_id)) == ["Edited", "New reply"])


def test_of_two_concurrent_edits_with_different_texts_one_returns_409(
    ada, bot, other_bot, gate, conversation_id, messages, joiner
):
    bot.steps = other_bot.steps = [gate.wait, "New reply"]
    responses = run_all(
        lambda: ada.edit_message(conversation_id, messages[2]["id"], "One", headers=ASYNC),
        lambda: joiner.edit_message(conversation_id, messages[2]["id"], "Two", headers=ASYNC),
    )
    gate.set()
    assert sorted(response.status_code for response in responses) == [202, 409]
    [accepted] = [response.json for response in responses if response.status_code == 202]
    wait_until(lambda: len(ada.list_messages(conversation_id)) == 4)
    assert ada.list_messages(conversation_id)[2] == accepted[0]


def test_concurrent_edits_with_same_text_ask_bot_once(ada, bot, gate, conversation_id, messages):
    bot.steps = [gate.wait, "New reply"]
    clients = [create_other_client(ada) for _ in range(4)]
    pairs = run_concurrently(
        4, lambda number: start_edit(clients[number], conversation_id, messages[2]["id"], "Edited")
    )
    gate.set()
    assert pairs == [pairs[0]] * 4
    wait_until(lambda: get_texts(ada.list_messages(conversation_id)[2:]) == ["Edited", "New reply"])
    assert bot.texts.count("Edited") == 1


def test_edit_drops_later_exchange_in_progress(ada, bot, gate, conversation_id, messages):
    bot.scripts = {"Slow": ["Slow ", *[lambda: gate.wait(0.05), ""] * 1200]}
    sender = create_other_client(ada)
    with run_in_background(lambda: sender.send_message(conversation_id, "Slow")) as [sending]:
        wait_until(lambda: "Slow " in get_texts(ada.list_messages(conversation_id)))
        assert ada.edit_message(conversation_id, messages[2]["id"], "Edited").status_code == 200
    assert get_answer(sending.result()) == (404, {"error": "Message not found"})
    wait_until(lambda: bot.closed)
    assert get_texts(ada.list_messages(conversation_id)) == ["First", "Hello there.", "Edited", "Hello there."]


def test_send_during_pending_edit_is_kept_after_new_reply(ada, bot, gate, conversation_id, messages):
    bot.scripts = {"Edited": [gate.wait, "New reply"]}
    start_edit(ada, conversation_id, messages[2]["id"], "Edited")
    sent = ada.send_message(conversation_id, "Fourth").json
    assert ("user", "Edited") not in bot.histories[-1]
    gate.set()
    exchanges = ["First", "Hello there.", "Edited", "New reply", "Fourth", "Hello there."]
    wait_until(lambda: get_texts(ada.list_messages(conversation_id)) == exchanges)
    assert ada.list_messages(conversation_id)[4:] == sent


def test_stop_of_edit_before_first_chunk_stores_empty_reply(ada, bot, gate, conversation_id, messages, joiner):
    bot.scripts = {"Edited": [gate.wait, "New reply"]}
    question, reply = start_edit(ada, conversation_id, messages[2]["id"], "Edited")
    response = joiner.stop_reply(conversation_id, question["id"])
    assert (response.status_code, response.json) == (200, {**reply, "status": "stopped"})
    gate.set()
    wait_until(lambda: bot.closed)
    assert ada.list_messages(conversation_id) == [*messages[:2], question, response.json]


def test_stop_of_edit_after_first_chunk_stores_text(ada, bot, gate, conversation_id, messages):
    bot.scripts = {"Edited": ["New ", gate.wait, "reply"]}
    question, reply = start_edit(ada, conversation_id, messages[2]["id"], "Edited")
    wait_until(lambda: ada.get_message(conversation_id, reply["id"]).json["text"] == "New ")
    stopped = ada.stop_reply(conversation_id, reply["id"]).json
    assert stopped == {**reply, "text": "New ", "status": "stopped"}
    assert ada.list_messages(conversation_id) == [*messages[:2], question, stopped]


@pytest.mark.parametrize("delay", [0, 0.001, 0.003, 0.01, 0.03])
def test_stop_at_first_chunk_of_edit_leaves_one_exchange(ada, bot, conversation_id, messages, delay):
    first = Gate()
    bot.scripts = {"Edited": [first.wait, *["word "] * 1000, lambda: first.wait() and None]}
    question, _ = start_edit(ada, conversation_id, messages[2]["id"], "Edited")
    release = threading.Timer(delay, first.set)
    release.start()
    stopped = ada.stop_reply(conversation_id, question["id"]).json
    release.join()
    assert ada.list_messages(conversation_id) == [*messages[:2], question, stopped]
    assert stopped["text"] == "word " * (len(stopped["text"]) // 5)


def test_regenerate_after_stop_and_failure_replaces_reply(ada, bot, gate, conversation_id):
    bot.scripts = {"Hello": ["One ", BotError("cut")]}
    question, failed = ada.send_message(conversation_id).json
    assert failed["status"] == "failed"
    bot.scripts = {}
    pair = ada.edit_message(conversation_id, question["id"], "Hello").json
    assert "status" not in pair[1]
    assert ada.list_messages(conversation_id) == pair


def test_edit_that_shutdown_interrupts_before_first_chunk_changes_nothing(
    app, ada, bot, gate, conversation_id, messages
):
    bot.scripts = {"Edited": [gate.wait, "New reply"]}
    editor = create_other_client(ada)
    with run_in_background(lambda: editor.edit_message(conversation_id, messages[2]["id"], "Edited")) as [editing]:
        wait_until(lambda: "Edited" in bot.texts)
        app.extensions["replies"].shutdown(timeout=0)
    assert editing.result().status_code == 503
    assert ada.list_messages(conversation_id) == messages


def test_edit_of_deleted_conversation_returns_404(ada, bot, gate, conversation_id, messages):
    bot.scripts = {"Edited": [gate.wait, "New reply"]}
    editor = create_other_client(ada)
    with run_in_background(lambda: editor.edit_message(conversation_id, messages[2]["id"], "Edited")) as [editing]:
        wait_until(lambda: "Edited" in bot.texts)
        assert ada.delete(f"/api/conversations/{conversation_id}").status_code == 204
        gate.set()
    assert editing.result().status_code == 404


@pytest.mark.parametrize("statement", ["DELETE FROM message", "UPDATE message SET text"])
def test_edit_that_database_refuses_at_first_chunk_changes_nothing(app, ada, bot, conversation_id, messages, statement):
    refusals = []

    def refuse(connection, cursor, sql, parameters, context, executemany):
        """Refuse the statement the first time that it is sent, as a database does that becomes unavailable."""
        if sql.startswith(statement) and not refusals:
            refusals.append(sql)
            raise connection.dialect.loaded_dbapi.OperationalError("the connection is lost")

    with app.app_context():
        event.listen(db.engine, "before_cursor_execute", refuse)
    response = ada.edit_message(conversation_id, messages[2]["id"], "Edited")
    assert response.status_code == 503
    assert refusals
    assert ada.list_messages(conversation_id) == messages
    assert ada.edit_message(conversation_id, messages[2]["id"], "Edited again").status_code == 200


def test_edit_after_regenerations_keeps_ids_in_order(make_app, bot):
    client = create_logged_in_client(make_app(bot), "ada")
    conversation_id = client.create_conversation()
    question, _ = client.send_message(conversation_id).json
    for _ in range(3):
        client.edit_message(conversation_id, question["id"], "Hello")
    client.send_message(conversation_id, "Next")
    ids = [message["id"] for message in client.list_messages(conversation_id)]
    assert ids == sorted(ids)
    assert get_texts(client.list_messages(conversation_id)) == ["Hello", "Hello there.", "Next", "Hello there."]


def test_exchange_of_a_message_that_was_read_before_an_edit_has_the_new_text_and_reply(
    app, ada, conversation_id, other_process
):
    question, _ = ada.send_message(conversation_id).json
    with app.app_context():
        message = Message.get(conversation_id, question["id"])
        db.session.commit()
        edited = other_process.edit_message(conversation_id, question["id"], "Edited").json
        exchange = Exchange.get(ada.user_id, message)
    assert [exchange.question, exchange.reply] == edited
