"""What is read without reading everything: pages, search, and answers that a client has already."""

import re
from contextlib import contextmanager
from datetime import UTC, datetime
from urllib.parse import parse_qsl, urlsplit

import pytest
from sqlalchemy import event, text

from app import db
from app.models import Conversation, Message, User
from tests.conftest import newcomer

KNOWN = "http://localhost:3000"
MAX_ID = 2**63 - 1
MISSING = (404, {"error": "Conversation not found"})


def answer(response):
    return response.status_code, response.json


def ids(items):
    return [item.get("id") or item["user_id"] for item in items]


def items(response):
    """Return what is listed on a page of any kind."""
    assert response.status_code == 200
    return response.json if isinstance(response.json, list) else response.json["users"]


def talks(client, **parameters):
    return items(client.get("/api/conversations", query_string=parameters))


def following(response):
    """Return the address of the next page, or None."""
    link = response.headers.get("Link")
    return link and re.fullmatch('<([^<>"]+)>; rel="next"', link)[1]


def walk(client, address, meanwhile=lambda page: None, **parameters):
    """Go from page to page while there is a next one; return each page's items."""
    pages, response = [], client.get(address, query_string=parameters or None)
    while True:
        pages.append(items(response))
        meanwhile(pages[-1])
        if not following(response):
            return pages
        response = client.get(following(response))


def together(pages):
    return [item for page in pages for item in page]


def fill(app, owner, count, messages=0):
    """Give a user so many conversations of so many messages each; return the conversations' ids, oldest first."""
    now = datetime.now(UTC)
    with app.app_context():
        made = db.insert(Conversation).returning(Conversation.id, sort_by_parameter_order=True)
        rows = [{"name": f"Talk {n}", "user_id": owner.user_id, "created_at": now} for n in range(count)]
        made = db.session.scalars(made, rows).all()
        said = [{"sender": "bot" if n % 2 else "user", "text": f"Text {n}", "created_at": now} for n in range(messages)]
        if said:
            db.session.execute(db.insert(Message), [{**row, "conversation_id": talk} for talk in made for row in said])
        db.session.commit()
    return made


@contextmanager
def statements(app):
    """Collect the (SQL, parameters) that are sent meanwhile."""
    with app.app_context():
        engine = db.engine
    sent = []

    def note(connection, cursor, statement, parameters, *rest):
        sent.append((statement, parameters))

    event.listen(engine, "before_cursor_execute", note)
    yield sent
    event.remove(engine, "before_cursor_execute", note)


@pytest.fixture
def echo(app):
    """A bot that says just what it is told."""
    app.extensions["bot"] = lambda history: iter([history[-1][1]])


# Pages of conversations


def test_without_parameters_everything_comes_oldest_first_as_documented(app, ada):
    made = fill(app, ada, 130, messages=4)
    response = ada.get("/api/conversations")
    assert ids(response.json) == made
    assert {tuple(talk) for talk in response.json} == {("id", "name", "messages")}
    assert {tuple(m["text"] for m in talk["messages"]) for talk in response.json} == {
        ("Text 0", "Text 1", "Text 2", "Text 3")
    }
    assert following(response) is None


def test_a_page_is_the_newest_conversations_newest_first(app, ada):
    made = fill(app, ada, 7, messages=2)
    everything = talks(ada)
    assert talks(ada, limit=3) == everything[:-4:-1]
    assert talks(ada, limit=3, before=made[4]) == everything[3:0:-1]
    assert talks(ada, limit=100) == everything[::-1]
    assert talks(ada, limit=100, before=made[0]) == []


def test_from_link_to_link_each_comes_exactly_once(app, ada):
    made = fill(app, ada, 6)
    sizes = {1: [1] * 6, 2: [2, 2, 2], 4: [4, 2], 5: [5, 1], 6: [6], 7: [6], 100: [6]}
    for limit in sizes:
        pages = walk(ada, "/api/conversations", limit=limit)
        assert [len(page) for page in pages] == sizes[limit]
        assert ids(together(pages)) == made[::-1]


def test_an_empty_page_has_no_next_one(ada):
    response = ada.get("/api/conversations?limit=20")
    assert answer(response) == (200, [])
    assert following(response) is None


