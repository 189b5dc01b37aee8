"""Conversations and their messages: list, create, rename, delete, send."""

import itertools
import re
from contextlib import contextmanager
from datetime import UTC, datetime

import pytest
from sqlalchemy import event, text

from app import db
from app.models.conversation import LISTS, ListCache
from tests.conftest import PASSWORD, newcomer, statements
from tests.serving import together

MISSING = (404, {"error": "Conversation not found"})
ODD_TEXTS = [
    *(
        "a",
        " a ",
        "😀👩‍👩‍👧‍👦",
        "مرحبا",
        "e\u0301",
        "\u00e9",
        "\ufeff",
        "\ufffe\uffff",
        "\U0010ffff",
        "a\u2028b\u2029c",
    ),
    *('"', "\\", '\\"', "\\u0041", "\\\\n", "'", "''", "%s %(a)s :a ?", "{}", "[]", "null", "0", "</script>", "&lt;"),
    *("\x01", "\b\f\n\r\t\v", "\x1b[31m", "\x7f\x80\x9f", "a\r\nb", "'; DROP TABLE message; --"),
]


def answer(response):
    return response.status_code, response.json


def another_device(app, person):
    client = app.test_client()
    client.set_cookie("session", person.session_cookie)
    client.user_id = person.user_id
    return client


def talks(client):
    return client.get("/api/conversations").json


@contextmanager
def once(name, act):
    """At the next event of that name in a database session, have `act` done by another thread, whole."""
    pending = [act]

    def listener(*args):
        if pending:
            together(pending.pop())

    event.listen(db.session, name, listener)
    yield
    event.remove(db.session, name, listener)
    assert not pending


@pytest.fixture
def while_thinking(app):
    """A function that has `act` done by another thread while the bot thinks."""

    def install(act):
        def bot(history):
            together(act)
            yield "Well."

        app.extensions["bot"] = bot

    return install


@pytest.fixture
def echo(app):
    """A bot that says just what it is told."""
    app.extensions["bot"] = lambda history: iter([history[-1][1]])


# The documented answers


def test_a_conversation_is_created_empty(ada):
    assert talks(ada) == []
    assert answer(ada.post("/api/conversations", json={"name": "Tea"})) == (201, {"id": 1, "name": "Tea"})
    assert answer(ada.get("/api/conversations")) == (200, [{"id": 1, "name": "Tea", "messages": []}])


def test_a_conversation_is_renamed(ada):
    tea, ink = ada.create("Tea"), ada.create("Ink")
    assert answer(ada.put(f"/api/conversations/{ink}", json={"name": "Oil"})) == (200, {"id": ink, "name": "Oil"})
    assert [(talk["id"], talk["name"]) for talk in talks(ada)] == [(tea, "Tea"), (ink, "Oil")]


def test_a_conversation_is_deleted_with_its_messages(ada):
    tea, ink = ada.create(), ada.create()
    ada.send(tea)
    ada.send(ink)
    response = ada.delete(f"/api/conversations/{tea}")
    assert (response.status_code, response.data) == (204, b"")
    assert [(talk["id"], len(talk["messages"])) for talk in talks(ada)] == [(ink, 2)]
    assert answer(ada.delete(f"/api/conversations/{tea}")) == MISSING


def test_a_message_is_answered_by_the_bot(ada, echo):
    talk = ada.create()
    began = datetime.now(UTC)
    response = ada.send(talk, "Hello")
    ended = datetime.now(UTC)

    assert response.status_code == 201
    user, bot = response.json
    assert user == {"id": 1, "sender": "user", "text": "Hello", "created_at": user["created_at"]}
    assert bot == {"id": 2, "sender": "bot", "text": "Hello", "created_at": bot["created_at"]}
    assert user["created_at"][-1] == bot["created_at"][-1] == "Z"
    moments = [began, *(datetime.fromisoformat(message["created_at"]) for message in response.json), ended]
    assert moments == sorted(moments)
    assert talks(ada)[0]["messages"] == response.json


