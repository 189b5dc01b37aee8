"""Conditional requests: 304 for what a client has, and a new ETag for whatever changed."""

import re

import pytest

from app.bot import BotError
from tests.conftest import SHARED_SESSIONS, create_logged_in_client, create_other_client
from tests.helpers.bots import ASYNC, Gate, start_reply
from tests.helpers.data import add_conversations, execute, get_answer, get_ids
from tests.helpers.server import TIMEOUT, wait_until

ORIGIN = "http://localhost:3000"
KEPT_HEADERS = ("ETag", "Cache-Control", "Vary", "Access-Control-Allow-Origin", "Access-Control-Expose-Headers")
MESSAGE_PATHS = ["/api/conversations/1/messages/1", "/api/conversations/1/messages/2"]
CONVERSATION_PATHS = [
    "/api/conversations/1",
    "/api/conversations/1?messages=1",
    "/api/conversations/1/messages",
    "/api/conversations/1/messages?limit=1",
    "/api/conversations/1/messages/1/versions",
    *MESSAGE_PATHS,
]
LIST_PATHS = [
    "/api/conversations",
    "/api/conversations?messages=0",
    "/api/conversations?limit=5",
    "/api/conversations?limit=5&order=recent",
    "/api/conversations?q=t",
]
PRIVATE_PATHS = [*LIST_PATHS, *CONVERSATION_PATHS, "/api/messages?q=t", "/api/messages?q=t&limit=1"]
PATHS = [*PRIVATE_PATHS, "/api/conversations?limit=1&messages=1", "/api/users/status", "/api/users/status?limit=1"]

ERROR_PATHS = {
    "/api/conversations?limit=0": 400,
    "/api/users/status?limit=0": 400,
    "/api/messages": 400,
    "/api/conversations/9": 404,
    "/api/conversations/1/messages/9": 404,
}


def get_kept_headers(response):
    return [response.headers.get(name) for name in KEPT_HEADERS]


def get_if_changed(client, path, etag, **headers):
    return client.get(path, headers={"If-None-Match": etag, **headers})


def test_unchanged_response_is_304_if_the_client_has_its_etag(app, ada):
    add_conversations(app, ada, 2, messages=2)
    ada.signup("bob")
    for path in PATHS:
        first = ada.get(path, headers={"Origin": ORIGIN})
        etag = first.headers["ETag"]
        assert re.fullmatch('"[0-9a-f]+"', etag), path
        for condition in (etag, f"W/{etag}", f'"a", W/"b",{etag}', "*"):
            again = get_if_changed(ada, path, condition, Origin=ORIGIN)
            assert (again.status_code, again.data) == (304, b""), (path, condition)
            assert get_kept_headers(again) == get_kept_headers(first), (path, condition)
            assert again.headers.get("Link") in (None, first.headers.get("Link"))
        for condition in ('"a"', f'"{etag[1:-2]}"', 'W/"a", "b"', "nonsense", ""):
            again = get_if_changed(ada, path, condition)
            assert (again.status_code, again.data) == (200, first.data), (path, condition)


CONVERSATION_CHANGES = {
    "rename": lambda client: client.put("/api/conversations/1", json={"name": "Renamed"}),
    "send": lambda client: client.send_message(1, "Tea"),
    "edit": lambda client: client.edit_message(1, 1, "Tea"),
    "regenerate": lambda client: client.edit_message(1, 1, "Text 0"),
    "send whose reply fails": lambda client: client.send_message(1, "fail", headers=ASYNC),
}
LIST_CHANGES = {
    **CONVERSATION_CHANGES,
    "create": lambda client: client.post("/api/conversations", json={"name": "Another"}),
    "delete": lambda client: client.delete("/api/conversations/1"),
    "delete another": lambda client: client.delete("/api/conversations/2"),
}


def check_changed(client, path, before):
    """Check that a path has another ETag than an earlier response had, with which it is 304."""
    after = get_if_changed(client, path, before.headers["ETag"])
    assert after.status_code == 200, path
    assert after.headers["ETag"] != before.headers["ETag"], path
    assert after.data == client.get(path).data, path
    assert get_if_changed(client, path, after.headers["ETag"]).status_code == 304, path


@pytest.mark.parametrize("change", LIST_CHANGES)
def test_change_makes_a_new_etag(make_app, bot, change):
    app = make_app(bot)
    ada = create_logged_in_client(app, "ada")
    bot.scripts = {"fail": [BotError("down")]}
    add_conversations(app, ada, 2, messages=2)
    paths = [*LIST_PATHS, *(CONVERSATION_PATHS if change in CONVERSATION_CHANGES else ())]
    responses = {path: ada.get(path) for path in paths}
    assert LIST_CHANGES[change](ada).status_code < 300
    app.extensions["replies"].shutdown(TIMEOUT)
    for path, before in responses.items():
        check_changed(ada, path, before)


@pytest.mark.parametrize(
    "path", ["/api/conversations/1", "/api/conversations?limit=5", "/api/conversations?archived=false"]
)
def test_archiving_and_bringing_back_makes_a_new_etag(app, ada, path):
    add_conversations(app, ada, 2, messages=2)
    first = ada.get(path)
    ada.patch("/api/conversations/1", json={"archived": True})
    archived = ada.get(path)
    check_changed(ada, path, first)
    ada.patch("/api/conversations/1", json={"archived": False})
    check_changed(ada, path, archived)
    assert ada.get(path).json == first.json