def test_nothing_is_twice_or_missing_while_others_come_and_go(app, ada):
    fill(app, ada, 12)

    def meanwhile(page):
        ada.create("New")
        ada.delete(f"/api/conversations/{page[-1]['id']}")  # where the next page goes on
        ada.delete(f"/api/conversations/{page[-1]['id'] - 2}")  # what would be on it

    pages = walk(ada, "/api/conversations", meanwhile, limit=3)
    assert [ids(page) for page in pages] == [[12, 11, 10], [9, 7, 6], [5, 3, 2], [1]]


def test_each_conversation_shows_as_many_of_its_newest_messages_as_asked_for(app, ada):
    fill(app, ada, 2, messages=4)
    fill(app, ada, 1, messages=1)
    for page in ({}, {"limit": 2}):
        whole = talks(ada, **page)
        for number in (0, 1, 3, 4, 1000):
            shown = [{**talk, "messages": talk["messages"][-number:] if number else []} for talk in whole]
            assert talks(ada, messages=number, **page) == shown


def test_the_next_page_keeps_the_other_parameters(ada):
    words = 'Tëa & "ink" <100%> #+/\\_?=;'
    made = [ada.create(f"{n} {words.upper()}") for n in range(3)]
    parameters = {"limit": "2", "messages": "5", "q": words}
    response = ada.get("/api/conversations", query_string=parameters)
    address = urlsplit(following(response))
    assert address.geturl().startswith("http://localhost/api/conversations?")
    assert dict(parse_qsl(address.query)) == {**parameters, "before": str(made[1])}
    assert ids(items(ada.get(following(response)))) == [made[0]]


def test_the_next_page_is_where_the_client_reached_this_one(make_app):
    app = make_app(TRUSTED_PROXIES="1")
    ada = newcomer(app, "ada")
    fill(app, ada, 2)
    headers = {"Cookie": f"session={ada.session_cookie}", "X-Forwarded-Proto": "https", "Host": "chat.example.com:8443"}
    response = app.test_client(use_cookies=False).get("/api/conversations?limit=1", headers=headers)
    assert following(response) == "https://chat.example.com:8443/api/conversations?limit=1&before=2"


def test_a_page_of_a_known_origin_reads_link_and_etag(app, ada):
    fill(app, ada, 2)
    response = ada.get("/api/conversations?limit=1", headers={"Origin": KNOWN})
    assert response.headers["Access-Control-Allow-Origin"] == KNOWN
    assert {"Link", "ETag"} <= set(response.headers["Access-Control-Expose-Headers"].split(", "))


# One conversation, its history, everybody's status


def test_one_conversation_looks_as_it_does_in_the_list(app, ada):
    made = fill(app, ada, 3, messages=4)
    assert [answer(ada.get(f"/api/conversations/{talk}")) for talk in made] == [(200, talk) for talk in talks(ada)]
    for number in (0, 1, 4, 1000):
        assert [ada.get(f"/api/conversations/{made[1]}?messages={number}").json] == talks(ada, messages=number)[1:2]


def test_a_stretch_of_history_is_oldest_first(app, ada):
    _, talk, _ = fill(app, ada, 3, messages=120)
    path = f"/api/conversations/{talk}/messages"
    said = ada.get(f"/api/conversations/{talk}").json["messages"]
    assert ada.get(path).json == said[-50:]
    assert ada.get(f"{path}?limit=3").json == said[-3:]
    assert ada.get(f"{path}?limit=3&before={said[10]['id']}").json == said[7:10]
    assert ada.get(f"{path}?before={said[2]['id']}").json == said[:2]
    assert ada.get(f"{path}?before={said[0]['id']}").json == []


def test_history_is_read_backwards_from_link_to_link_while_it_grows(app, ada):
    for limit, sizes in {50: [50, 50, 20], 60: [60, 60], 100: [100, 20]}.items():
        (talk,) = fill(app, ada, 1, messages=120)
        said = ada.get(f"/api/conversations/{talk}").json["messages"]
        pages = walk(ada, f"/api/conversations/{talk}/messages", lambda page: ada.send(talk), limit=limit)  # noqa: B023
        assert [len(page) for page in pages] == sizes
        assert together(pages[::-1]) == said


