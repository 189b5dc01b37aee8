"""Pages of conversations, messages and users; the parameters that choose them."""

import re
from urllib.parse import parse_qsl, quote, urlsplit

import pytest

from tests.conftest import create_logged_in_client, on_sqlite
from tests.helpers.data import add_conversations, execute, get_answer, get_ids, get_next_url, get_texts, read_pages

MAX_ID = 2**63 - 1


def join(pages):
    return [item for page in pages for item in page]


# Conversations


def test_page_has_the_newest_conversations_first(app, ada):
    ids = add_conversations(app, ada, 7, messages=2)
    conversations = ada.list_conversations(messages=1000)
    assert ada.list_conversations(limit=3) == conversations[:-4:-1]
    assert ada.list_conversations(limit=3, before=ids[4]) == conversations[3:0:-1]
    assert ada.list_conversations(limit=100) == conversations[::-1]
    assert ada.list_conversations(limit=100, before=ids[0]) == []


@pytest.mark.parametrize("parameters", [{}, {"order": "recent"}])
def test_links_lead_to_each_conversation_once(app, ada, parameters):
    assert read_pages(ada, "/api/conversations", limit=20, **parameters) == [[]]
    ids = add_conversations(app, ada, 6)
    execute(app, "UPDATE conversation SET updated_at = (SELECT max(updated_at) FROM conversation)")
    sizes = {1: [1] * 6, 2: [2, 2, 2], 4: [4, 2], 5: [5, 1], 6: [6], 7: [6], 100: [6]}
    for limit, expected in sizes.items():
        pages = read_pages(ada, "/api/conversations", limit=limit, **parameters)
        assert [len(page) for page in pages] == expected
        assert get_ids(join(pages)) == ids[::-1]


def test_pages_neither_repeat_nor_miss_any_while_others_are_created_and_deleted(app, ada):
    add_conversations(app, ada, 12)

    def change_list(page):
        ada.create_conversation("New")
        ada.delete(f"/api/conversations/{page[-1]['id']}")  # where the next page begins
        ada.delete(f"/api/conversations/{page[-1]['id'] - 2}")  # what would be on it

    pages = read_pages(ada, "/api/conversations", change_list, limit=3)
    assert [get_ids(page) for page in pages] == [[12, 11, 10], [9, 7, 6], [5, 3, 2], [1]]


@pytest.mark.parametrize("order", [{}, {"order": "recent"}])
@pytest.mark.parametrize("q", [{}, {"q": "Text 1"}])
def test_archived_filters_conversations_with_all_other_parameters(app, ada, order, q):
    ids = add_conversations(app, ada, 9, messages=2)
    step = -1 if order else 1
    for id in ids[::2]:
        ada.patch(f"/api/conversations/{id}", json={"archived": True})
    for archived, expected in (("true", ids[::2]), ("false", ids[1::2]), ("", ids)):
        parameters = {"archived": archived, "messages": 1, **order, **q}
        assert get_ids(ada.list_conversations(**parameters)) == expected[::step]
        pages = read_pages(ada, "/api/conversations", **parameters, limit=2)
        assert get_ids(join(pages)) == expected[::-1]
        assert [item["archived"] for item in join(pages)] == [item in ids[::2] for item in expected[::-1]]


def test_order_recent_lists_the_last_changed_conversation_first(ada):
    first, second, third = (ada.create_conversation() for _ in range(3))
    ada.send_message(second)
    message_id = ada.send_message(first).json[0]["id"]
    ada.put(f"/api/conversations/{third}", json={"name": "A new name is no activity"})
    assert get_ids(ada.list_conversations(order="recent")) == [first, second, third]
    ada.send_message(third)
    assert get_ids(ada.list_conversations(order="recent", limit=2)) == [third, first]
    ada.edit_message(first, message_id, "Edited")
    assert get_ids(ada.list_conversations(order="recent", limit=2, messages=0)) == [first, third]


def test_recent_pages_neither_repeat_nor_miss_any_while_the_order_changes(app, ada):
    ids = add_conversations(app, ada, 8)
    for id in (2, 4, 6):
        ada.send_message(id)

    def change_order(page):
        ada.send_message(page[0]["id"])
        ada.send_message(page[-1]["id"])  # where the next page begins
        ada.delete(f"/api/conversations/{page[1]['id']}")

    pages = read_pages(ada, "/api/conversations", change_order, limit=3, order="recent")
    assert [get_ids(page) for page in pages] == [[6, 4, 2], [8, 7, 5], [3, 1]]
    assert sorted(get_ids(join(pages))) == ids


