"""Sends with an Idempotency-Key: one exchange for a key, and never two calls of the bot for it at a time."""

import threading

import pytest

from app.bot import BotError, BotTimeout
from tests.conftest import SHARED_SESSIONS, create_other_client, on_sqlite
from tests.helpers.bots import ASYNC, KEY, STREAM, WAYS, each_way, join_deltas, read_events, wait_for_end, wait_for_text
from tests.helpers.data import add_abandoned_exchange, count_messages, execute, get_answer, get_ids, get_texts
from tests.helpers.server import run_concurrently, run_in_background


class CountingBot:
    """A bot of one or more processes that replies with the number of the call, and counts calls at the same time."""

    def __init__(self, gate):
        self.gate, self.lock = gate, threading.Lock()
        self.calls = self.running = self.most_running = 0
        self.failures, self.cuts = [], []  # exceptions to raise, one for each call, before or after the first chunk

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
def bot(gate):
    """A bot that waits for the gate only if a test clears that."""
    gate.set()
    return CountingBot(gate)


@pytest.fixture
def app(make_app, bot):
    return make_app(bot, **SHARED_SESSIONS)


@pytest.fixture
def other_bot(bot):
    return bot


def send(client, conversation_id, text="Hello", key="key", headers=()):
    """Send a message with an Idempotency-Key."""
    return client.send_message(conversation_id, text, headers={"Idempotency-Key": key, **dict(headers)})


def is_replayed(response):
    return response.headers.get("Idempotent-Replayed") == "true"


def get_exchange(response):
    """Return the exchange of a response of any kind."""
    return response.json if response.is_json else read_events(response)[-1][1]


@each_way
@pytest.mark.parametrize("repeat_headers", WAYS.values(), ids=WAYS)
def test_repeated_send_returns_stored_exchange(ada, bot, conversation_id, headers, repeat_headers):
    first = send(ada, conversation_id, headers=headers)
    exchange = wait_for_end(ada, conversation_id)
    response = send(ada, conversation_id, headers=repeat_headers)
    assert (is_replayed(first), is_replayed(response), bot.calls) == (False, True, 1)
    assert get_exchange(response) == exchange == ada.list_messages(conversation_id)
    if repeat_headers == STREAM:
        assert join_deltas(read_events(response)) == "Reply 1!"
    else:
        assert response.status_code == 201


@each_way
@pytest.mark.parametrize("text", ["Hello!", "hello", "Hello "])
def test_repeat_with_other_text_returns_409(ada, bot, conversation_id, headers, text):
    exchange = send(ada, conversation_id).json
    response = send(ada, conversation_id, text, headers=headers)
    assert get_answer(response) == (409, {"error": "Idempotency-Key was used for another text in this conversation"})
    assert (ada.list_messages(conversation_id), bot.calls) == (exchange, 1)


def test_replay_and_refusal_change_nothing(ada, conversation_id):
    send(ada, conversation_id)
    path = f"/api/conversations/{conversation_id}"
    ada.patch(path, json={"archived": True})
    before = ada.get(path)
    send(ada, conversation_id)
    send(ada, conversation_id, "Other")
    after = ada.get(path)
    assert (after.json, after.headers["ETag"]) == (before.json, before.headers["ETag"])


@pytest.mark.parametrize("key", ["", "x" * 256, "a b", " ", "a\tb", "a\x7f", "schlüssel", "\u00a0"])
@each_way
@on_sqlite
def test_send_with_invalid_key_returns_400(app, ada, bot, conversation_id, headers, key):
    response = send(ada, conversation_id, key=key, headers=headers)
    assert get_answer(response) == (400, {"error": "Idempotency-Key must be 1 to 255 visible ASCII characters"})
    assert (bot.calls, count_messages(app)) == (0, 0)


