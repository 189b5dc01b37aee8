"""Sends with an Idempotency-Key: one exchange for a key, and never two calls of the bot for it at a time."""

import threading

import pytest

from app.bot import BotError, BotTimeout
from app.models.exchange import save_replies
from tests.conftest import SHARED_SESSIONS, create_other_client, on_sqlite
from tests.helpers.bots import ASYNC, STREAM, Gate, join_deltas, read_events
from tests.helpers.data import count_messages
from tests.helpers.server import TIMEOUT, run_concurrently, run_in_background, wait_until

each_way = pytest.mark.parametrize("headers", [{}, STREAM, ASYNC], ids=["waiting", "stream", "async"])


class CountingBot:
    """A bot of one or more processes that replies with the number of the call, and notes calls at the same time."""

    def __init__(self):
        self.calls, self.running, self.most_running = 0, 0, 0
        self.failures = []  # exceptions to raise, one for each call, before the first chunk
        self.cuts = []  # exceptions to raise, one for each call, after the first chunk
        self.gate = Gate()
        self.gate.set()
        self.lock = threading.Lock()

    def __call__(self, history, user_id, conversation_id):
        with self.lock:
            self.calls += 1
            self.running += 1
            self.most_running = max(self.most_running, self.running)
            number = self.calls
        try:
            if self.failures:
                raise self.failures.pop(0)
            yield f"Reply {number}"
            self.gate.wait()
            if self.cuts:
                raise self.cuts.pop(0)
            yield "!"
        finally:
            with self.lock:
                self.running -= 1


@pytest.fixture
def bot():
    bot = CountingBot()
    yield bot
    bot.gate.set()


@pytest.fixture
def app(make_app, bot):
    return make_app(bot, **SHARED_SESSIONS)


@pytest.fixture
def other_app(make_app, bot):
    """An application on the same database that generates its replies by itself."""
    return make_app(bot, **SHARED_SESSIONS)


def send(client, conversation_id, text="Hello", key="key", headers=()):
    """Send a message with an Idempotency-Key."""
    return client.send_message(conversation_id, text, headers={"Idempotency-Key": key, **dict(headers)})


def get_pair(response):
    """Return the exchange of a response of any kind."""
    return response.json if response.is_json else read_events(response)[-1][1]


def test_repeated_send_returns_stored_pair(ada, bot, conversation_id):
    first = send(ada, conversation_id)
    assert first.status_code == 201
    assert "Idempotent-Replayed" not in first.headers
    for _ in range(2):
        response = send(ada, conversation_id)
        assert (response.status_code, response.json) == (201, first.json)
        assert response.headers["Idempotent-Replayed"] == "true"
    assert ada.list_messages(conversation_id) == first.json
    assert bot.calls == 1


@each_way
def test_send_may_be_repeated_in_another_way(ada, bot, conversation_id, headers):
    send(ada, conversation_id, headers=headers)
    wait_until(lambda: ada.list_messages(conversation_id)[1].get("status") is None)
    pair = ada.list_messages(conversation_id)
    for repeat_headers in ({}, STREAM, ASYNC):
        response = send(ada, conversation_id, headers=repeat_headers)
        assert response.headers["Idempotent-Replayed"] == "true", repeat_headers
        assert get_pair(response) == pair, repeat_headers
        if repeat_headers == STREAM:
            assert join_deltas(read_events(response)) == pair[1]["text"]
        else:
            assert response.status_code == 201, repeat_headers
    assert bot.calls == 1


@each_way
def test_repeat_with_other_text_returns_409(ada, bot, conversation_id, headers):
    pair = send(ada, conversation_id).json
    error = {"error": "Idempotency-Key was used for another text in this conversation"}
    for text in ("Hello!", "hello", "Hello "):
        response = send(ada, conversation_id, text, headers=headers)
        assert (response.status_code, response.json) == (409, error), text
    assert ada.list_messages(conversation_id) == pair
    assert bot.calls == 1


@each_way
@on_sqlite
def test_send_with_invalid_key_returns_400(app, ada, bot, conversation_id, headers):
    for key in ("", "x" * 256, "a b", " ", "a\tb", "a\x7f", "schlüssel", "\u00a0"):
        response = send(ada, conversation_id, key=key, headers=headers)
        assert response.status_code == 400, key
        assert response.json == {"error": "Idempotency-Key must be 1 to 255 visible ASCII characters"}, key
    assert (bot.calls, count_messages(app)) == (0, 0)