def test_messages_limits_the_messages_of_each_conversation_to_the_newest(app, ada):
    add_conversations(app, ada, 2, messages=4)
    add_conversations(app, ada, 1, messages=1)
    for page in ({}, {"limit": 2}, {"order": "recent"}):
        conversations = ada.list_conversations(messages=1000, **page)
        for count in (0, 1, 3, 4):
            expected = [{**item, "messages": item["messages"][-count:] if count else []} for item in conversations]
            assert ada.list_conversations(messages=count, **page) == expected


def test_link_keeps_the_other_parameters(ada):
    q = 'Tëa & "ink" <100%> #+/\\_?=;'
    ids = [ada.create_conversation(f"{n} {q.upper()}") for n in range(3)]
    parameters = {"limit": "2", "messages": "5", "q": q}
    url = urlsplit(get_next_url(ada.get("/api/conversations", query_string=parameters)))
    assert url.path == "/api/conversations"
    assert dict(parse_qsl(url.query)) == {**parameters, "before": str(ids[1])}
    assert [get_ids(page) for page in read_pages(ada, url.path, **parameters)] == [[ids[2], ids[1]], [ids[0]]]


@pytest.mark.parametrize("host", ["localhost", "chat.example.com:8443", "xn--bcher-kva.example"])
@on_sqlite
def test_link_is_relative_whatever_the_host_and_the_prefix_are(make_app, host):
    ada = create_logged_in_client(make_app(TRUSTED_PROXIES="1"), "ada")
    ada.signup("bob")
    add_conversations(ada.application, ada, 2, messages=2)
    headers = {"Cookie": f"chatbot_session={ada.session_cookie}", "Host": host}
    headers |= {"X-Forwarded-Proto": "https", "X-Forwarded-Prefix": "/chat"}
    for path in ("/api/conversations", "/api/conversations/1/messages", "/api/users/status"):
        response = ada.application.test_client(use_cookies=False).get(f"{path}?limit=1", headers=headers)
        assert re.fullmatch(r'<\?limit=1&(before|after)=\d+>; rel="next"', response.headers["Link"]), path


# One conversation, its messages


@pytest.mark.parametrize("messages", [0, 1, 4, 1000])
def test_get_conversation_returns_it_as_the_list_shows_it(app, ada, messages):
    ids = add_conversations(app, ada, 3, messages=4)
    responses = [ada.get(f"/api/conversations/{id}?messages={messages}") for id in ids]
    assert [response.json for response in responses] == ada.list_conversations(messages=messages)
    assert ada.get(f"/api/conversations/{ids[0]}").json == ada.list_conversations(messages=1000)[0]


def test_page_of_messages_has_the_newest_in_order_of_time(app, ada):
    _, id, _ = add_conversations(app, ada, 3, messages=120)
    messages = ada.list_messages(id)
    assert get_texts(messages) == [f"Text {n}" for n in range(120)]
    pages = {
        "": messages[-50:],
        "?limit=3": messages[-3:],
        f"?limit=3&before={messages[10]['id']}": messages[7:10],
        f"?before={messages[2]['id']}": messages[:2],
        f"?before={messages[0]['id']}": [],
    }
    assert {query: ada.get(f"/api/conversations/{id}/messages{query}").json for query in pages} == pages


@pytest.mark.parametrize(("limit", "sizes"), [(50, [50, 50, 20]), (60, [60, 60]), (100, [100, 20])])
def test_links_lead_backwards_through_messages_while_others_are_added(app, ada, limit, sizes):
    [id] = add_conversations(app, ada, 1, messages=120)
    messages = ada.list_messages(id)
    path = f"/api/conversations/{id}/messages"
    pages = read_pages(ada, path, lambda page: ada.send_message(id), limit=limit)
    assert [len(page) for page in pages] == sizes
    assert join(pages[::-1]) == messages


# Users


def test_status_pages_list_each_user_once(app, ada):
    for n in range(4):
        ada.signup(f"user {n}")
    users = ada.get("/api/users/status").json["users"]
    assert get_ids(users) == [1, 2, 3, 4, 5]
    assert ada.get("/api/users/status?limit=2&after=1").json == {"users": users[1:3]}
    for limit, pages in ((2, [users[:2], users[2:4], users[4:]]), (5, [users]), (6, [users])):
        assert read_pages(ada, "/api/users/status", limit=limit) == pages
        assert read_pages(ada, "/api/users/status", limit=limit, after=0) == pages


