"""Sends with an Idempotency-Key: one exchange for a key, and never two calls of the bot for it at a time."""

import threading

import pytest

from app.bot import BotError, BotTimeout
from tests.conftest import SHARED_SESSIONS, create_other_client, on_sqlite
from tests.helpers.bots import ASYNC, STREAM, WAYS, Gate, each_way, join_deltas, read_events, wait_for_end
from tests.helpers.data import add_abandoned_exchange, count_messages, execute, get_answer, get_ids, get_texts
from tests.helpers.server import run_concurrently, run_in_background, wait_until


class CountingBot:
    """A bot of one or more processes that replies with the number of the call, and counts calls at the same time."""

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


@pytest.fixture(params=["same process", "other process"])
def repeater(request, ada, other_app):
    """Another client with the session of ada, at the process that generates the first reply or at another one."""
    return create_other_client(ada, None if request.param == "same process" else other_app)


def send(client, conversation_id, text="Hello", key="key", headers=()):
    """Send a message with an Idempotency-Key."""
    return client.send_message(conversation_id, text, headers={"Idempotency-Key": key, **dict(headers)})


def edit(client, conversation_id, message_id, text="Edited", key="key", headers=()):
    """Edit a message with an Idempotency-Key."""
    return client.edit_message(conversation_id, message_id, text, headers={"Idempotency-Key": key, **dict(headers)})


def get_exchange(response):
    """Return the exchange of a response of any kind."""
    return response.json if response.is_json else read_events(response)[-1][1]


def is_replayed(response):
    return response.headers.get("Idempotent-Replayed") == "true"


@each_way
@pytest.mark.parametrize("repeat_headers", WAYS.values(), ids=WAYS)
def test_repeated_send_returns_stored_exchange(ada, bot, conversation_id, headers, repeat_headers):
    first = send(ada, conversation_id, headers=headers)
    exchange = wait_for_end(ada, conversation_id)
    response = send(ada, conversation_id, headers=repeat_headers)
    assert (is_replayed(first), is_replayed(response)) == (False, True)
    assert get_exchange(response) == exchange == ada.list_messages(conversation_id)
    if repeat_headers == STREAM:
        assert join_deltas(read_events(response)) == "Reply 1!"
    else:
        assert response.status_code == 201
    assert bot.calls == 1


def test_repeated_edit_without_another_text_returns_the_same_new_reply(ada, bot, conversation_id):
    message_id = ada.send_message(conversation_id).json[0]["id"]
    first, second = (edit(ada, conversation_id, message_id, "Hello") for _ in range(2))
    assert (is_replayed(first), is_replayed(second)) == (False, True)
    assert second.json == first.json
    assert bot.calls == 2
    assert get_answer(edit(ada, conversation_id, message_id, "Other"))[0] == 409


@each_way
@pytest.mark.parametrize("text", ["Hello!", "hello", "Hello "])
def test_repeat_with_other_text_returns_409(ada, bot, conversation_id, headers, text):
    exchange = send(ada, conversation_id).json
    response = send(ada, conversation_id, text, headers=headers)
    assert get_answer(response) == (409, {"error": "Idempotency-Key was used for another text in this conversation"})
    assert ada.list_messages(conversation_id) == exchange
    assert bot.calls == 1


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
    assert send(bob, conversation_id).status_code == 404
    assert not is_replayed(send(bob, bob.create_conversation()))
    assert bot.calls == 3


def test_sends_without_key_are_separate(ada, conversation_id):
    first, second = ada.send_message(conversation_id), ada.send_message(conversation_id)
    assert ada.list_messages(conversation_id) == first.json + second.json
    assert not is_replayed(second)


# Repeats of what failed


@pytest.mark.parametrize("has_text", [True, False], ids=["after the first chunk", "before the first chunk"])
@each_way
def test_repeat_after_failure_gets_another_reply(ada, bot, conversation_id, repeater, has_text, headers):
    (bot.cuts if has_text else bot.failures).append(BotError("down"))
    send(ada, conversation_id, headers=headers)
    question, failed = wait_for_end(ada, conversation_id)
    assert (failed["text"], failed["status"]) == ("Reply 1" if has_text else "", "failed")
    response = send(repeater, conversation_id, headers=headers)
    assert not is_replayed(response)
    _, reply = exchange = wait_for_end(ada, conversation_id)
    assert exchange == [question, {**reply, "text": "Reply 2!"}]
    assert ada.list_versions(conversation_id, reply["id"]).json == [failed, reply]
    assert get_exchange(send(repeater, conversation_id)) == exchange
    assert bot.calls == 2


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
    assert is_replayed(response)
    if headers == STREAM:
        assert read_events(response)[-1][:2] == ("error", {"error": exchange[1]["error"]})
    else:
        assert get_answer(response) == (201, exchange)
    assert ada.list_messages(conversation_id) == exchange + later
    assert bot.calls == 2


