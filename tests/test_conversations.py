"""Conversations and their messages: list, create, rename, delete, send; whose they are; what happens meanwhile."""

import re
from datetime import UTC, datetime
from itertools import chain

import pytest
from sqlalchemy import event

from app import db
from app.threads import run_long_query
from tests.conftest import PASSWORD, create_logged_in_client, create_other_client, echo, on_postgresql
from tests.helpers.data import add_conversations, execute, get_answer, get_ids, get_texts
from tests.helpers.server import run_all, run_concurrently

MAX_ID = 2**63 - 1
NOT_FOUND = (404, {"error": "Conversation not found"})
UNUSUAL_TEXTS = [
    *("a", " a ", "😀👩‍👩‍👧‍👦", "مرحبا", "e\u0301", "\u00e9", "a\ufeff", "\ufffe\uffffa", "\U0010ffffa"),
    *('"', "\\", '\\"', "\\u0041", "\\\\n", "'", "''", "%s %(a)s :a ?", "{}", "[]", "null", "0", "</script>", "&lt;"),
    *("\u0301", "\u00b7", "\u2063x", "❤\ufe0f", "1\ufe0f\u20e3", "｡", "a\u2028b\u2029c"),
    *("\x01a", "\b\f\n\r\t\va", "\x1b[31m", "\x7f\x80\x9fa", "a\r\nb", "'; DROP TABLE message; --", "😀" * 255),
]


# The documented responses


def test_create_conversation_returns_it_without_messages(ada):
    assert get_answer(ada.get("/api/conversations")) == (200, [])
    assert get_answer(ada.post("/api/conversations", json={"name": "Tea"})) == (201, {"id": 1, "name": "Tea"})
    assert get_answer(ada.get("/api/conversations")) == (200, [{"id": 1, "name": "Tea", "messages": []}])


def test_rename_conversation_changes_its_name_only(ada):
    tea, ink = ada.create_conversation("Tea"), ada.create_conversation("Ink")
    response = ada.put(f"/api/conversations/{ink}", json={"name": "Oil"})
    assert get_answer(response) == (200, {"id": ink, "name": "Oil"})
    assert [(item["id"], item["name"]) for item in ada.list_conversations()] == [(tea, "Tea"), (ink, "Oil")]


@pytest.mark.parametrize("body", [{"name": "Oil"}, {"archived": True}, {"name": "Oil", "archived": True, "other": 1}])
def test_patch_conversation_changes_what_is_given_and_returns_details(ada, body):
    path = f"/api/conversations/{ada.create_conversation('Ink')}"
    expected = {**ada.get(path).json, "name": body.get("name", "Ink"), "archived": body.get("archived", False)}
    messages = {"messages": expected.pop("messages")}
    for _ in range(2):
        assert get_answer(ada.patch(path, json=body)) == (200, expected)
    assert ada.get(path).json == {**expected, **messages}
    assert ada.patch(path, json={"archived": False}).json == {**expected, "archived": False}


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({}, "name or archived is required"),
        ({"title": "Oil"}, "name or archived is required"),
        ({"name": None, "archived": True}, "name must be a string"),
        *(({"name": "Oil", "archived": value}, "archived must be true or false") for value in (None, 1, "true")),
    ],
)
def test_invalid_patch_returns_400_and_changes_nothing(ada, body, error):
    path = f"/api/conversations/{ada.create_conversation('Ink')}"
    before = ada.get(path).json
    assert get_answer(ada.patch(path, json=body)) == (400, {"error": error})
    assert ada.get(path).json == before


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/messages", {"text": "Hello"}),
        ("PUT", "/messages/1", {"text": "Other"}),
        ("PUT", "/messages/1", {"text": "Hello"}),
        ("PUT", "/current", {"message_id": 1}),
    ],
)
def test_change_of_messages_brings_an_archived_conversation_back(ada, method, path, body):
    ada.send_message(ada.create_conversation())
    ada.patch("/api/conversations/1", json={"archived": True})
    assert ada.get("/api/conversations/1").json["archived"]
    assert ada.open(f"/api/conversations/1{path}", method=method, json=body).status_code < 300
    assert not ada.get("/api/conversations/1").json["archived"]