def test_conversations_and_messages_are_listed_oldest_first(ada):
    ids = [ada.create(f"Talk {n}") for n in range(5)]
    for n in (3, 1, 3, 0, 1, 3):
        ada.send(ids[n], f"in {n}")
    ada.put(f"/api/conversations/{ids[0]}", json={"name": "Renamed"})
    assert [talk["id"] for talk in talks(ada)] == sorted(ids)
    assert [talk["name"] for talk in talks(ada)] == ["Renamed", "Talk 1", "Talk 2", "Talk 3", "Talk 4"]
    for n, talk in enumerate(talks(ada)):
        message_ids = [message["id"] for message in talk["messages"]]
        assert message_ids == sorted(message_ids)
        assert {message["text"] for message in talk["messages"] if message["sender"] == "user"} <= {f"in {n}"}
    assert [len(talk["messages"]) for talk in talks(ada)] == [2, 4, 0, 6, 0]


def test_the_bot_hears_what_was_said_before(app, ada):
    heard = []

    def bot(history):
        heard.append(history)
        yield from ("So", " so")

    app.extensions["bot"] = bot
    talk, other = ada.create(), ada.create()
    ada.send(other, "Elsewhere")
    ada.send(talk, "One")
    ada.send(talk, "Two")
    assert heard[1:] == [[("user", "One")], [("user", "One"), ("bot", "So so"), ("user", "Two")]]


# Bounds


@pytest.mark.parametrize(
    ("method", "path", "field", "longest", "status"),
    [
        ("POST", "/api/conversations", "name", 255, 201),
        ("PUT", "/api/conversations/1", "name", 255, 200),
        ("POST", "/api/conversations/1/messages", "text", 100_000, 201),
    ],
)
def test_names_and_texts_have_bounds(ada, method, path, field, longest, status):
    ada.create("Talk")
    for good in ("a", " a ", "😀" * longest):
        assert ada.open(path, method=method, json={field: good}).status_code == status
    before = talks(ada)
    refusal = (400, {"error": f"{field} must be 1 to {longest} characters long and not blank"})
    for bad in ("", " ", "\t\r\n", "\u00a0\u2003\u3000\u2028", "a" * (longest + 1)):
        assert answer(ada.open(path, method=method, json={field: bad})) == refusal
    assert talks(ada) == before


def test_names_come_back_as_they_were(ada):
    ids = [ada.create(name) for name in ODD_TEXTS]
    assert [talk["name"] for talk in talks(ada)] == ODD_TEXTS
    renamed = [
        ada.put(f"/api/conversations/{id}", json={"name": name}) for id, name in zip(ids, ODD_TEXTS[::-1], strict=True)
    ]
    assert [response.json["name"] for response in renamed] == ODD_TEXTS[::-1]
    assert [talk["name"] for talk in talks(ada)] == ODD_TEXTS[::-1]


def test_texts_come_back_as_they_were(ada, echo):
    texts = [*ODD_TEXTS, "".join(ODD_TEXTS), "x" * 100_000, '\\"😀\n' * 20_000]
    talk = ada.create()
    sent = [ada.send(talk, said).json for said in texts]
    assert [[message["text"] for message in pair] for pair in sent] == [[said, said] for said in texts]
    assert talks(ada)[0]["messages"] == list(itertools.chain(*sent))


# Whose it is

ANY_BODY = {"name": "Mine now", "text": "Hello", "password": PASSWORD}
PUBLIC = {"auth.test", "auth.signup", "auth.login", "auth.users_status"}


def routes(app, blueprints=("auth.", "chat."), having=""):
    """Return (method, path with {} for an id) of the API's routes, except those that are open to all."""
    for rule in app.url_map.iter_rules():
        if rule.endpoint.startswith(blueprints) and rule.endpoint not in PUBLIC and having in rule.rule:
            for method in rule.methods - {"HEAD", "OPTIONS"}:
                yield method, re.sub("<.*?>", "{}", rule.rule)


def test_what_is_another_s_looks_like_what_is_not_there(app, ada, bob):
    talk = bob.create("Bob's")
    bob.send(talk)
    before = talks(bob)

    def ask(method, path, number):
        return ada.open(path.format(number), method=method, json=ANY_BODY)

    def looks(response):
        return response.status, response.data, {**response.headers, "X-Request-ID": None}

    asked = list(routes(app, having="<id:conversation_id>"))
    assert {method for method, path in asked} >= {"PUT", "DELETE", "POST"}
    for method, path in asked:
        assert answer(ask(method, path, talk)) == MISSING
        assert looks(ask(method, path, talk)) == looks(ask(method, path, talk + 1000))
    assert talks(bob) == before
    assert talks(ada) == []