def test_each_change_of_a_reply_makes_a_new_etag(make_app, bot):
    app = make_app(bot, **SHARED_SESSIONS)
    ada = create_logged_in_client(app, "ada")
    add_conversations(app, ada, 1)
    gates = [Gate() for _ in range(3)]
    bot.scripts = {"Hello": [gates[0].wait, "One ", gates[1].wait, "two ", gates[2].wait, BotError("cut")]}
    question, reply = start_reply(ada, 1)
    other = create_other_client(ada, make_app(bot, **SHARED_SESSIONS))
    changes = {
        "first chunk": gates[0].set,
        "growth": gates[1].set,
        "failure": gates[2].set,
        "new version": lambda: ada.edit_message(1, question["id"], "Tea"),
        "another branch": lambda: ada.show_branch(1, reply["id"]),
    }
    paths = ["/api/conversations", "/api/conversations?limit=5", *CONVERSATION_PATHS[:3]]
    for change in changes.values():
        responses = {path: other.get(path) for path in paths}
        change()
        for path, before in responses.items():
            wait_until(lambda path=path, before=before: other.get(path).headers["ETag"] != before.headers["ETag"])
            assert other.get(path).data != before.data, path


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("/api/messages?q=tea", lambda client: client.send_message(1, "Tea")),
        ("/api/messages?q=text", lambda client: client.put("/api/conversations/1", json={"name": "Renamed"})),
        ("/api/messages?q=text", lambda client: client.delete("/api/conversations/1")),
        ("/api/conversations?q=tea", lambda client: client.send_message(1, "Tea")),
        ("/api/users/status", lambda client: client.signup("bob")),
        ("/api/users/status", lambda client: client.login("ada")),
        ("/api/users/status", lambda client: client.logout()),
    ],
)
def test_change_of_a_search_or_a_status_makes_a_new_etag(app, ada, client, path, change):
    add_conversations(app, ada, 1, messages=2)
    reader = client if "status" in path else ada
    before = reader.get(path)
    assert change(ada).status_code < 300
    after = get_if_changed(reader, path, before.headers["ETag"])
    assert after.status_code == 200
    assert after.json != before.json
    assert after.headers["ETag"] != before.headers["ETag"]


def test_change_elsewhere_keeps_the_etag(app, ada, bob):
    add_conversations(app, ada, 2, messages=2)
    paths = ["/api/conversations?before=2&limit=1", "/api/users/status", *CONVERSATION_PATHS]
    etags = {path: ada.get(path).headers["ETag"] for path in paths}
    ada.send_message(2)
    bob.send_message(bob.create_conversation())
    assert {path: get_if_changed(ada, path, etag).status_code for path, etag in etags.items()} == dict.fromkeys(
        paths, 304
    )


def test_no_shared_cache_may_keep_a_response(app, ada):
    add_conversations(app, ada, 2, messages=2)
    for path in PATHS:
        first = ada.get(path)
        for response in (first, get_if_changed(ada, path, first.headers["ETag"])):
            assert set(response.headers["Cache-Control"].split(", ")) == {"private", "no-cache"}, path
            assert {"Cookie", "Origin"} <= set(response.headers["Vary"].split(", ")), path


def test_error_has_no_etag_and_may_not_be_kept(app, ada):
    add_conversations(app, ada, 1)
    for path, status in ERROR_PATHS.items():
        response = get_if_changed(ada, path, "*")
        assert response.status_code == status, path
        assert response.headers["Cache-Control"] == "no-store", path
        assert "ETag" not in response.headers, path


def test_etag_of_another_user_is_not_accepted(app, ada, bob):
    for client in (ada, bob):
        add_conversations(app, client, 1, messages=2)
    etag = bob.get("/api/conversations").headers["ETag"]
    assert get_ids(get_if_changed(ada, "/api/conversations", etag).json) == [1]


def test_etag_without_a_session_returns_401(app, ada, client):
    add_conversations(app, ada, 1, messages=2)
    for path in PRIVATE_PATHS:
        for condition in (ada.get(path).headers["ETag"], "*"):
            assert get_answer(get_if_changed(client, path, condition)) == (401, {"error": "Login required"}), path


def test_etag_changes_when_a_next_page_appears(app, ada):
    first = ada.get("/api/users/status?limit=1")
    assert "Link" not in first.headers
    app.test_client().signup("bob")
    second = ada.get("/api/users/status?limit=1", headers={"If-None-Match": first.headers["ETag"]})
    assert (second.status_code, second.json) == (200, first.json)
    assert "Link" in second.headers


def test_etag_changes_when_the_next_page_disappears(ada):
    older_id, newer_id = ada.create_conversation("Older"), ada.create_conversation("Newer")
    for id in (older_id, newer_id):
        ada.send_message(id, "Find me")
    first = ada.get("/api/messages?q=find+me&limit=2")
    assert "Link" in first.headers
    ada.delete(f"/api/conversations/{older_id}")
    second = ada.get("/api/messages?q=find+me&limit=2", headers={"If-None-Match": first.headers["ETag"]})
    assert (second.status_code, second.json) == (200, first.json)
    assert "Link" not in second.headers


def test_etag_does_not_change_with_heartbeats(make_app, bot, gate, monkeypatch):
    monkeypatch.setattr("app.replies.HEARTBEAT_INTERVAL", 0)
    app = make_app(bot)
    client = create_logged_in_client(app, "ada")
    id = client.create_conversation()
    bot.steps = [gate.wait, "Hello"]
    _, reply = start_reply(client, id)

    def read_heartbeat():
        return execute(app, "SELECT heartbeat_at FROM message WHERE id = :id", id=reply["id"])

    etag, heartbeat = client.get(f"/api/conversations/{id}").headers["ETag"], read_heartbeat()
    wait_until(lambda: read_heartbeat() != heartbeat)
    assert client.get(f"/api/conversations/{id}", headers={"If-None-Match": etag}).status_code == 304
