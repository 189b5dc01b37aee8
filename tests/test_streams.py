"""Replies as server-sent events: their names, data and ids, resuming, and what ends them."""

import re
import threading
import time
from itertools import islice

import pytest

from app.bot import BotError, BotTimeout
from tests.conftest import SHARED_SESSIONS, create_other_client, on_sqlite
from tests.helpers.bots import STREAM, join_deltas, read_events, start_reply, wait_for_end, wait_for_text
from tests.helpers.data import add_abandoned_exchange, execute, get_answer
from tests.helpers.server import run_concurrently, run_in_background, wait_until

TEXT = "One “two”\n\n\r\u2028data: three 🙂 e\u0301"


@pytest.fixture
def app(make_app, bot):
    return make_app(bot, **SHARED_SESSIONS)


@pytest.fixture
def short_silence(monkeypatch):
    """Let a bot that produces nothing for a tenth of a second count as silent."""
    monkeypatch.setattr("app.replies.SILENCE_INTERVAL", 0.1)


def test_stream_has_start_delta_and_done_byte_by_byte(ada, bot, conversation_id):
    bot.steps = [TEXT]
    body = ada.send_message(conversation_id, "Count", headers=STREAM).text
    question_time, reply_time = (message["created_at"] for message in ada.list_messages(conversation_id))
    question = f'{{"id":1,"sender":"user","text":"Count","created_at":"{question_time}"}}'
    start = f'{{"id":2,"sender":"bot","text":"","created_at":"{reply_time}","status":"in_progress"}}'
    text = '"One “two”\\n\\n\\r\u2028data: three 🙂 e\u0301"'
    reply = f'{{"id":2,"sender":"bot","text":{text},"created_at":"{reply_time}"}}'
    assert body == (
        f"event: start\ndata: [{question},{start}]\n\n"
        f'id: 2 29\nevent: delta\ndata: {{"text":{text}}}\n\n'
        f"id: 2 29 end\nevent: done\ndata: [{question},{reply}]\n\n"
    )


MIMETYPES = {  # by what the client accepts
    "*/*": "application/json",
    "text/event-stream": "text/event-stream",
    "text/*": "text/event-stream",
    "application/json, text/event-stream": "application/json",
    "text/event-stream, application/json": "text/event-stream",
    "text/event-stream;q=0": "application/json",
    "TEXT/EVENT-STREAM;q=0.9;charset=UTF-8, */*;q=0.1": "text/event-stream",
    "application/json; charset=utf-8, text/event-stream;q=0.5": "application/json",
}


@pytest.mark.parametrize(("accept", "mimetype"), MIMETYPES.items())
@on_sqlite
def test_accept_decides_between_stream_and_json(ada, conversation_id, accept, mimetype):
    sent = ada.send_message(conversation_id, headers={"Accept": accept})
    assert (sent.mimetype, sent.status_code) == (mimetype, 200 if mimetype == "text/event-stream" else 201)
    question = ada.list_messages(conversation_id)[0]
    edited = ada.edit_message(conversation_id, question["id"], "Edited", headers={"Accept": accept})
    assert (edited.mimetype, edited.status_code) == (mimetype, 200)


def test_stream_sends_each_chunk_when_it_arrives_and_comments_while_bot_is_silent(
    ada, bot, gate, conversation_id, short_silence
):
    bot.steps = ["One ", gate.wait, "two"]
    with ada.send_message(conversation_id, headers=STREAM, buffered=False) as response:
        chunks = response.iter_encoded()
        before = [chunk.decode() for chunk in islice(chunks, 4)]
        gate.set()
        after = b"".join(chunks).decode()
    assert re.findall("event: (.+)", "".join(before)) == ["start", "delta"]
    assert len([comment for comment in before if re.fullmatch(r": [^\n]+\n\n", comment)]) == 2
    assert re.findall("event: (.+)", after) == ["delta", "done"]


def test_failure_after_start_and_before_first_chunk_is_event(ada, bot, gate, conversation_id, short_silence):
    bot.steps = [gate.wait, BotError("secret")]
    with ada.send_message(conversation_id, headers=STREAM, buffered=False) as response:
        assert next(response.iter_encoded()).startswith(b"event: start\n")
        gate.set()
        _, reply = wait_for_end(ada, conversation_id)
        assert read_events(response)[-1] == ("error", {"error": reply["error"]}, f"{reply['id']} 0 end")


@pytest.mark.parametrize("text", ["One ", ""], ids=["after the first chunk", "before the first chunk"])
def test_follow_ends_with_the_error_of_a_reply_that_fails_then_or_has_failed(
    ada, bot, gate, conversation_id, second_client, text
):
    bot.steps = [text, gate.wait, BotTimeout("stalled")]
    question, reply = start_reply(ada, conversation_id)
    wait_for_text(ada, conversation_id, reply["id"], text)
    with run_in_background(lambda: second_client.follow_reply(conversation_id, reply["id"])) as [following]:
        time.sleep(0.1)  # it follows
        gate.set()
    for response in (following.result(), second_client.follow_reply(conversation_id, question["id"])):
        events = read_events(response)
        assert (events[0][0], join_deltas(events)) == ("start", text)
        assert events[-1] == ("error", {"error": "The bot took too long to answer"}, f"{reply['id']} {len(text)} end")


def test_follow_of_reply_in_progress_sends_whole_reply(ada, bot, gate, conversation_id, second_client):
    bot.steps = ["One ", gate.wait, "two"]
    question, reply = start_reply(ada, conversation_id)
    with second_client.follow_reply(conversation_id, reply["id"], buffered=False) as response:
        gate.set()
        events = read_events(response)
    assert (response.status_code, events[0]) == (200, ("start", [question, reply], None))
    assert join_deltas(events) == "One two"
    assert events[-1] == ("done", ada.list_messages(conversation_id), f"{reply['id']} 7 end")