@pytest.mark.parametrize("was_logged_in", [False, True])
def test_nothing_is_to_be_had_without_a_session(app, ada, client, was_logged_in):
    talk = ada.create("Talk")
    ada.send(talk)
    before = talks(ada)
    if was_logged_in:
        client = another_device(app, ada)
        ada.logout()
    asked = list(routes(app))
    assert len(asked) >= 7
    for method, path in asked:
        for number in (talk, 1000):
            response = client.open(path.format(number), method=method, json=ANY_BODY)
            assert answer(response) == (401, {"error": "Login required"}), (method, path)
    ada.login("ada")
    assert talks(ada) == before


def test_nobody_lists_another_s_conversations(ada, bob):
    mine, his = ada.create("Ada's"), bob.create("Bob's")
    assert [talk["id"] for talk in talks(ada)] == [mine]
    assert [talk["id"] for talk in talks(bob)] == [his]


def test_no_id_is_given_twice(ada):
    first, last = ada.create(), ada.create()
    last_message = ada.send(last).json[-1]["id"]
    ada.delete(f"/api/conversations/{last}")
    talk = ada.create()
    assert talk > last
    assert ada.send(talk).json[0]["id"] > last_message
    assert ada.send(last).status_code == 404
    assert [talk["id"] for talk in talks(ada)] == [first, talk]


# Lists that are read again


def test_a_list_shows_what_another_server_did_meanwhile(make_app):
    here, there = make_app(SECRET_KEY="the same"), make_app(SECRET_KEY="the same")
    ada = newcomer(here, "ada")
    elsewhere = another_device(there, ada)
    first, second = ada.create("First"), ada.create("Second")
    ada.send(first)
    ada.send(second)
    assert talks(ada) == talks(elsewhere)

    elsewhere.send(second)
    elsewhere.put(f"/api/conversations/{first}", json={"name": "Renamed"})
    elsewhere.send(elsewhere.create("Third"))
    elsewhere.create("Empty")
    shown = talks(ada)
    assert [(talk["name"], len(talk["messages"])) for talk in shown] == [
        *(("Renamed", 2), ("Second", 4), ("Third", 2), ("Empty", 0))
    ]
    assert shown == talks(elsewhere)

    elsewhere.delete(f"/api/conversations/{second}")
    assert [talk["name"] for talk in talks(ada)] == ["Renamed", "Third", "Empty"]


def test_a_message_that_is_stored_later_than_one_of_a_higher_id_is_listed(app, ada):
    first, second = ada.create(), ada.create()
    insert = (
        "INSERT INTO message (id, sender, text, conversation_id, created_at) SELECT :id, 'bot', 'Late', id, created_at"
    )
    for id, talk in ((1000, second), (500, first)):
        with app.app_context():
            db.session.execute(text(f"{insert} FROM conversation WHERE id = :talk"), {"id": id, "talk": talk})
            db.session.commit()
        shown = {talk["id"]: [message["id"] for message in talk["messages"]] for talk in talks(ada)}
        assert shown[talk] == [id]
    assert shown == {first: [500], second: [1000]}


def test_each_list_says_how_many_messages_it_shows_whichever_was_read_before(ada):
    talk = ada.create()
    for n in range(3):
        ada.send(talk, f"{n}")
    whole = talks(ada)[0]["messages"]
    for number in (2, 0, 4, 2, 100):
        [shown] = ada.get(f"/api/conversations?messages={number}").json
        assert shown["messages"] == (whole[-number:] if number else [])
        assert talks(ada)[0]["messages"] == whole


def test_what_is_changed_by_hand_shows_within_a_minute(app, ada, monkeypatch):
    def shown():
        return [message["text"] for talk in talks(ada) for message in talk["messages"]]

    talk = ada.create()
    ada.send(talk, "Before")
    assert shown()[0] == "Before"
    with app.app_context():
        db.session.execute(text("UPDATE message SET text = 'After' WHERE sender = 'user'"))
        db.session.commit()
    assert shown()[0] == "Before"  # messages that were read lately are not read again
    assert (ListCache.LIFETIME, ListCache.ROOM) == (60, 32 * 2**20)  # as the README says
    monkeypatch.setattr(ListCache, "LIFETIME", 0)
    assert shown()[0] == "After"