def test_repeat_after_stop_returns_stopped_reply(ada, bot, conversation_id):
    bot.gate.clear()
    _, reply = send(ada, conversation_id, headers=ASYNC).json
    wait_until(lambda: ada.get_message(conversation_id, reply["id"]).json["text"])
    stopped = ada.stop_reply(conversation_id, reply["id"]).json
    response = send(ada, conversation_id)
    assert (is_replayed(response), response.json[1]) == (True, stopped)
    assert bot.calls == 1


def test_repeat_after_its_process_was_killed_gets_another_reply(app, ada, bot, conversation_id, other_app):
    question_id, failed_id = add_abandoned_exchange(app, conversation_id)
    execute(app, "UPDATE message SET idempotency_key = 'key' WHERE sender = 'user'")
    response = send(create_other_client(ada, other_app), conversation_id, "Killed")
    assert (response.status_code, is_replayed(response)) == (201, False)
    assert response.json == ada.list_messages(conversation_id)
    assert (response.json[0]["id"], response.json[1]["text"]) == (question_id, "Reply 1!")
    assert get_ids(ada.list_versions(conversation_id, failed_id).json) == [failed_id, response.json[1]["id"]]


# Edits


def test_repeated_edit_returns_stored_exchange(ada, bot, conversation_id, repeater):
    question, _ = ada.send_message(conversation_id).json
    first = edit(ada, conversation_id, question["id"])
    response = edit(repeater, conversation_id, question["id"])
    assert (response.status_code, response.json) == (200, first.json)
    assert (is_replayed(first), is_replayed(response)) == (False, True)
    assert edit(repeater, conversation_id, question["id"], "Other").status_code == 409
    assert bot.calls == 2


def test_key_of_an_edited_message_goes_on_belonging_to_it(ada, bot, conversation_id):
    exchange = send(ada, conversation_id).json
    edited = ada.edit_message(conversation_id, exchange[0]["id"], "Edited").json
    response = send(ada, conversation_id)
    assert (response.status_code, is_replayed(response), response.json) == (201, True, exchange)
    assert send(ada, conversation_id, "Edited").status_code == 409
    assert ada.list_messages(conversation_id) == edited


# Repeats while the reply is in progress


def test_repeat_while_reply_is_in_progress_joins_it(ada, bot, conversation_id, repeater):
    bot.gate.clear()
    exchange = send(ada, conversation_id, headers=ASYNC).json
    repeated = send(repeater, conversation_id, headers=ASYNC)
    assert (repeated.status_code, is_replayed(repeated)) == (202, False)
    assert get_ids(repeated.json) == get_ids(exchange)
    clients = [create_other_client(repeater) for _ in range(2)]
    with run_in_background(
        lambda: send(clients[0], conversation_id), lambda: send(clients[1], conversation_id, headers=STREAM)
    ) as [waiting, streaming]:
        bot.gate.set()
    exchange = ada.list_messages(conversation_id)
    assert get_texts(exchange) == ["Hello", "Reply 1!"]
    assert get_answer(waiting.result()) == (201, exchange)
    assert get_exchange(streaming.result()) == exchange
    assert join_deltas(read_events(streaming.result())) == "Reply 1!"
    assert bot.calls == 1


def create_clients(client, other_app, count):
    """Return clients with the same session, alternately at two processes."""
    return [create_other_client(client, other_app if number % 2 else None) for number in range(count)]


@each_way
def test_concurrent_sends_with_one_key_ask_bot_once(ada, bot, conversation_id, other_app, headers):
    clients = create_clients(ada, other_app, 8)
    responses = run_concurrently(8, lambda number: send(clients[number], conversation_id, headers=headers))
    exchange = wait_for_end(ada, conversation_id)
    assert [get_ids(get_exchange(response)) for response in responses] == [get_ids(exchange)] * 8
    assert len(exchange) == 2
    assert bot.calls == 1


def test_concurrent_sends_with_one_key_to_failing_bot_never_overlap(ada, bot, conversation_id, other_app):
    clients = create_clients(ada, other_app, 8)
    for attempt in range(5):
        bot.failures = [BotError("down")] * 8

        def send_until_done(number, key=str(attempt)):
            """Repeat a send as long as the bot fails; return the exchange."""
            while (response := send(clients[number], conversation_id, key=key)).status_code == 502:
                """Send again."""
            assert response.status_code == 201, response.json
            return response.json

        exchanges = run_concurrently(8, send_until_done)
        assert exchanges == [ada.list_messages(conversation_id)[-2:]] * 8
    assert len(ada.list_messages(conversation_id)) == 10
    assert bot.most_running == 1
