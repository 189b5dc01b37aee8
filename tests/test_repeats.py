"""Sends that never double: the same Idempotency-Key, the same answer."""

import threading

import pytest
from sqlalchemy import event

from app import db
from app.bot import BotError
from tests.serving import PATIENCE, crowd, together
from tests.test_streams import STREAM, Listener, scripted, stored, stream

BOTH = pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])


@pytest.fixture
def asked(app):
    """What the bot was asked, send by send; it never says the same again."""
    asked = []

    def bot(history):
        asked.append(history[-1][1])
        yield f"Reply {len(asked)}"

    app.extensions["bot"] = bot
    return asked


@pytest.fixture
def talk(ada):
    return ada.create()


def send(person, talk, text="Hello", key="once", streams=False):
    return person.send(talk, text, headers={"Idempotency-Key": key, **(STREAM if streams else {})})


def replayed(response):
    """Return the pair of a whole answer that must be a replay."""
    assert (response.status_code, response.headers.get("Idempotent-Replayed")) == (201, "true")
    return response.json


def test_a_repeated_send_gets_the_stored_pair_without_asking_the_bot(ada, talk, asked):
    first = send(ada, talk)
    assert first.status_code == 201
    assert "Idempotent-Replayed" not in first.headers
    assert replayed(send(ada, talk)) == replayed(send(ada, talk)) == first.json
    assert ada.get(f"/api/conversations/{talk}").json["messages"] == first.json
    assert asked == ["Hello"]


def test_a_repeated_stream_is_done_at_once(ada, talk, asked):
    first = send(ada, talk, streams=True)
    assert "Idempotent-Replayed" not in first.headers
    assert first.text.startswith("event: delta\n")
    again = send(ada, talk, streams=True)
    assert (again.status_code, again.headers["Idempotent-Replayed"]) == (200, "true")
    assert again.mimetype == "text/event-stream"
    assert again.headers["X-Accel-Buffering"] == "no"
    assert again.text == first.text[first.text.index("event: done") :]
    assert asked == ["Hello"]


@BOTH
def test_a_send_may_be_repeated_in_the_other_way(ada, talk, asked, streams):
    assert send(ada, talk, streams=streams).text
    pair = ada.get(f"/api/conversations/{talk}").json["messages"]
    assert replayed(send(ada, talk)) == pair
    assert stream(ada, talk, **{"Idempotency-Key": "once"}) == [("done", pair)]
    assert asked == ["Hello"]


@BOTH
def test_the_same_key_with_another_text_is_refused(app, ada, talk, asked, streams):
    send(ada, talk)
    for text in ("Hello!", "hello", "Hello "):
        response = send(ada, talk, text, streams=streams)
        assert (response.status_code, list(response.json)) == (409, ["error"])
    assert asked == ["Hello"]
    assert stored(app) == 2


@pytest.mark.parametrize("key", ["", "x" * 256, "a b", " ", "a\tb", "a\x7f", "schlüssel", "\u00a0"], ids=ascii)
@BOTH
def test_a_bad_key_is_refused(app, ada, talk, asked, key, streams):
    response = send(ada, talk, key=key, streams=streams)
    assert response.status_code == 400
    assert response.json == {"error": "Idempotency-Key must be 1 to 255 visible ASCII characters"}
    assert (asked, stored(app)) == ([], 0)


@pytest.mark.parametrize(
    "key", ["x", "x" * 255, "6f1c0c3e-8a3b-4a40-9c4c-0d2c5f6a7b8c", "!\"#$%&'()*+,-./:;<=>?@[]^_`{|}~"]
)
def test_any_visible_characters_are_a_key(ada, talk, asked, key):
    assert send(ada, talk, key=key).json == replayed(send(ada, talk, key=key))


def test_keys_differ_in_case(app, ada, talk, asked):
    assert send(ada, talk, key="Once").json != send(ada, talk, key="once").json
    assert stored(app) == 4


def test_a_key_counts_within_its_conversation(app, ada, talk, asked):
    other = ada.create()
    assert send(ada, talk).json[1]["text"] == "Reply 1"
    assert send(ada, other, "Another text").json[1]["text"] == "Reply 2"
    assert replayed(send(ada, talk))[1]["text"] == "Reply 1"
    assert replayed(send(ada, other, "Another text"))[1]["text"] == "Reply 2"
    assert stored(app) == 4


def test_a_key_opens_no_conversation_of_others(ada, bob, talk, asked):
    send(ada, talk)
    assert send(bob, talk).status_code == 404
    assert send(bob, bob.create()).json[1]["text"] == "Reply 2"


def test_a_key_opens_nothing_to_who_has_logged_out(ada, talk, asked):
    send(ada, talk)
    ada.logout()
    assert send(ada, talk).status_code == 401


def test_a_key_is_free_when_its_conversation_is_deleted(app, ada, talk, asked):
    send(ada, talk)
    ada.delete(f"/api/conversations/{talk}")
    assert send(ada, talk).status_code == 404
    again = send(ada, ada.create())
    assert (again.status_code, again.json[1]["text"]) == (201, "Reply 2")
    assert "Idempotent-Replayed" not in again.headers


def test_without_a_key_the_same_text_twice_is_two_pairs(app, ada, talk, asked):
    first, second = ada.send(talk), ada.send(talk)
    assert [first.json[1]["text"], second.json[1]["text"]] == ["Reply 1", "Reply 2"]
    assert "Idempotent-Replayed" not in second.headers
    assert stored(app) == 4