@pytest.mark.parametrize("room", [0, 700, 2000])
def test_a_list_is_right_however_little_room_there_is_to_keep_it(app, ada, bob, echo, monkeypatch, room):
    monkeypatch.setattr(ListCache, "ROOM", room)
    people = {"ada": (ada, ada.create()), "bob": (bob, bob.create())}
    with app.app_context():
        cache = LISTS.setdefault(db.engine, ListCache())
    sizes = set()
    for n in range(6):
        for name, (person, talk) in people.items():
            person.send(talk, f"{name} {n}")
            for _ in range(2):
                [shown] = talks(person)
                said = [message["text"] for message in shown["messages"]]
                assert said == [f"{name} {k}" for k in range(n + 1) for _ in range(2)]
                kept = [messages for listed, _ in cache.lists.values() for _, messages in listed.values()]
                assert sum(map(len, kept)) + ListCache.OVERHEAD * len(kept) == cache.size <= room
                sizes.add(cache.size)
    assert (sizes == {0}) == (room == 0)


def test_a_list_that_there_is_no_room_for_pushes_out_no_other(app, ada, bob, monkeypatch):
    monkeypatch.setattr(ListCache, "ROOM", 1000)
    with app.app_context():
        cache = LISTS.setdefault(db.engine, ListCache())
    ada.create()
    assert len(talks(ada)) == 1
    kept = dict(cache.lists)
    assert list(kept) == [ada.user_id]
    for _ in range(10):
        bob.create()
    assert len(talks(bob)) == 10
    assert cache.lists == kept


# What it costs


def test_a_send_takes_two_statements(app, ada):
    talk = ada.create()
    ada.send(talk)
    with statements(app) as sent:
        assert ada.send(talk).status_code == 201
    assert [statement.split()[0] for statement in sent] == ["SELECT", "WITH"]
    assert ["INSERT INTO message" in statement for statement in sent] == [False, True]


def test_listing_takes_as_many_statements_for_fifty_conversations_as_for_two(app, ada):
    def cost():
        with statements(app) as sent:
            assert ada.get("/api/conversations").status_code == 200
        return len(sent)

    for _ in range(2):
        ada.send(ada.create())
    few = cost()
    for _ in range(48):
        ada.create()
    assert len(talks(ada)) == 50
    assert cost() == few


def test_a_hundred_thousand_messages_are_deleted_by_one_statement(app, ada):
    talk, other = ada.create(), ada.create()
    ada.send(talk)
    ada.send(other)
    many = """
        WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100000)
        INSERT INTO message (sender, text, conversation_id, created_at)
        SELECT 'user', 'Hello', id, created_at FROM conversation, n WHERE id = :talk
    """
    count = "SELECT count(*) FROM message"
    with app.app_context():
        db.session.execute(text(many), {"talk": talk})
        db.session.commit()
        assert db.session.scalar(text(count)) == 100_004

    with statements(app) as sent:
        assert ada.delete(f"/api/conversations/{talk}").status_code == 204
    assert [statement.split()[0] for statement in sent].count("DELETE") == 1
    assert not [statement for statement in sent if "FROM message" in statement]
    with app.app_context():
        assert db.session.scalar(text(count)) == 2
    assert [len(talk["messages"]) for talk in talks(ada)] == [2]


# Meanwhile


def test_nothing_is_stored_when_the_conversation_is_deleted_while_the_bot_thinks(app, ada, while_thinking):
    talk, phone = ada.create(), another_device(app, ada)
    while_thinking(lambda: phone.delete(f"/api/conversations/{talk}"))
    assert answer(ada.send(talk)) == MISSING
    with app.app_context():
        assert db.session.scalar(text("SELECT count(*) FROM message")) == 0


@pytest.mark.parametrize("comes_back", [False, True])
def test_nothing_is_stored_when_the_user_logs_out_while_the_bot_thinks(app, ada, while_thinking, comes_back):
    talk, phone = ada.create(), another_device(app, ada)
    while_thinking(lambda: (phone.logout(), comes_back and phone.login("ada")))
    assert answer(ada.send(talk)) == (401, {"error": "Login required"})
    ada.login("ada")
    assert talks(ada) == [{"id": talk, "name": "Talk", "messages": []}]