def test_delete_conversation_deletes_its_messages_only(app, ada):
    tea, ink = ada.create_conversation(), ada.create_conversation()
    ada.send_message(tea)
    exchange = ada.send_message(ink).json
    response = ada.delete(f"/api/conversations/{tea}")
    assert (response.status_code, response.data) == (204, b"")
    assert ada.list_conversations() == [{"id": ink, "name": "Conversation", "messages": exchange}]
    assert execute(app, "SELECT DISTINCT conversation_id FROM message") == [(ink,)]
    assert get_answer(ada.delete(f"/api/conversations/{tea}")) == NOT_FOUND


def test_send_message_returns_it_with_the_reply(echo_ada):
    conversation = echo_ada.create_conversation()
    started_at = datetime.now(UTC)
    response = echo_ada.send_message(conversation, "Hello")
    ended_at = datetime.now(UTC)
    times = [message["created_at"] for message in response.json]
    expected = [
        {"id": 1, "sender": "user", "text": "Hello", "created_at": times[0]},
        {"id": 2, "sender": "bot", "text": "Hello", "created_at": times[1]},
    ]
    assert get_answer(response) == (201, expected)
    assert [list(message) for message in response.json] == [list(message) for message in expected]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", time) for time in times)
    assert started_at <= datetime.fromisoformat(times[0]) <= datetime.fromisoformat(times[1]) <= ended_at
    assert echo_ada.list_messages(conversation) == response.json


def test_list_conversations_is_oldest_first_like_the_messages_in_it(echo_ada):
    ids = [echo_ada.create_conversation(f"Number {n}") for n in range(4)]
    exchanges = {id: [] for id in ids}
    for n in (3, 1, 3, 0, 1, 3):
        exchanges[ids[n]] += echo_ada.send_message(ids[n], f"In {n}").json
    assert echo_ada.list_conversations() == [
        {"id": id, "name": f"Number {n}", "messages": exchanges[id]} for n, id in enumerate(sorted(ids))
    ]


LONG_LISTS = {"many conversations": (130, 4, "Text"), "many messages": (2, 1001, "Text"), "long": (2, 4, "x" * 100_000)}


@pytest.mark.parametrize(("count", "messages", "text"), LONG_LISTS.values(), ids=LONG_LISTS)
def test_list_of_more_than_a_page_has_all_conversations_and_messages(app, ada, count, messages, text):
    ids = add_conversations(app, ada, count, messages)
    execute(app, "UPDATE message SET text = :text", text=text)
    conversations = ada.list_conversations()
    assert get_ids(conversations) == ids
    for conversation in conversations:
        assert get_texts(conversation["messages"]) == [text] * messages
        assert ada.list_messages(conversation["id"]) == conversation["messages"]


LONG_QUERIES = [
    *("conversations", "conversations?messages=1", "conversations?limit=1", "conversations?q=a", "messages?q=a"),
    *("conversations?limit=1&messages=0&q=a", "conversations/1", "conversations/1?messages=5"),
]


@pytest.mark.parametrize("query", LONG_QUERIES)
def test_list_with_messages_or_search_waits_for_other_long_queries_of_the_user(ada, bob, monkeypatch, query):
    monkeypatch.setattr("app.threads.MAX_WAIT", 0.05)
    ada.create_conversation()
    bob.create_conversation()
    other = create_other_client(ada)

    def list_again():
        short = ("?messages=0", "?messages=0&order=recent&limit=9", "/1?messages=0", "/1/messages")
        assert {other.get(f"/api/conversations{path}").status_code for path in short} == {200}
        assert bob.get(f"/api/{query.replace('/1', '/2')}").status_code == 200
        response = other.get(f"/api/{query}")
        return *get_answer(response), response.headers["Retry-After"]

    busy = (503, {"error": "The server is busy, try again later"}, "5")
    assert run_long_query(list_again, ada.user_id) == busy
    assert other.get(f"/api/{query}").status_code == 200


# Timestamps, where they are asked for


def test_list_conversations_with_a_parameter_shows_timestamps(ada):
    id = ada.create_conversation("Tea")
    conversation = ada.get(f"/api/conversations/{id}").json
    assert list(conversation) == ["id", "name", "archived", "created_at", "updated_at", "messages"]
    assert conversation["archived"] is False
    assert conversation["created_at"] == conversation["updated_at"]
    assert datetime.now(UTC) >= datetime.fromisoformat(conversation["created_at"])
    for query in ("limit=9", "limit=9&before=9", "messages=0", "q=tea", "q=", "order=recent", "archived=false"):
        assert ada.get(f"/api/conversations?{query}").json == [conversation], query