def test_keys_differ_by_any_visible_ascii_character_and_case(ada, bot, conversation_id):
    keys = ["x", "X", "x" * 255, "6f1c0c3e-8a3b-4a40-9c4c-0d2c5f6a7b8c", "!\"#$%&'()*+,-./:;<=>?@[]^_`{|}~"]
    exchanges = [send(ada, conversation_id, key=key).json for key in keys]
    assert [send(ada, conversation_id, key=key).json for key in reversed(keys)] == exchanges[::-1]
    assert bot.calls == len(keys)


def test_key_belongs_to_conversation(ada, bob, bot, conversation_id):
    other_id = ada.create_conversation()
    first, second = send(ada, conversation_id).json, send(ada, other_id, "Another text").json
    assert send(ada, conversation_id).json == first
    assert send(ada, other_id, "Another text").json == second
    assert (is_replayed(send(bob, bob.create_conversation())), bot.calls) == (False, 3)


# Repeats of what failed


@pytest.mark.parametrize("has_text", [True, False], ids=["after the first chunk", "before the first chunk"])
@each_way
def test_repeat_after_failure_gets_another_reply(ada, bot, conversation_id, second_client, has_text, headers):
    (bot.cuts if has_text else bot.failures).append(BotError("down"))
    send(ada, conversation_id, headers=headers)
    question, failed = wait_for_end(ada, conversation_id)
    assert (failed["text"], failed["status"]) == ("Reply 1" if has_text else "", "failed")
    assert not is_replayed(send(second_client, conversation_id, headers=headers))
    _, reply = exchange = wait_for_end(ada, conversation_id)
    assert exchange == [question, {**reply, "text": "Reply 2!"}]
    assert ada.list_versions(conversation_id, reply["id"]).json == [failed, reply]
    assert (get_exchange(send(second_client, conversation_id)), bot.calls) == (exchange, 2)


def test_repeat_that_fails_again_is_kept_as_another_version(ada, bot, conversation_id):
    bot.cuts, bot.failures = [BotError("cut")], [BotTimeout("stalled"), BotError("down")]
    assert [send(ada, conversation_id).status_code for _ in range(4)] == [504, 502, 201, 201]
    _, reply = ada.list_messages(conversation_id)
    assert get_texts(ada.list_versions(conversation_id, reply["id"]).json) == ["", "", "Reply 3", "Reply 4!"]


@each_way
def test_repeat_after_failure_that_something_followed_returns_it(ada, bot, conversation_id, headers):
    bot.cuts = [BotError("cut")]
    exchange = send(ada, conversation_id).json
    later = ada.send_message(conversation_id, "Later").json
    response = send(ada, conversation_id, headers=headers)
    if headers == STREAM:
        assert read_events(response)[-1][:2] == ("error", {"error": exchange[1]["error"]})
    else:
        assert get_answer(response) == (201, exchange)
    assert (ada.list_messages(conversation_id), is_replayed(response), bot.calls) == (exchange + later, True, 2)


def test_repeat_after_stop_returns_stopped_reply(ada, bot, gate, conversation_id):
    gate.clear()
    _, reply = send(ada, conversation_id, headers=ASYNC).json
    wait_for_text(ada, conversation_id, reply["id"], "Reply 1")
    stopped = ada.stop_reply(conversation_id, reply["id"]).json
    response = send(ada, conversation_id)
    assert (is_replayed(response), response.json[1], bot.calls) == (True, stopped, 1)


def test_repeat_after_its_process_was_killed_gets_another_reply(app, ada, conversation_id, other_process):
    ids = list(add_abandoned_exchange(app, conversation_id))
    execute(app, "UPDATE message SET idempotency_key = 'key' WHERE sender = 'user'")
    response = send(other_process, conversation_id, "Killed")
    question, reply = ada.list_messages(conversation_id)
    assert (get_answer(response), is_replayed(response)) == ((201, [question, reply]), False)
    assert (question["id"], reply["text"]) == (ids[0], "Reply 1!")
    assert get_ids(ada.list_versions(conversation_id, ids[1]).json) == [ids[1], reply["id"]]


# Edits


