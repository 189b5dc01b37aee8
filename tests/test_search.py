"""Searching conversations and messages."""

import time

import pytest

from app.threads import run_long_query
from tests.conftest import on_sqlite
from tests.helpers.data import add_conversations, execute, get_answer, get_ids, get_items, read_pages
from tests.helpers.server import run_in_background

TEXTS_WITH_MATCH = [  # text, q, what q matches
    ("Straße ΟΔΟΣ", "STRASSE οδος", "Straße ΟΔΟΣ"),
    ("ΟΔΟΣΑ", "οδος", "ΟΔΟΣ"),
    ("\u01c5 \u212b \ufb00 \u212a", "\u01c6 a\u030a FF k", "\u01c5 \u212b \ufb00 \u212a"),
    ("Grüße aus Österreich", "ÖSTER", "Öster"),
    ("GRÜSSE AUS ÖSTERREICH", "ö", "Ö"),
    ("Viele Grüße", "GRÜSSE", "Grüße"),
    ("Viele GRÜSSE", "grüße", "GRÜSSE"),
    ("aßb", "sb", "ßb"),
    ("ßßß end", "END", "end"),
    ("ﬁrst ŉ two", "two", "two"),
    ("Красное ЯБЛОКО", "яблоко", "ЯБЛОКО"),
    ("яблоко", "Я", "я"),
    ("Ελλάδα", "ΕΛΛΆΔΑ", "Ελλάδα"),
    ("Ὀδυσσεύς", "ΎΣ", "ύς"),
    ("ὈΔΥΣΣΕΎΣ ΕΊΜΙ", "σεύς εί", "ΣΕΎΣ ΕΊ"),
    ("İstanbul", "i\u0307stan", "İstan"),
    ("in İstanbul", "STANBUL", "stanbul"),
    ("Cafe\u0301 au lait", "CAFÉ", "Café"),
    ("e\u0301 e\u0301 then", "THEN", "then"),
    ("Café", "cafe\u0301", "Café"),
    ("한국어", "\u1112\u1161\u11ab", "한"),
    ("😀👩‍👩‍👧 family", "👩‍👧", "👩‍👧"),
    ("😀👩‍👩‍👧 family", "FAM", "fam"),
    ("one two  three", "E TWO  T", "e two  t"),
    (" margins ", " Margins ", " margins "),
    ("100% sure", "0% S", "0% s"),
    ("snake_case", "E_C", "e_c"),
    (r"C:\temp\%", r":\TEMP\%", r":\temp\%"),
    ("/%/_//", "/%/_//", "/%/_//"),
    ('it\'s "quoted"; --', "'S \"Q", "'s \"q"),
    ("%s %(a)s :a ? {}", "%(A)S :A ?", "%(a)s :a ?"),
    ("a\nb", "A\nB", "a\nb"),
    ("tea and tea", "TEA", "tea"),
]
TEXTS_WITHOUT_MATCH = [
    *(("100 sure", "0% s"), ("snakeXcase", "e_c"), ("either or", "r/o"), ("C:temp", r":\temp")),
    *(("anything", q) for q in ("%", "_", "any%ing", "/%", "\\", "created_at")),
    *(("two one", "one two"), ("one  two", "one two"), ("Österreich", "Osterreich")),
]


def search_messages(client, **parameters):
    return get_items(client.get("/api/messages", query_string=parameters))


def split_at_match(result):
    """Return what a snippet has before, as and after the match."""
    start, end = result["match"]["start"], result["match"]["end"]
    assert 0 <= start <= end <= len(result["snippet"])
    return result["snippet"][:start], result["snippet"][start:end], result["snippet"][end:]


# Conversations


def test_search_finds_names_and_texts_in_any_case(echo_ada):
    for text, q, _ in TEXTS_WITH_MATCH[::5]:
        by_name, by_text, other = (echo_ada.create_conversation(name) for name in (text, ".", "."))
        echo_ada.send_message(by_text, text)
        echo_ada.send_message(other, ".")
        assert get_ids(echo_ada.list_conversations(q=q)) == [by_name, by_text], (text, q)
        for conversation in (by_name, by_text):
            echo_ada.delete(f"/api/conversations/{conversation}")