def test_key_may_have_any_visible_ascii_characters(ada, bot, conversation_id):
    keys = ("x", "x" * 255, "6f1c0c3e-8a3b-4a40-9c4c-0d2c5f6a7b8c", "!\"#$%&'()*+,-./:;<=>?@[]^_`{|}~")
    for key in keys:
        assert send(ada, conversation_id, key=key).json == send(ada, conversation_id, key=key).json, key
    assert bot.calls == len(keys)


def test_keys_differ_in_case(ada, bot, conversation_id):
    assert send(ada, conversation_id, key="Key").json != send(ada, conversation_id, key="key").json
    assert bot.calls == 2


def test_key_belongs_to_conversation(ada, bot, conversation_id):
    other_id = ada.create_conversation()
    first, second = send(ada, conversation_id).json, send(ada, other_id, "Another text").json
    assert send(ada, conversation_id).json == first
    assert send(ada, other_id, "Another text").json == second
    assert bot.calls == 2


def test_key_of_other_user_returns_404(ada, bob, bot, conversation_id):
    send(ada, conversation_id)
    assert send(bob, conversation_id).status_code == 404
    assert send(bob, bob.create_conversation()).status_code == 201


def test_repeat_without_session_returns_401(ada, bot, conversation_id):
    send(ada, conversation_id)
    ada.logout()
    assert send(ada, conversation_id).status_code == 401


def test_key_of_deleted_conversation_returns_404_and_is_free_elsewhere(ada, bot, conversation_id):
    send(ada, conversation_id)
    ada.delete(f"/api/conversations/{conversation_id}")
    assert send(ada, conversation_id).status_code == 404
    response = send(ada, ada.create_conversation())
    assert response.status_code == 201
    assert "Idempotent-Replayed" not in response.headers


def test_sends_without_key_are_separate(ada, bot, conversation_id):
    first, second = ada.send_message(conversation_id), ada.send_message(conversation_id)
    assert ada.list_messages(conversation_id) == first.json + second.json
    assert "Idempotent-Replayed" not in second.headers


def test_repeat_after_other_sends_returns_pair_of_its_key(ada, bot, conversation_id):
    pairs = {key: send(ada, conversation_id, key, key).json for key in ("one", "two", "three")}
    ada.send_message(conversation_id, "without a key")
    for key, pair in reversed(pairs.items()):
        assert send(ada, conversation_id, key, key).json == pair


@pytest.mark.parametrize(("body", "status"), [({"json": {}}, 400), ({"data": "Hello"}, 415)])
def test_repeat_with_invalid_body_returns_error(ada, bot, conversation_id, body, status):
    send(ada, conversation_id)
    path = f"/api/conversations/{conversation_id}/messages"
    assert ada.post(path, headers={"Idempotency-Key": "key"}, **body).status_code == status


@pytest.mark.parametrize("error", [BotError("down"), BotTimeout("stalled"), ZeroDivisionError("a bug")])
@each_way
def test_repeat_after_failure_before_first_chunk_is_new_send(app, ada, bot, conversation_id, error, headers):
    bot.failures = [error]
    send(ada, conversation_id, headers=headers)
    wait_until(lambda: count_messages(app) == 0)
    response = send(ada, conversation_id)
    assert (response.status_code, response.json[1]["text"]) == (201, "Reply 2!")
    assert "Idempotent-Replayed" not in response.headers
    assert ada.list_messages(conversation_id) == response.json


@each_way
def test_repeat_after_failure_replaces_failed_reply(ada, bot, conversation_id, headers):
    bot.cuts = [BotError("cut")]
    question, failed = send(ada, conversation_id).json
    assert (failed["text"], failed["status"]) == ("Reply 1", "failed")
    later = ada.send_message(conversation_id, "Later").json
    response = send(ada, conversation_id, headers=headers)
    assert response.status_code < 300
    assert "Idempotent-Replayed" not in response.headers
    wait_until(lambda: ada.get_message(conversation_id, failed["id"]).json.get("status") is None)
    messages = ada.list_messages(conversation_id)
    assert messages[1] == {"id": failed["id"], "sender": "bot", "text": "Reply 3!", "created_at": failed["created_at"]}
    assert messages == [question, messages[1], *later]
    assert get_pair(send(ada, conversation_id)) == messages[:2]
    assert bot.calls == 3