def test_the_status_of_everybody_comes_in_pages_too(app, ada):
    for n in range(4):
        app.test_client().signup(f"user {n}")
    everybody = ada.get("/api/users/status").json["users"]
    assert ids(everybody) == [1, 2, 3, 4, 5]
    assert ada.get("/api/users/status?limit=2&after=1").json == {"users": everybody[1:3]}
    assert ada.get("/api/users/status?limit=2&after=0").json == {"users": everybody[:2]}
    assert [len(page) for page in walk(ada, "/api/users/status", limit=2)] == [2, 2, 1]
    for limit in (5, 6):
        assert walk(ada, "/api/users/status", limit=limit) == [everybody]


def test_who_signs_up_meanwhile_comes_last(app, ada, bob):
    newcomers = ["eve", "mallory"]

    def meanwhile(page):
        if newcomers:
            ada.signup(newcomers.pop())

    assert [ids(page) for page in walk(ada, "/api/users/status", meanwhile, limit=1)] == [[1], [2], [3], [4]]


def test_what_is_another_s_looks_like_what_is_not_there(app, ada, bob):
    (talk,) = fill(app, bob, 1, messages=2)
    for path in ("/api/conversations/{}", "/api/conversations/{}/messages", "/api/conversations/{}?messages=0"):
        tag = bob.get(path.format(talk)).headers["ETag"]
        for condition in ({}, {"If-None-Match": tag}, {"If-None-Match": "*"}):
            for number in (talk, talk + 1000):
                assert answer(ada.get(path.format(number), headers=condition)) == MISSING


def test_pages_and_searches_show_one_s_own_only(app, ada, bob):
    mine, his = fill(app, ada, 2, messages=2), fill(app, bob, 2, messages=2)
    newest = max(mine + his) + 1
    for more in ({}, {"before": newest}, {"q": "Talk"}, {"q": "Text"}):
        assert [ids(talks(person, limit=9, **more)) for person in (ada, bob)] == [mine[::-1], his[::-1]]


# Parameters

NUMBERS = [
    ("/api/conversations", {}, "limit", 1, 100),
    ("/api/conversations", {"limit": 1}, "before", 1, MAX_ID),
    ("/api/conversations", {}, "messages", 0, 1000),
    ("/api/conversations/1", {}, "messages", 0, 1000),
    ("/api/conversations/1/messages", {}, "limit", 1, 100),
    ("/api/conversations/1/messages", {}, "before", 1, MAX_ID),
    ("/api/users/status", {}, "limit", 1, 100),
    ("/api/users/status", {"limit": 1}, "after", 0, MAX_ID),
]
NO_NUMBERS = [
    *("", " ", "abc", "-1", "+1", "1.5", "1.", "1e1", "0x1", "1_0", " 1", "1 ", "1\n", "1,2", "null", "true", "NaN"),
    *("\0", "1\0", "\u0661", "\uff11", "²", "😀", "9" * 20, "9" * 5000, 2**63, 2**64, "1;DROP TABLE message"),
]


def test_a_number_out_of_bounds_is_named(ada):
    ada.create()
    for path, others, name, low, high in NUMBERS:
        refusal = (400, {"error": f"{name} must be a whole number from {low} to {high}"})
        for bad in (low - 1, high + 1, *NO_NUMBERS):
            assert answer(ada.get(path, query_string={**others, name: bad})) == refusal, bad
        for good in (low, high):
            assert ada.get(path, query_string={**others, name: good}).status_code == 200


def test_the_place_to_go_on_from_needs_a_limit(ada):
    for query in ("before=5", "before=5&q=a&messages=1"):
        assert answer(ada.get(f"/api/conversations?{query}")) == (400, {"error": "before goes with limit"})
    for query in ("after=5", "after=0"):
        assert answer(ada.get(f"/api/users/status?{query}")) == (400, {"error": "after goes with limit"})


def test_words_to_search_for_have_bounds(ada):
    refusal = {"error": "q must be 1 to 255 characters long, not blank and without NUL"}
    for bad in ("", " ", "\t\n\u3000", "\0", "a\0b", "a" * 256, "😀" * 256):
        assert answer(ada.get("/api/conversations", query_string={"q": bad})) == (400, refusal)
    for good in ("a" * 255, "😀" * 255, "%" * 255, "/_" * 127):
        assert talks(ada, q=good) == []
        talk = ada.create(good)
        assert ids(talks(ada, q=good)) == [talk]