@pytest.mark.parametrize("index", [0, 1], ids=["id of the question", "id of the reply"])
def test_follow_of_complete_reply_sends_whole_reply(ada, bot, conversation_id, second_client, index):
    bot.steps = [*TEXT]
    question, reply = exchange = ada.send_message(conversation_id).json
    events = read_events(second_client.follow_reply(conversation_id, exchange[index]["id"]))
    assert events == [
        ("start", [question, {**reply, "text": "", "status": "in_progress"}], None),
        ("delta", {"text": TEXT}, f"{reply['id']} {len(TEXT)}"),
        ("done", exchange, f"{reply['id']} {len(TEXT)} end"),
    ]


def test_follow_of_empty_stopped_reply_is_done(ada, bot, gate, conversation_id, second_client):
    bot.steps = [gate.wait]
    question, reply = start_reply(ada, conversation_id)
    stopped = ada.stop_reply(conversation_id, reply["id"]).json
    _, done = read_events(second_client.follow_reply(conversation_id, reply["id"]))
    assert done == ("done", [question, stopped], f"{reply['id']} 0 end")


def test_follow_with_last_event_id_resumes_reply_in_progress(ada, bot, gate, conversation_id, second_client):
    bot.steps = ["One ", "“", gate.wait, "🙂", "”"]
    _, reply = start_reply(ada, conversation_id)
    wait_for_text(ada, conversation_id, reply["id"], "One “")
    clients = [create_other_client(second_client) for _ in range(8)]

    def follow(count):
        headers = {"Last-Event-ID": f"{reply['id']} {count}"}
        return read_events(clients[count].follow_reply(conversation_id, reply["id"], headers=headers))

    threading.Timer(0.2, gate.set).start()
    for count, events in enumerate(run_concurrently(8, follow)):
        assert ("One “🙂”"[:count] + join_deltas(events)) == "One “🙂”", count
        assert events[-1][:2] == ("done", ada.list_messages(conversation_id)), count


WHOLE = ["start", "delta", "done"]
LAST_EVENT_IDS = {  # with the names of the events that follow; {0} is the reply's id, {1} that of an earlier version
    "{0} 0": ["delta", "done"],
    "{0} 4": ["delta", "done"],
    "{0} 7": ["done"],
    "{0} 999": ["done"],
    "{1} 4": WHOLE,
    "{1} 4 end": WHOLE,
    "999 7 end": WHOLE,
    **dict.fromkeys(("", "x", "4", "{0}", "{0} -1", "{0} 4 ende", "{0} 1.5", "{0} 1 2", f"{'9' * 30} 4", "٣ ٣"), WHOLE),
}


@pytest.mark.parametrize(("last_id", "names"), LAST_EVENT_IDS.items())
@on_sqlite
def test_follow_with_last_event_id_sends_what_it_lacks(ada, bot, conversation_id, last_id, names):
    bot.steps = ["Old reply"]
    question, old = ada.send_message(conversation_id).json
    bot.steps = ["One two"]
    _, reply = ada.edit_message(conversation_id, question["id"], "Hello").json
    headers = {"Last-Event-ID": last_id.format(reply["id"], old["id"]).encode().decode("latin-1")}
    for message in (question, reply):
        events = read_events(ada.follow_reply(conversation_id, message["id"], headers=headers))
        assert [name for name, _, _ in events] == names
        assert events[-1][:2] == ("done", [question, reply])


@pytest.mark.parametrize("steps", [["One"], ["One ", BotError("cut")], [BotError("down")]])
def test_follow_after_last_event_returns_204(ada, bot, conversation_id, second_client, steps):
    bot.steps = steps
    ada.send_message(conversation_id)
    question, reply = ada.list_messages(conversation_id)
    *_, (_, _, last_id) = read_events(ada.follow_reply(conversation_id, reply["id"]))
    for message in (question, reply):
        response = second_client.follow_reply(conversation_id, message["id"], headers={"Last-Event-ID": last_id})
        assert (response.status_code, response.data) == (204, b"")


def test_follow_of_message_without_reply_returns_404(app, ada, conversation_id):
    _, reply_id = add_abandoned_exchange(app, conversation_id)
    execute(app, "DELETE FROM message WHERE id = :id", id=reply_id)
    response = ada.follow_reply(conversation_id, reply_id - 1)
    assert get_answer(response) == (404, {"error": "The message has no reply"})
    assert ada.stop_reply(conversation_id, reply_id - 1).status_code == 404


def test_deletion_ends_streams_with_error(ada, bot, conversation_id, second_client):
    bot.steps = ["One ", *[lambda: time.sleep(0.05), ""] * 1200]
    with ada.send_message(conversation_id, headers=STREAM, buffered=False) as response:
        _, reply = ada.list_messages(conversation_id)
        with second_client.follow_reply(conversation_id, reply["id"], buffered=False) as following:
            ada.delete(f"/api/conversations/{conversation_id}")
            for each in (following, response):
                assert read_events(each)[-1] == ("error", {"error": "Conversation not found"}, None)
    wait_until(lambda: bot.closed)


def test_head_request_of_events_has_no_body_and_headers_against_caches_and_buffers(ada, conversation_id):
    _, reply = ada.send_message(conversation_id).json
    path = f"/api/conversations/{conversation_id}/messages/{reply['id']}/events"
    for response in (ada.head(path, buffered=True), ada.get(path, buffered=True)):
        assert (response.status_code, response.content_type) == (200, "text/event-stream; charset=utf-8")
        assert (response.headers["Cache-Control"], response.headers["X-Accel-Buffering"]) == ("no-store", "no")
        assert (response.data == b"") == (response.request.method == "HEAD")