def test_repeat_that_fails_before_first_chunk_keeps_failed_reply(ada, bot, conversation_id):
    bot.cuts = [BotError("cut")]
    pair = send(ada, conversation_id).json
    bot.failures = [BotTimeout("stalled")]
    assert send(ada, conversation_id).status_code == 504
    assert ada.list_messages(conversation_id) == pair
    assert send(ada, conversation_id).json[1]["text"] == "Reply 3!"


def test_repeat_after_an_edit_returns_the_edited_exchange(ada, bot, conversation_id):
    question, _ = send(ada, conversation_id, "Original").json
    edited = ada.edit_message(conversation_id, question["id"], "Edited").json
    response = send(ada, conversation_id, "Original")
    assert (response.status_code, response.json) == (201, edited)
    assert response.headers["Idempotent-Replayed"] == "true"
    assert bot.calls == 2


def test_key_with_the_text_of_an_edit_returns_409(ada, conversation_id):
    question, _ = send(ada, conversation_id, "Original").json
    ada.edit_message(conversation_id, question["id"], "Edited")
    assert send(ada, conversation_id, "Edited").status_code == 409


def test_repeat_during_an_edit_joins_it(ada, bot, conversation_id):
    question, _ = send(ada, conversation_id, "Original").json
    bot.gate.clear()
    edited = ada.edit_message(conversation_id, question["id"], "Edited", headers=ASYNC).json
    response = send(ada, conversation_id, "Original", headers=ASYNC)
    assert (response.status_code, response.json[1]["id"]) == (202, edited[1]["id"])
    assert bot.calls == 2


def test_repeat_after_an_edit_whose_reply_failed_returns_that(ada, bot, conversation_id):
    question, _ = send(ada, conversation_id, "Original").json
    bot.cuts = [BotError("cut")]
    edited = ada.edit_message(conversation_id, question["id"], "Edited").json
    assert edited[1]["status"] == "failed"
    assert send(ada, conversation_id, "Original").json == edited
    assert bot.calls == 2


def test_repeat_after_stop_returns_stopped_reply(ada, bot, conversation_id):
    bot.gate.clear()
    _, reply = send(ada, conversation_id, headers=ASYNC).json
    wait_until(lambda: ada.get_message(conversation_id, reply["id"]).json["text"])
    stopped = ada.stop_reply(conversation_id, reply["id"]).json
    response = send(ada, conversation_id)
    assert response.headers["Idempotent-Replayed"] == "true"
    assert response.json[1] == stopped
    assert bot.calls == 1


@pytest.fixture(params=["same process", "other process"])
def repeater(request, ada, other_app):
    """Another client with the session of ada, at the process that generates the first reply or at another one."""
    return create_other_client(ada, None if request.param == "same process" else other_app)


def test_repeat_while_reply_is_in_progress_joins_it(ada, bot, conversation_id, repeater):
    bot.gate.clear()
    question, reply = send(ada, conversation_id, headers=ASYNC).json
    wait_until(lambda: ada.get_message(conversation_id, reply["id"]).json["text"])
    repeated = send(repeater, conversation_id, headers=ASYNC)
    assert repeated.status_code == 202
    assert "Idempotent-Replayed" not in repeated.headers
    assert [message["id"] for message in repeated.json] == [question["id"], reply["id"]]
    other = create_other_client(repeater)
    with run_in_background(
        lambda: send(repeater, conversation_id), lambda: send(other, conversation_id, headers=STREAM)
    ) as [waiting, streaming]:
        bot.gate.set()
    pair = ada.list_messages(conversation_id)
    assert pair[1]["text"] == "Reply 1!"
    assert get_pair(waiting.result()) == get_pair(streaming.result()) == pair
    assert join_deltas(read_events(streaming.result())) == "Reply 1!"
    assert bot.calls == 1