def test_words_that_are_no_utf_8_find_nothing(ada):
    ada.create()
    for q in ("%FF", "%C3", "%ED%A0%80", "%F4%90%80%80"):
        assert answer(ada.get(f"/api/conversations?limit=1&q={q}")) == (200, [])


# Search

FOUND = [
    ("Grüße aus Österreich", "ÖSTER"),
    ("GRÜSSE AUS ÖSTERREICH", "ö"),
    ("Красное ЯБЛОКО", "яблоко"),
    ("яблоко", "Я"),
    ("Ελλάδα", "ΕΛΛΆΔΑ"),
    ("Éa", "éA"),
    ("one two  three", "E TWO  T"),
    (" margins ", " Margins "),
    ("100% sure", "0% S"),
    ("snake_case", "E_C"),
    ("either/or", "R/O"),
    (r"C:\temp\%", r":\TEMP\%"),
    ("/%/_//", "/%/_//"),
    ('it\'s "quoted"; --', "'S \"Q"),
    ("%s %(a)s :a ? {}", "%(A)S :A ?"),
    ("😀👩‍👧", "👩‍👧"),
    ("a\nb", "A\nB"),
]
NOT_FOUND = [
    ("100 sure", "0% s"),
    ("snakeXcase", "e_c"),
    ("either or", "r/o"),
    ("C:temp", r":\temp"),
    ("anything", "%"),
    ("anything", "_"),
    ("anything", "any%ing"),
    ("anything", "/%"),
    ("anything", "\\"),
    ("one  two", "one two"),
    ("two one", "one two"),
    ("anything", "created_at"),
    ("Österreich", "Osterreich"),
]


def test_a_search_finds_names_and_texts_in_any_case(ada, echo):
    for said, q in FOUND:
        named, talked, other = ada.create(said), ada.create("."), ada.create(".")
        ada.send(talked, said)
        ada.send(other, ".")
        assert ids(talks(ada, q=q))[-2:] == [named, talked], q


def test_a_search_takes_every_character_as_it_is(ada, echo):
    for said, q in NOT_FOUND:
        ada.send(ada.create(said), said)
        assert talks(ada, q=q) == [], q


def test_a_search_shows_whole_conversations_each_once(ada, echo):
    talk = ada.create("Tea")
    for said in ("tea", "ink", "more tea"):
        ada.send(talk, said)
    assert talks(ada, q="tea") == talks(ada)
    assert len(talks(ada)[0]["messages"]) == 6


def test_a_search_comes_in_pages_too(app, ada):
    made = fill(app, ada, 7, messages=3)
    for talk in made[::2]:
        ada.put(f"/api/conversations/{talk}", json={"name": "Tea"})
    assert ids(talks(ada, q="tea")) == made[::2]
    pages = walk(ada, "/api/conversations", q="tea", limit=2, messages=1)
    assert [ids(page) for page in pages] == [[made[6], made[4]], [made[2], made[0]]]
    assert [[m["text"] for m in talk["messages"]] for talk in together(pages)] == [["Text 2"]] * 4
    assert ids(talks(ada, q="TEXT 2", limit=2, before=made[3])) == [made[2], made[1]]


# What it costs

CONVERSATIONS = {"ix_conversation_user_id_id", "ix_message_conversation_id_id"}
LISTS = [
    ("/api/conversations", {}, "before", CONVERSATIONS),
    ("/api/conversations", {"messages": 1}, "before", CONVERSATIONS),
    ("/api/conversations/{}/messages", {}, "before", {"ix_message_conversation_id_id"}),
    ("/api/users/status", {}, "after", {"uq_user_user_id", "sqlite_autoindex_user_1"}),
]
OTHERS = [
    """INSERT INTO conversation (name, user_id, created_at)
       SELECT name, "user".id, created_at FROM "user", conversation WHERE "user".id > 2""",
    """INSERT INTO message (sender, text, conversation_id, created_at)
       SELECT sender, text, conversation.id, message.created_at FROM conversation, message
       WHERE conversation.user_id > 2 AND conversation_id = 1""",
]