def test_a_replay_is_the_same_whatever_was_said_since(ada, talk, asked):
    keys = ["one", "two", "three"]
    pairs = {key: send(ada, talk, key, key).json for key in keys}
    ada.send(talk, "without a key")
    for key in reversed(keys):
        assert replayed(send(ada, talk, key, key)) == pairs[key]
    assert [message["id"] for pair in pairs.values() for message in pair] == [1, 2, 3, 4, 5, 6]


def test_what_else_is_wrong_is_told_before_a_replay(ada, talk, asked):
    send(ada, talk)
    path = f"/api/conversations/{talk}/messages"
    assert ada.post(path, json={}, headers={"Idempotency-Key": "once"}).status_code == 400
    assert ada.post(path, data="Hello", headers={"Idempotency-Key": "once"}).status_code == 415


@BOTH
def test_a_send_that_failed_can_be_repeated_with_its_key(app, ada, talk, asked, streams):
    works, app.extensions["bot"] = app.extensions["bot"], scripted(BotError("down"))
    assert send(ada, talk, streams=streams).status_code == 502
    app.extensions["bot"] = works
    again = send(ada, talk)
    assert (again.status_code, again.json[1]["text"]) == (201, "Reply 1")
    assert "Idempotent-Replayed" not in again.headers
    assert stored(app) == 2


@BOTH
def test_what_a_bot_said_before_it_broke_off_is_what_a_repeat_gets(app, ada, talk, asked, streams):
    works, app.extensions["bot"] = app.extensions["bot"], scripted("One ", "two", BotError("cut"))
    assert "event: error\n" in send(ada, talk, streams=True).text
    app.extensions["bot"] = works
    again = send(ada, talk, streams=streams)
    assert again.headers["Idempotent-Replayed"] == "true"
    assert '"One two"' in again.text
    assert asked == []


def test_what_was_said_to_a_client_that_went_away_is_what_a_repeat_gets(app, ada, talk, asked):
    over = threading.Event()
    works, app.extensions["bot"] = app.extensions["bot"], scripted("One ", lambda: over.wait(PATIENCE))
    with send(ada, talk, streams=True) as response:
        assert next(response.iter_encoded())
    over.set()
    app.extensions["bot"] = works
    assert replayed(send(ada, talk))[1]["text"] == "One "
    assert asked == []


@pytest.mark.parametrize("streaming", [0, 1, 2], ids=["both whole", "one a stream", "both streams"])
def test_two_at_once_get_one_pair_though_the_bot_says_two_things(app, ada, talk, streaming):
    both = threading.Barrier(2)

    def bot(history):
        yield f"Reply {both.wait(PATIENCE)}"

    app.extensions["bot"] = bot
    cookie = ada.session_cookie

    def act(number):
        person = app.test_client()
        person.set_cookie("session", cookie)
        if number < streaming:
            return stream(person, talk, **{"Idempotency-Key": "once"})[-1][1]
        return send(person, talk).json

    one, other = crowd(2, act)
    assert one == other == ada.get(f"/api/conversations/{talk}").json["messages"]
    assert stored(app) == 2


def test_of_two_at_once_with_different_texts_one_is_refused(app, ada, talk):
    both = threading.Barrier(2)
    app.extensions["bot"] = scripted(lambda: both.wait(PATIENCE), "Reply")
    cookie = ada.session_cookie

    def act(number):
        person = app.test_client()
        person.set_cookie("session", cookie)
        return send(person, talk, f"Text {number}").status_code

    assert sorted(crowd(2, act)) == [201, 409]
    assert stored(app) == 2


@BOTH
def test_of_two_at_once_the_later_finds_nothing_if_the_conversation_is_deleted_just_then(app, ada, talk, streams):
    other = app.test_client()
    other.set_cookie("session", ada.session_cookie)

    def bot(history):
        app.extensions["bot"] = scripted("Reply")
        together(lambda: send(other, talk))
        yield "Later"

    def delete(context):
        together(lambda: other.delete(f"/api/conversations/{talk}"))

    app.extensions["bot"] = bot
    with app.app_context():
        event.listen(db.engine, "handle_error", delete)
    answer = send(ada, talk, streams=streams)
    if streams:
        assert answer.text.endswith('event: error\ndata: {"error":"Conversation not found"}\n\n')
    else:
        assert (answer.status_code, answer.json) == (404, {"error": "Conversation not found"})
    assert stored(app) == 0


def test_sixteen_at_once_on_two_workers_get_one_pair(serve):
    server = serve()
    with server.newcomer("ada") as ada:
        talk = ada.create()

        def act(key, number):
            if number % 2:
                with Listener(server, ada, talk, "/slow 1", **{"Idempotency-Key": key}) as listener:
                    *_, (name, pair) = listener
                    assert name == "done"
                    return 201, pair
            with server.spare_client(ada) as client:
                answer = client.send(talk, "/slow 1", Idempotency_Key=key)
                return answer.status, answer.json

        for size, key in ((2, "two"), (16, "sixteen")):
            first, *others = crowd(size, lambda number, key=key: act(key, number))
            assert first[0] == 201
            assert others == [first] * (size - 1)
            assert ada.messages(talk)[-2:] == first[1]
        assert len(ada.messages(talk)) == 4
    assert "Traceback" not in server.output