def test_repeat_with_other_text_while_reply_is_in_progress_returns_409(ada, bot, conversation_id, repeater):
    bot.gate.clear()
    send(ada, conversation_id, headers=ASYNC)
    assert send(repeater, conversation_id, "Other").status_code == 409
    bot.gate.set()
    wait_until(lambda: ada.list_messages(conversation_id)[1]["text"] == "Reply 1!")


def create_clients(client, other_app, count):
    """Return clients with the same session, alternately at two processes."""
    return [create_other_client(client, other_app if number % 2 else None) for number in range(count)]


@each_way
def test_concurrent_sends_with_one_key_ask_bot_once(ada, bot, conversation_id, other_app, headers):
    clients = create_clients(ada, other_app, 8)
    responses = run_concurrently(8, lambda number: send(clients[number], conversation_id, headers=headers))
    wait_until(lambda: ada.list_messages(conversation_id)[1].get("status") is None)
    pair = ada.list_messages(conversation_id)
    for response in responses:
        assert response.status_code < 300
        assert [message["id"] for message in get_pair(response)] == [message["id"] for message in pair]
    assert len(pair) == 2
    assert bot.calls == 1


def test_of_concurrent_sends_with_one_key_and_different_texts_one_is_stored(ada, bot, conversation_id, other_app):
    clients = create_clients(ada, other_app, 4)
    responses = run_concurrently(4, lambda number: send(clients[number], conversation_id, f"Text {number}"))
    assert sorted(response.status_code for response in responses) == [201, 409, 409, 409]
    [accepted] = [response.json for response in responses if response.status_code == 201]
    assert ada.list_messages(conversation_id) == accepted
    assert bot.calls == 1


def test_concurrent_repeats_of_failed_reply_ask_bot_once_at_a_time(ada, bot, conversation_id, other_app):
    clients = create_clients(ada, other_app, 8)
    for attempt in range(5):
        bot.cuts = [BotError("cut")]
        _, failed = send(ada, conversation_id, key=str(attempt)).json
        assert failed["status"] == "failed"
        calls = bot.calls
        responses = run_concurrently(
            8, lambda number, key=str(attempt): send(clients[number], conversation_id, key=key)
        )
        assert {response.status_code for response in responses} == {201}
        pair = ada.list_messages(conversation_id)[-2:]
        assert [response.json for response in responses] == [pair] * 8
        assert bot.calls == calls + 1
    assert bot.most_running == 1


def test_concurrent_sends_with_one_key_to_failing_bot_never_overlap(ada, bot, conversation_id, other_app):
    clients = create_clients(ada, other_app, 8)
    for attempt in range(5):
        bot.failures = [BotError("down")] * 8

        def send_until_done(number, key=str(attempt)):
            """Repeat a send as long as the bot fails; return the pair."""
            while (response := send(clients[number], conversation_id, key=key)).status_code == 502:
                """Send again."""
            assert response.status_code == 201, response.json
            return response.json

        pairs = run_concurrently(8, send_until_done)
        assert pairs == [ada.list_messages(conversation_id)[-2:]] * 8
    assert len(ada.list_messages(conversation_id)) == 10
    assert bot.most_running == 1


def test_repeat_while_conversation_is_deleted_returns_404(ada, bot, conversation_id, repeater):
    bot.gate.clear()
    send(ada, conversation_id, headers=ASYNC)
    with run_in_background(lambda: send(repeater, conversation_id)) as [repeating]:
        assert ada.delete(f"/api/conversations/{conversation_id}").status_code == 204
        response = repeating.result(TIMEOUT)
    assert (response.status_code, response.json) == (404, {"error": "Conversation not found"})


def test_repeat_between_the_end_and_its_storing_has_the_stored_reply(app, ada, conversation_id, monkeypatch):
    repeats = []

    def save_and_repeat(rows):
        lost = save_replies(rows)
        if not repeats:
            repeats.append(send(create_other_client(ada), conversation_id, headers=ASYNC))
        return lost

    monkeypatch.setattr("app.replies.save_replies", save_and_repeat)
    pair = send(ada, conversation_id).json
    assert (repeats[0].status_code, repeats[0].json) == (201, pair)
    assert repeats[0].headers["Idempotent-Replayed"] == "true"