@pytest.mark.parametrize("text", ["Edited", "Hello"], ids=["other text", "same text"])
def test_repeated_edit_returns_stored_exchange(ada, bot, conversation_id, second_client, text):
    edit = (conversation_id, ada.send_message(conversation_id).json[0]["id"])
    first, repeated = (client.edit_message(*edit, text, headers=KEY) for client in (ada, second_client))
    assert get_answer(repeated) == (200, first.json)
    assert (is_replayed(first), is_replayed(repeated), bot.calls) == (False, True, 2)
    assert second_client.edit_message(*edit, "Other", headers=KEY).status_code == 409


@pytest.mark.parametrize("text", ["Edited", "Hello"], ids=["other text", "same text"])
def test_repeats_of_an_edit_that_failed_return_the_reply_that_the_first_of_them_got(ada, bot, conversation_id, text):
    edit = (conversation_id, ada.send_message(conversation_id).json[0]["id"], text)
    bot.failures.append(BotError("down"))
    assert ada.edit_message(*edit, headers=KEY).status_code == 502
    exchange = ada.edit_message(*edit, headers=KEY).json
    assert get_answer(ada.edit_message(*edit, headers=KEY)) == (200, exchange)
    assert (exchange[1]["text"], bot.calls) == ("Reply 3!", 3)


def test_key_of_an_edited_message_goes_on_belonging_to_it(ada, bot, conversation_id):
    exchange = send(ada, conversation_id).json
    edited = ada.edit_message(conversation_id, exchange[0]["id"], "Edited").json
    response = send(ada, conversation_id)
    assert (response.status_code, is_replayed(response), response.json) == (201, True, exchange)
    assert send(ada, conversation_id, "Edited").status_code == 409
    assert ada.list_messages(conversation_id) == edited


# Repeats while the reply is in progress


def test_repeat_while_reply_is_in_progress_joins_it(ada, bot, gate, conversation_id, second_client):
    gate.clear()
    exchange = send(ada, conversation_id, headers=ASYNC).json
    repeated = send(second_client, conversation_id, headers=ASYNC)
    assert (repeated.status_code, is_replayed(repeated), get_ids(repeated.json)) == (202, False, get_ids(exchange))
    other = create_other_client(second_client)
    with run_in_background(
        lambda: send(second_client, conversation_id), lambda: send(other, conversation_id, headers=STREAM)
    ) as [waiting, streaming]:
        gate.set()
    exchange = ada.list_messages(conversation_id)
    assert get_texts(exchange) == ["Hello", "Reply 1!"]
    assert get_answer(waiting.result()) == (201, exchange)
    assert get_exchange(streaming.result()) == exchange
    assert (join_deltas(read_events(streaming.result())), bot.calls) == ("Reply 1!", 1)


@pytest.fixture
def clients(ada, other_process):
    """Clients with the session of ada, alternately at two processes."""
    return [create_other_client(client) for client in (ada, other_process) * 4]


@each_way
def test_concurrent_sends_with_one_key_ask_bot_once(ada, bot, conversation_id, clients, headers):
    responses = run_concurrently(8, lambda number: send(clients[number], conversation_id, headers=headers))
    exchange = wait_for_end(ada, conversation_id)
    assert [get_ids(get_exchange(response)) for response in responses] == [get_ids(exchange)] * 8
    assert (len(exchange), bot.calls) == (2, 1)


def test_concurrent_sends_with_one_key_to_failing_bot_never_overlap(ada, bot, conversation_id, clients):
    bot.failures = [BotError("down")] * 24

    def send_until_done(number):
        """Repeat a send as long as the bot fails; return the exchange."""
        while (response := send(clients[number], conversation_id)).status_code == 502:
            """Send again."""
        assert response.status_code == 201, response.json
        return response.json

    exchanges = run_concurrently(8, send_until_done)
    assert (exchanges, bot.most_running) == ([ada.list_messages(conversation_id)] * 8, 1)