def test_updated_at_is_the_time_of_the_last_change_of_a_message(ada):
    id = ada.create_conversation()
    created = ada.get(f"/api/conversations/{id}").json
    sent = ada.send_message(id).json
    after_send = ada.get(f"/api/conversations/{id}").json
    assert created["created_at"] == after_send["created_at"]
    assert created["updated_at"] < after_send["updated_at"] <= sent[0]["created_at"]
    ada.put(f"/api/conversations/{id}", json={"name": "Renamed"})
    assert ada.get(f"/api/conversations/{id}").json == {**after_send, "name": "Renamed"}


# Unusual texts


def test_unusual_names_are_returned_unchanged(ada):
    ids = [ada.create_conversation(name) for name in UNUSUAL_TEXTS]
    assert [item["name"] for item in ada.list_conversations()] == UNUSUAL_TEXTS
    for id, name in zip(ids, reversed(UNUSUAL_TEXTS), strict=True):
        assert ada.put(f"/api/conversations/{id}", json={"name": name}).json["name"] == name


def test_unusual_texts_are_returned_unchanged(echo_ada):
    texts = [*UNUSUAL_TEXTS, "".join(UNUSUAL_TEXTS), "😀" * 100_000, '\\"😀\n' * 20_000 + "."]
    conversation = echo_ada.create_conversation()
    exchanges = [echo_ada.send_message(conversation, text).json for text in texts]
    assert [question["text"] for question, _ in exchanges] == texts
    blank = "\b\f\n\r\t\v "
    assert [reply["text"].lstrip(blank) for _, reply in exchanges] == [text.lstrip(blank) for text in texts]
    assert echo_ada.list_messages(conversation) == list(chain(*exchanges))


# Ids


def test_ids_are_not_reused(ada):
    first, last = ada.create_conversation(), ada.create_conversation()
    last_message_id = ada.send_message(last).json[-1]["id"]
    ada.delete(f"/api/conversations/{last}")
    new = ada.create_conversation()
    assert new > last
    assert ada.send_message(new).json[0]["id"] > last_message_id
    assert get_answer(ada.send_message(last)) == NOT_FOUND
    assert get_ids(ada.list_conversations()) == [first, new]


@pytest.mark.parametrize("id", [10**18 - 1, 10**18, MAX_ID])
def test_ids_below_2_63_can_be_used_in_paths(app, ada, id):
    now = "2026-01-31T12:00:00.000000Z"
    columns = "id, name, user_id, created_at, updated_at"
    execute(app, f"INSERT INTO conversation ({columns}) VALUES ({id}, 'Old', {ada.user_id}, '{now}', '{now}')")
    execute(
        app,
        f"""INSERT INTO message (id, sender, text, conversation_id, created_at, parent_id)
        VALUES ({id - 1}, 'user', 'Hello', {id}, '{now}', NULL), ({id}, 'bot', 'Hello', {id}, '{now}', {id - 1})""",
    )
    path = f"/api/conversations/{id}"
    assert get_ids(ada.list_conversations()) == [id]
    assert ada.put(path, json={"name": "New"}).json == {"id": id, "name": "New"}
    assert get_ids(ada.get(path).json["messages"]) == [id - 1, id]
    assert get_ids(ada.get(f"{path}/messages?before={id}").json) == [id - 1]
    assert ada.get_message(id, id).json["id"] == id
    assert ada.stop_reply(id, id).json["id"] == id
    assert ada.get(f"/api/conversations?limit=1&before={id}").json == []
    assert ada.delete(path).status_code == 204


# Whose they are

BODY = {"name": "Mine now", "text": "Hello", "message_id": 1}
BODY |= {"password": PASSWORD, "current_password": PASSWORD, "new_password": "x"}
CONVERSATION = "/api/conversations/{conversation_id}"
MESSAGE = f"{CONVERSATION}/messages/{{message_id}}"
CONVERSATION_ENDPOINTS = [
    *((method, CONVERSATION) for method in ("GET", "PUT", "PATCH", "DELETE")),
    *(("POST", f"{CONVERSATION}/title"), ("PUT", f"{CONVERSATION}/current")),
    *(("GET", f"{CONVERSATION}/messages"), ("POST", f"{CONVERSATION}/messages"), ("GET", MESSAGE), ("PUT", MESSAGE)),
    *(("GET", f"{MESSAGE}/versions"), ("GET", f"{MESSAGE}/events"), ("POST", f"{MESSAGE}/stop")),
]
LOGIN_REQUIRED = [
    *(("POST", "/api/logout/{user_id}"), ("GET", "/api/current_user"), ("PUT", "/api/password")),
    *(("DELETE", "/api/account"), ("GET", "/api/conversations"), ("POST", "/api/conversations")),
    *(("GET", "/api/messages"), *CONVERSATION_ENDPOINTS),
]
PUBLIC = [
    *(("GET", f"/api/{path}") for path in ("test", "health", "users/status")),
    *(("POST", f"/api/{path}") for path in ("signup", "login")),
]