def test_a_rename_while_the_bot_thinks_holds(app, ada, while_thinking):
    talk, phone = ada.create("Old"), another_device(app, ada)
    while_thinking(lambda: phone.put(f"/api/conversations/{talk}", json={"name": "New"}))
    pair = ada.send(talk).json
    assert talks(ada) == [{"id": talk, "name": "New", "messages": pair}]


def test_no_connection_is_held_while_the_bot_thinks(app, ada):
    held = []

    def bot(history):
        held.append(db.engine.pool.checkedout())
        yield "Well,"
        held.append(db.engine.pool.checkedout())
        yield " well."

    app.extensions["bot"] = bot
    assert ada.send(ada.create()).json[1]["text"] == "Well, well."
    assert held == [0, 0]


def test_a_bot_that_crashes_leaves_nothing_behind(app, ada):
    def bot(history):
        yield "I am"
        raise RuntimeError("a secret")

    app.extensions["bot"] = bot
    talk = ada.create()
    assert answer(ada.send(talk)) == (500, {"error": "Internal server error"})
    assert talks(ada) == [{"id": talk, "name": "Talk", "messages": []}]


def test_a_rename_overtaken_by_a_delete_finds_nothing(app, ada):
    talk, phone = ada.create(), another_device(app, ada)
    with once("before_flush", lambda: phone.delete(f"/api/conversations/{talk}")):
        response = ada.put(f"/api/conversations/{talk}", json={"name": "New"})
    assert answer(response) == MISSING
    assert talks(ada) == []


def test_a_delete_overtaken_by_a_delete_is_done(app, ada):
    talk, phone = ada.create(), another_device(app, ada)
    with once("before_flush", lambda: phone.delete(f"/api/conversations/{talk}")):
        response = ada.delete(f"/api/conversations/{talk}")
    assert response.status_code in (204, 404)
    assert talks(ada) == []


def test_what_was_created_or_renamed_is_told_even_if_it_is_deleted_at_once(app, ada):
    phone = another_device(app, ada)
    talk = ada.create()
    with once("after_commit", lambda: phone.delete(f"/api/conversations/{talk}")):
        renamed = ada.put(f"/api/conversations/{talk}", json={"name": "New"})
    assert answer(renamed) == (200, {"id": talk, "name": "New"})
    with once("after_commit", lambda: phone.delete(f"/api/conversations/{talk + 1}")):
        created = ada.post("/api/conversations", json={"name": "Brief"})
    assert answer(created) == (201, {"id": talk + 1, "name": "Brief"})
    assert talks(ada) == []


def test_pairs_stay_whole_and_together_whoever_else_is_sending(app, ada, echo):
    talk = ada.create()

    def send_twenty(name, client):
        return [client.send(talk, f"{name}-{n}").json for n in range(20)]

    devices = [another_device(app, ada) for _ in range(16)]
    sent = together(
        *[lambda name=name, client=client: send_twenty(name, client) for name, client in enumerate(devices)]
    )
    stored = talks(ada)[0]["messages"]

    ids = [message["id"] for message in stored]
    assert ids == sorted(set(ids))
    pairs = [stored[n : n + 2] for n in range(0, len(stored), 2)]
    assert pairs == sorted(itertools.chain(*sent), key=lambda pair: pair[0]["id"])
    assert [[message["sender"] for message in pair] for pair in pairs] == [["user", "bot"]] * 320
    assert [user["text"] for user, bot in pairs] == [bot["text"] for user, bot in pairs]
    for name in range(16):
        said = [user["text"] for user, bot in pairs if user["text"].startswith(f"{name}-")]
        assert said == [f"{name}-{n}" for n in range(20)]


def test_users_talk_at_once_without_mixing(app, echo):
    people = [newcomer(app, f"user {n}") for n in range(6)]

    def talk_about(topic, person):
        talk = person.create(topic)
        for n in range(5):
            assert person.send(talk, f"{topic} {n}").status_code == 201

    together(*[lambda n=n, person=person: talk_about(f"topic {n}", person) for n, person in enumerate(people)])
    for n, person in enumerate(people):
        (talk,) = talks(person)
        said = [f"topic {n} {i}" for i in range(5) for _ in ("user", "bot")]
        assert [message["text"] for message in talk["messages"]] == said