def test_search_takes_every_character_literally(echo_ada):
    for text, q in TEXTS_WITHOUT_MATCH:
        conversation = echo_ada.create_conversation(text)
        echo_ada.send_message(conversation, text)
        assert echo_ada.list_conversations(q=q) == [], (text, q)
        assert search_messages(echo_ada, q=q) == [], (text, q)
        echo_ada.delete(f"/api/conversations/{conversation}")


def test_search_returns_whole_conversations_each_once(echo_ada):
    conversation = echo_ada.create_conversation("Tea")
    for text in ("tea", "ink", "more tea"):
        echo_ada.send_message(conversation, text)
    assert echo_ada.list_conversations(q="tea") == echo_ada.list_conversations(messages=1000)
    assert len(echo_ada.list_messages(conversation)) == 6


def test_search_is_paged_in_both_orders(app, ada):
    ids = add_conversations(app, ada, 7, messages=3)
    for id in ids[::2]:
        ada.put(f"/api/conversations/{id}", json={"name": "Tea"})
    assert get_ids(ada.list_conversations(q="tea")) == ids[::2]
    pages = read_pages(ada, "/api/conversations", q="tea", limit=2, messages=1)
    assert [get_ids(page) for page in pages] == [[ids[6], ids[4]], [ids[2], ids[0]]]
    assert {message["text"] for page in pages for item in page for message in item["messages"]} == {"Text 2"}
    ada.send_message(ids[2])
    pages = read_pages(ada, "/api/conversations", q="tea", limit=3, order="recent")
    assert [get_ids(page) for page in pages] == [[ids[2], ids[6], ids[4]], [ids[0]]]
    assert get_ids(ada.list_conversations(q="TEXT 2", limit=2, before=ids[3])) == [ids[2], ids[1]]


# Messages


def test_search_messages_tells_where_the_match_is(echo_ada):
    for text, q, match in TEXTS_WITH_MATCH:
        conversation = echo_ada.create_conversation()
        echo_ada.send_message(conversation, f"- {text} -")
        results = search_messages(echo_ada, q=q)
        assert len(results) == 2, (text, q)
        for result in results:
            _, found, _ = split_at_match(result)
            if len(text.upper().lower()) == len(text):  # else the position may be off
                assert found == match
        echo_ada.delete(f"/api/conversations/{conversation}")


def test_search_messages_returns_documented_fields_newest_first(echo_ada):
    tea, ink = echo_ada.create_conversation("Tea"), echo_ada.create_conversation("Ink")
    first = echo_ada.send_message(tea, "A cup of Tea").json
    echo_ada.send_message(ink, "A drop of ink")
    second = echo_ada.send_message(ink, "Tea stains").json
    expected = [
        {
            "id": message["id"],
            "sender": message["sender"],
            "created_at": message["created_at"],
            "conversation": {"id": conversation, "name": name},
            "snippet": message["text"],
            "match": {"start": start, "end": start + 3},
        }
        for conversation, name, start, exchange in ((ink, "Ink", 0, second), (tea, "Tea", 9, first))
        for message in exchange[::-1]
    ]
    assert search_messages(echo_ada, q="tea") == expected


@pytest.mark.parametrize("padding", [0, 3, 60, 61, 5000])
def test_search_messages_shows_a_bounded_snippet_around_the_first_match(echo_ada, padding):
    echo_ada.send_message(echo_ada.create_conversation(), f"{'ë' * padding}Tea{'é' * padding}tea")
    results = search_messages(echo_ada, q="TEA")
    assert len(results) == 2
    for before, match, after in map(split_at_match, results):
        assert match == "Tea"
        assert len(before + match + after) <= 200
        assert f"{'é' * padding}tea".startswith(after)
        assert before == "ë" * len(before)
        assert min(padding, 30) <= len(before) <= padding


