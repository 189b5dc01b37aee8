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
CONVERSATION_PATHS = [f"/api/conversations/1{rest}" for rest in ("", "?messages=1", "/messages", "/messages?limit=1")]
LIST_QUERIES = ("", "?messages=0", "?limit=5", "?limit=5&order=recent", "?q=t")
LIST_PATHS = [f"/api/conversations{query}" for query in LIST_QUERIES]
PRIVATE_PATHS = [*LIST_PATHS, *CONVERSATION_PATHS, "/api/messages?q=t", "/api/messages?q=t&limit=1"]
PATHS = [*PRIVATE_PATHS, "/api/conversations?limit=1&messages=1", "/api/users/status", "/api/users/status?limit=1"]


def get_if_changed(client, path, etag, **headers):
    return client.get(path, headers={"If-None-Match": etag, **headers})


def test_unchanged_response_is_304_if_the_client_has_its_etag_and_no_shared_cache_may_keep_it(app, ada):
    add_conversations(app, ada, 2, messages=2)
    ada.signup("bob")
    for path in PATHS:
        first = ada.get(path, headers={"Origin": ORIGIN})
        etag = first.headers["ETag"]
        assert re.fullmatch('"[0-9a-f]+"', etag), path
        assert set(first.headers["Cache-Control"].split(", ")) == {"private", "no-cache"}, path
        assert {"Cookie", "Origin"} <= set(first.headers["Vary"].split(", ")), path
        for condition in (etag, f"W/{etag}", f'"a", W/"b",{etag}', "*"):
            again = get_if_changed(ada, path, condition, Origin=ORIGIN)
            assert (again.status_code, again.data) == (304, b""), (path, condition)
            assert [again.headers.get(name) == first.headers.get(name) for name in KEPT_HEADERS] == [True] * 5, path
            assert again.headers.get("Link") in (None, first.headers.get("Link"))
        for condition in ('"a"', f'"{etag[1:-2]}"', 'W/"a", "b"', "nonsense", ""):
            again = get_if_changed(ada, path, condition)
            assert (again.status_code, again.data) == (200, first.data), (path, condition)


CONVERSATION_CHANGES = {
    "rename": lambda client: client.put("/api/conversations/1", json={"name": "Renamed"}),
    "archive": lambda client: client.patch("/api/conversations/1", json={"archived": True}),
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
    "bring an archived one back": lambda client: client.patch("/api/conversations/2", json={"archived": False}),
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
    ada.patch("/api/conversations/2", json={"archived": True})
    paths = [*LIST_PATHS, *(CONVERSATION_PATHS if change in CONVERSATION_CHANGES else ())]
    responses = {path: ada.get(path) for path in paths}
    assert LIST_CHANGES[change](ada).status_code < 300
    app.extensions["replies"].shutdown(TIMEOUT)
    for path, before in responses.items():
        check_changed(ada, path, before)


def test_each_change_of_a_reply_makes_a_new_etag(make_app, bot):
    app = make_app(bot, **SHARED_SESSIONS)
    ada = create_logged_in_client(app, "ada")
    add_conversations(app, ada, 1)
    gates = [Gate() for _ in range(3)]
    bot.scripts = {"Hello": [gates[0].wait, "One ", gates[1].wait, "two ", gates[2].wait, BotError("cut")]}
    question, reply = start_reply(ada, 1)
    other = create_other_client(ada, make_app(bot, **SHARED_SESSIONS))
    changes = [gate.set for gate in gates]
    changes += [lambda: ada.edit_message(1, question["id"], "Tea"), lambda: ada.show_branch(1, reply["id"])]
    for change in changes:
        responses = {path: other.get(path) for path in ["/api/conversations?limit=5", *CONVERSATION_PATHS[::2]]}
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
    check_changed(reader, path, before)


def test_change_elsewhere_keeps_the_etag(app, ada, bob):
    add_conversations(app, ada, 2, messages=2)
    paths = ["/api/conversations?before=2&limit=1", "/api/users/status", *CONVERSATION_PATHS]
    etags = {path: ada.get(path).headers["ETag"] for path in paths}
    ada.send_message(2)
    bob.send_message(bob.create_conversation())
    for path, etag in etags.items():
        assert get_if_changed(ada, path, etag).status_code == 304, path


def test_error_has_no_etag_and_may_not_be_kept(ada):
    for path in ("/api/conversations?limit=0", "/api/users/status?limit=0", "/api/messages", "/api/conversations/9"):
        response = get_if_changed(ada, path, "*")
        assert response.status_code in (400, 404), path
        assert (response.headers["Cache-Control"], response.headers.get("ETag")) == ("no-store", None), path


def test_etag_of_another_user_is_not_accepted_and_none_without_a_session(app, ada, bob, client):
    for each in (ada, bob):
        add_conversations(app, each, 1, messages=2)
    etag = bob.get("/api/conversations").headers["ETag"]
    assert get_ids(get_if_changed(ada, "/api/conversations", etag).json) == [1]
    for path in PRIVATE_PATHS:
        assert get_if_changed(client, path, ada.get(path).headers["ETag"]).status_code == 401, path


def test_etag_changes_when_only_the_link_to_a_next_page_does(app, ada):
    ids = add_conversations(app, ada, 2, messages=1)
    for path, change in {
        "/api/users/status?limit=1": lambda: ada.signup("bob"),  # it appears
        "/api/messages?q=text&limit=1": lambda: ada.delete(f"/api/conversations/{ids[0]}"),  # it disappears
    }.items():
        first = ada.get(path)
        assert change().status_code < 300
        second = get_if_changed(ada, path, first.headers["ETag"])
        assert get_answer(second) == (200, first.json), path
        assert ("Link" in first.headers) != ("Link" in second.headers), path


def test_etag_does_not_change_with_heartbeats(make_app, bot, gate, monkeypatch):
    monkeypatch.setattr("app.replies.HEARTBEAT_INTERVAL", 0)
    app = make_app(bot)
    client = create_logged_in_client(app, "ada")
    path = f"/api/conversations/{client.create_conversation()}"
    bot.steps = [gate.wait, "Hello"]
    start_reply(client, 1)

    def read_heartbeats():
        return execute(app, "SELECT heartbeat_at FROM message ORDER BY id")

    etag, heartbeats = client.get(path).headers["ETag"], read_heartbeats()
    wait_until(lambda: read_heartbeats() != heartbeats)
    assert get_if_changed(client, path, etag).status_code == 304