@pytest.fixture
def long_talk(app, ada, bob):
    """A conversation of a thousand pages, among a thousand more, among eight times as many of others'."""
    fill(app, bob, 8, messages=2)
    with app.app_context():
        everybody = [{"username": f"user {n}", "password_hash": "", "is_logged_in": False} for n in range(1100)]
        db.session.execute(db.insert(User), everybody)
        for statement in OTHERS:
            db.session.execute(text(statement))
        db.session.commit()
    (talk,) = fill(app, ada, 1, messages=1100)
    fill(app, ada, 1100, messages=2)
    with app.app_context():
        db.session.execute(text("ANALYZE"))
        db.session.commit()
    return talk


def nodes(plan):
    """Return all the nodes of a plan of PostgreSQL's."""
    return [plan] + [node for child in plan.get("Plans", ()) for node in nodes(child)]


def explained(app, statement, parameters):
    """Return the indexes that a statement reads by, what it does to a whole table, and how much work it is.

    Work is counted in SQLite's instructions, or in the rows that PostgreSQL's nodes touch. To sort what a LIMIT
    has cut off is not to sort a whole table.
    """
    with app.app_context(), db.engine.connect() as connection:
        if db.engine.dialect.name == "sqlite":
            driver, instructions = connection.connection.driver_connection, []
            driver.set_progress_handler(lambda: instructions.append(1), 1)
            connection.exec_driver_sql(statement, parameters).all()
            driver.set_progress_handler(None, 0)
            steps = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()
            plan = "\n".join(step[-1] for step in steps)
            whole = re.findall(r"SCAN (?!anon_)\w+|(?<!SCAN anon_\d\n)USE TEMP B-TREE.*", plan)
            return set(re.findall(r"INDEX (\w+)", plan)), whole, len(instructions)
        explain = f"EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) {statement}"
        plan = nodes(connection.exec_driver_sql(explain, parameters).scalar()[0]["Plan"])
    whole = [
        node["Node Type"]
        for node in plan
        if node["Node Type"] == "Seq Scan" or ("Sort" in node["Node Type"] and node["Plans"][0]["Node Type"] != "Limit")
    ]
    touched = [(node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"] for node in plan]
    return {node["Index Name"] for node in plan if "Index Name" in node}, whole, sum(touched)


def test_page_1000_costs_what_page_1_costs(app, ada, long_talk):
    for path, parameters, name, indexes in LISTS:
        path = path.format(long_talk)
        order = sorted(ids(together(walk(ada, path, limit=100, messages=0))), reverse=name == "before")

        def page(number):
            place = {name: order[number - 2]} if number > 1 else {}  # noqa: B023
            with statements(app) as sent:
                shown = items(ada.get(path, query_string={**parameters, "limit": 1, **place}))  # noqa: B023
            assert ids(shown) == [order[number - 1]]  # noqa: B023
            return explained(app, *sent[-1])

        used, whole, work = page(1)
        assert used
        assert used <= indexes
        assert whole == []
        assert page(10) == page(1000) == (used, whole, pytest.approx(work, abs=10))  # page 1 has no place to begin at


def test_a_search_goes_through_the_caller_s_own_messages_only(app, ada, bob):
    fill(app, ada, 50, messages=20)
    fill(app, bob, 150, messages=20)
    with app.app_context():
        db.session.execute(text("ANALYZE"))
        db.session.commit()
    with statements(app) as sent:
        assert talks(ada, q="nowhere", limit=20) == []
    used, whole, _ = explained(app, *sent[-1])
    assert used == CONVERSATIONS
    assert whole == []


PAGES = [
    "/api/conversations?limit=100",
    "/api/conversations?limit=100&messages=2&q=t",
    "/api/conversations?messages=2",
    "/api/conversations/1",
    "/api/conversations/1/messages?limit=100",
    "/api/users/status?limit=100",
]


def test_a_page_takes_as_many_statements_however_much_is_on_it(app, ada):
    def costs():
        for path in PAGES:
            with statements(app) as sent:
                assert ada.get(path).status_code == 200
            yield len(sent)

    ada.send(ada.create())
    few = list(costs())
    fill(app, ada, 40, messages=4)
    for n in range(3):
        ada.send(1)
        ada.signup(f"user {n}")
    assert list(costs()) == few
    assert max(few) <= 3


# Answers that a client has already

READS = [
    "/api/conversations",
    "/api/conversations?limit=1&messages=1",
    "/api/conversations?q=t",
    "/api/conversations/1",
    "/api/conversations/1/messages",
    "/api/conversations/1/messages?limit=1",
    "/api/users/status",
    "/api/users/status?limit=1",
]
CHANGES = [
    ("/api/conversations", lambda ada: ada.post("/api/conversations", json={"name": "New"})),
    ("/api/conversations", lambda ada: ada.send(1)),
    ("/api/conversations", lambda ada: ada.put("/api/conversations/1", json={"name": "Renamed"})),
    ("/api/conversations?limit=2&messages=0", lambda ada: ada.delete("/api/conversations/3")),
    ("/api/conversations?q=tea", lambda ada: ada.send(1, "Tea")),
    ("/api/conversations/1", lambda ada: ada.send(1)),
    ("/api/conversations/1", lambda ada: ada.put("/api/conversations/1", json={"name": "Renamed again"})),
    ("/api/conversations/1/messages", lambda ada: ada.send(1)),
    ("/api/users/status", lambda ada: ada.signup("bob")),
    ("/api/users/status", lambda ada: ada.login("ada")),
    ("/api/users/status", lambda ada: ada.logout()),
]


def read(client, path, tag, **headers):
    return client.get(path, headers={"If-None-Match": tag, **headers})


def test_what_a_client_has_already_is_not_sent_again(app, ada):
    fill(app, ada, 2, messages=2)
    ada.signup("bob")
    kept = ("ETag", "Link", "Cache-Control", "Vary", "Access-Control-Allow-Origin", "Access-Control-Expose-Headers")
    for path in READS:
        first = ada.get(path, headers={"Origin": KNOWN})
        tag = first.headers["ETag"]
        assert re.fullmatch('"[0-9a-f]+"', tag)
        for known in (tag, f"W/{tag}", f'"a", W/"b",{tag}', "*"):
            again = read(ada, path, known, Origin=KNOWN)
            assert (again.status_code, again.data) == (304, b"")
            assert [again.headers.get(name) for name in kept] == [first.headers.get(name) for name in kept]
        for unknown in ('"a"', f'"{tag[1:-2]}"', 'W/"a", "b"', "nonsense", ""):
            again = read(ada, path, unknown)
            assert (again.status_code, again.data) == (200, first.data)


def test_an_answer_that_has_changed_is_sent(app, ada, client):
    fill(app, ada, 3, messages=2)
    for path, change in CHANGES:
        reader = client if "status" in path else ada
        before = reader.get(path)
        assert change(ada).status_code < 300
        after = read(reader, path, before.headers["ETag"])
        assert after.status_code == 200
        assert after.json != before.json
        assert after.headers["ETag"] != before.headers["ETag"]
        assert read(reader, path, after.headers["ETag"]).status_code == 304


def test_what_happens_elsewhere_changes_nothing(app, ada, bob):
    fill(app, ada, 2, messages=2)
    paths = (
        "/api/conversations/1",
        "/api/conversations/1/messages",
        "/api/users/status",
        "/api/conversations?before=2&limit=1",
    )
    tags = {path: ada.get(path).headers["ETag"] for path in paths}
    ada.send(2)
    bob.send(bob.create())
    assert [read(ada, path, tag).status_code for path, tag in tags.items()] == [304] * 4


def test_no_shared_cache_keeps_what_is_private(app, ada):
    fill(app, ada, 2, messages=2)
    for path in READS:
        for response in (first := ada.get(path), read(ada, path, first.headers["ETag"])):
            assert set(response.headers["Cache-Control"].split(", ")) == {"private", "no-cache"}
            assert {"Cookie", "Origin"} <= set(response.headers["Vary"].split(", "))
    for path in ("/api/conversations?limit=0", "/api/users/status?limit=0", "/api/conversations/9"):
        refusal = read(ada, path, "*")
        assert refusal.status_code in (400, 404)
        assert refusal.headers["Cache-Control"] == "no-store"
        assert "ETag" not in refusal.headers


def test_another_s_tag_is_no_help(app, ada, bob):
    for person in (ada, bob):
        fill(app, person, 1, messages=2)
    his = bob.get("/api/conversations").headers["ETag"]
    assert ids(read(ada, "/api/conversations", his).json) == [1]


def test_a_tag_is_no_session(app, ada, client):
    fill(app, ada, 1, messages=2)
    for path in READS[:6]:
        for known in (ada.get(path).headers["ETag"], "*"):
            assert answer(read(client, path, known)) == (401, {"error": "Login required"})