def test_tables_of_endpoints_are_complete(app):
    endpoints = {
        (method, rule.rule.replace("<id:", "{").replace(">", "}"))
        for rule in app.url_map.iter_rules()
        for method in rule.methods - {"HEAD", "OPTIONS"}
        if rule.endpoint.startswith(("auth.", "chat."))
    }
    assert endpoints == {*PUBLIC, *LOGIN_REQUIRED}


def test_missing_and_another_users_conversation_return_the_same_404(ada, bob):
    bobs_id = bob.create_conversation("Bob's")
    message_id = bob.send_message(bobs_id).json[1]["id"]
    before = bob.list_conversations()
    for method, path in CONVERSATION_ENDPOINTS:
        urls = [path.format(conversation_id=id, message_id=message_id) for id in (bobs_id, bobs_id + 1000)]
        for headers in ({}, {"If-None-Match": "*"}, {"Idempotency-Key": "a"}):
            responses = [ada.open(url, method=method, json=BODY, headers=headers) for url in urls]
            assert [get_answer(response) for response in responses] == [NOT_FOUND, NOT_FOUND], (method, path)
            theirs, missing = ({**response.headers, "X-Request-ID": None} for response in responses)
            assert theirs == missing, (method, path)
        assert bob.list_conversations() == before, (method, path)
    assert ada.list_conversations() == []


@pytest.mark.parametrize("was_logged_in", [False, True])
def test_request_without_a_session_returns_401_and_changes_nothing(ada, client, was_logged_in):
    id = ada.create_conversation()
    message_id = ada.send_message(id).json[1]["id"]
    before = ada.list_conversations()
    if was_logged_in:
        client = create_other_client(ada)
        ada.logout()
    for method, path in LOGIN_REQUIRED:
        for conversation_id in (id, 1000):
            url = path.format(user_id=ada.user_id, conversation_id=conversation_id, message_id=message_id)
            response = client.open(url, method=method, json=BODY, query_string={"q": "a"})
            assert get_answer(response) == (401, {"error": "Login required"}), (method, url)
    ada.login("ada")
    assert ada.list_conversations() == before


# Meanwhile


def test_rename_during_a_reply_is_kept(make_app):
    def bot(history, **kwargs):
        create_other_client(ada).put("/api/conversations/1", json={"name": "New"})
        yield "Well."

    ada = create_logged_in_client(make_app(bot=bot), "ada")
    exchange = ada.send_message(ada.create_conversation("Old")).json
    assert ada.list_conversations() == [{"id": 1, "name": "New", "messages": exchange}]


@on_postgresql  # on SQLite a request that writes lets no other one write
@pytest.mark.parametrize(("method", "answer"), [("PUT", NOT_FOUND), ("PATCH", NOT_FOUND), ("DELETE", (204, None))])
def test_change_of_a_conversation_that_is_being_deleted_returns_as_if_it_came_later(ada, method, answer):
    path, other = f"/api/conversations/{ada.create_conversation()}", create_other_client(ada)
    event.listen(db.session, "before_flush", lambda *args: run_all(lambda: other.delete(path)), once=True)
    assert get_answer(ada.open(path, method=method, json={"name": "New"})) == answer
    assert ada.list_conversations() == []


def test_conversations_of_users_who_send_at_once_do_not_mix(make_app):
    app = make_app(bot=echo)
    clients = [create_logged_in_client(app, f"user {n}") for n in range(6)]

    def send_messages(number):
        conversation = clients[number].create_conversation()
        return list(chain(*(clients[number].send_message(conversation, f"{number} {n}").json for n in range(5))))

    for number, messages in enumerate(run_concurrently(6, send_messages)):
        assert get_texts(messages) == [f"{number} {n}" for n in range(5) for _ in ("user", "bot")]
        assert [item["messages"] for item in clients[number].list_conversations()] == [messages]