def test_status_pages_end_with_users_who_sign_up_meanwhile(ada, bob):
    names = ["eve", "mallory"]

    def sign_up(page):
        if names:
            ada.signup(names.pop())

    pages = read_pages(ada, "/api/users/status", sign_up, limit=1)
    assert [get_ids(page) for page in pages] == [[1], [2], [3], [4]]


# Parameters

INTEGERS = [
    ("/api/conversations", {}, "limit", 1, 100),
    ("/api/conversations", {"limit": 1}, "before", 1, MAX_ID),
    ("/api/conversations", {}, "messages", 0, 1000),
    ("/api/conversations/1", {}, "messages", 0, 1000),
    ("/api/conversations/1", {}, "versions", 0, 1),
    ("/api/conversations/1/messages", {}, "versions", 0, 1),
    ("/api/conversations/1/messages", {}, "limit", 1, 100),
    ("/api/conversations/1/messages", {}, "before", 1, MAX_ID),
    ("/api/messages", {"q": "a"}, "limit", 1, 100),
    ("/api/messages", {"q": "a"}, "before", 1, MAX_ID),
    ("/api/users/status", {}, "limit", 1, 100),
    ("/api/users/status", {"limit": 1}, "after", 0, MAX_ID),
]
NOT_INTEGERS = [
    *("", " ", "abc", "-1", "+1", "1.5", "1.", "1e1", "0x1", "1_0", " 1", "1 ", "1\n", "1,2", "null", "true", "NaN"),
    *("\0", "1\0", "\u0661", "\uff11", "²", "😀", "9" * 20, "9" * 5000, 2**63, 2**64, "1;DROP TABLE message"),
]


@on_sqlite
def test_integer_out_of_bounds_returns_400_that_names_it(ada):
    ada.create_conversation()
    for path, others, name, minimum, maximum in INTEGERS:
        error = {"error": f"{name} must be an integer from {minimum} to {maximum}"}
        for value in (minimum - 1, maximum + 1, *NOT_INTEGERS):
            assert get_answer(ada.get(path, query_string={**others, name: value})) == (400, error), (path, value)


CURSOR, CURSOR_OF_ID_0 = (quote(f"2026-01-31T12:00:00+00:00 {id}") for id in (1, 0))
CONFLICTS = {
    "conversations?before=5": "before requires limit",
    "conversations?before=5&q=a&messages=1": "before requires limit",
    "conversations?before=5&limit=5&order=recent": "order=recent requires cursor instead of before",
    "conversations?order=oldest": "order must be recent",
    "conversations?archived=1": "archived must be true or false",
    "conversations?archived=True&limit=5": "archived must be true or false",
    f"conversations?cursor={CURSOR}": "cursor requires limit and order=recent",
    f"conversations?cursor={CURSOR_OF_ID_0}": "cursor requires limit and order=recent",
    f"conversations?cursor={CURSOR}&limit=1": "cursor requires limit and order=recent",
    f"conversations?cursor={CURSOR}&order=recent": "cursor requires limit and order=recent",
    "users/status?after=5": "after requires limit",
    "users/status?after=0": "after requires limit",
}


@on_sqlite
def test_parameters_that_do_not_go_together_return_400(ada):
    for path, error in CONFLICTS.items():
        assert get_answer(ada.get(f"/api/{path}")) == (400, {"error": error}), path


FORGED_CURSORS = [
    *("1", "a", "=", "é", "😀", "____", "%%%", "a" * 255),
    *("1 1", "2026-01-31", "2026-01-31 b", "2026-01-31 1 1", "x 1", "NaN 1"),
    *(f"2026-01-31T12:00:00+00:00 {'9' * 99}", f"2026-01-31 -{'9' * 99}", "2026-01-31 1_0"),
    *("0001-01-01T00:00:00+23:59 1", "9999-12-31T23:59:59-23:59 1", "10000-01-01 1"),
]


def test_forged_cursor_returns_400_or_a_page(ada):
    ada.create_conversation()
    for cursor in FORGED_CURSORS:
        response = ada.get("/api/conversations", query_string={"limit": 1, "order": "recent", "cursor": cursor})
        is_refused = get_answer(response) == (400, {"error": "cursor must come from a Link header"})
        assert is_refused or response.status_code == 200, cursor