def test_search_messages_links_lead_to_each_message_once(echo_ada):
    conversation = echo_ada.create_conversation()
    for n in range(4):
        echo_ada.send_message(conversation, f"{n}: tea & ink")
    results = search_messages(echo_ada, q="tea & I")
    assert len(results) == 8
    for limit, sizes in {1: [1] * 8, 3: [3, 3, 2], 4: [4, 4], 8: [8], 100: [8]}.items():
        parameters = {"q": "tea & I", "limit": limit}
        pages = read_pages(echo_ada, "/api/messages", lambda page: echo_ada.send_message(conversation), **parameters)
        assert [len(page) for page in pages] == sizes
        assert [result for page in pages for result in page] == results


def test_search_messages_shows_how_replies_ended_on_pages_of_fifty(app, ada):
    add_conversations(app, ada, 4, messages=30)
    execute(app, "UPDATE message SET status = 'stopped' WHERE sender = 'bot'")
    pages = read_pages(ada, "/api/messages", q="text")
    assert [len(page) for page in pages] == [50, 50, 20]
    assert [result.get("status") for page in pages for result in page] == ["stopped", None] * 60


def test_search_messages_without_q_returns_400(ada):
    for query in ("", "?q=", "?limit=5"):
        assert get_answer(ada.get(f"/api/messages{query}")) == (400, {"error": "q is required"})


# Both


def test_search_finds_the_callers_own_only(app, ada, bob):
    ids = {client: add_conversations(app, client, 2, messages=2) for client in (ada, bob)}
    for client, own in ids.items():
        for parameters in ({}, {"before": 5}, {"q": "Conversation"}, {"q": "Text"}, {"order": "recent"}):
            assert get_ids(client.list_conversations(limit=9, **parameters)) == own[::-1]
        assert {result["conversation"]["id"] for result in search_messages(client, q="Text")} == set(own)


@pytest.mark.parametrize("path", ["/api/conversations", "/api/messages"])
@on_sqlite
def test_search_for_blank_or_long_text_or_nul_returns_400(ada, path):
    error = {"error": "q must be 1 to 255 characters long and not blank"}
    for q in (" ", "\t\n\u3000", "\0", "\u200b", "\u3164", "a" * 256, "😀" * 256):
        assert get_answer(ada.get(path, query_string={"q": q})) == (400, error), q
    nul = {"error": "q must not contain NUL"}
    assert get_answer(ada.get(path, query_string={"q": "a\0b"})) == (400, nul)


def test_search_for_longest_text_finds_it(ada):
    for q in ("a" * 255, "😀" * 255, "%" * 255, "/_" * 127):
        assert ada.list_conversations(q=q) == [], q
        conversation = ada.create_conversation(q)
        assert get_ids(ada.list_conversations(q=q)) == [conversation], q


@pytest.mark.parametrize("path", ["/api/conversations?limit=1&", "/api/messages?"])
def test_search_for_text_that_is_not_utf_8_finds_nothing(ada, path):
    ada.create_conversation()
    for q in ("%FF", "%C3", "%ED%A0%80", "%F4%90%80%80"):
        assert get_items(ada.get(f"{path}q={q}")) == [], q


@on_sqlite
def test_change_of_the_branch_that_waits_for_a_search_locks_no_other_writer(ada, bob, conversation_id, monkeypatch):
    monkeypatch.setattr("app.threads.MAX_WAIT", 1)
    monkeypatch.setattr("app.database.SQLITE_LOCK_TIMEOUT", 0.1)
    message, _ = ada.send_message(conversation_id).json
    other_id = bob.create_conversation()

    def send_meanwhile():
        with run_in_background(lambda: ada.show_branch(conversation_id, message["id"])) as [change]:
            time.sleep(0.3)
            sent = bob.send_message(other_id)
        return sent.status_code, change.result().status_code

    assert run_long_query(send_meanwhile, ada.user_id) == (201, 503)


def test_search_finds_current_versions_only(echo_ada):
    conversation = echo_ada.create_conversation()
    question, _ = echo_ada.send_message(conversation, "tea").json
    echo_ada.edit_message(conversation, question["id"], "ink")
    assert search_messages(echo_ada, q="tea") == echo_ada.list_conversations(q="tea") == []
    echo_ada.show_branch(conversation, question["id"])
    assert len(search_messages(echo_ada, q="tea")) == 2
    assert get_ids(echo_ada.list_conversations(q="tea")) == [conversation]
    assert search_messages(echo_ada, q="ink") == []
