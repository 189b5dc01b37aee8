"""How the databases execute the queries of requests: by indexes, and without more work for more rows."""

from urllib.parse import parse_qsl

import pytest
from sqlalchemy import inspect

from app import db
from app.models.exchange import set_abandoned_failed
from tests.helpers.data import add_conversations, execute, get_items, get_next_url
from tests.helpers.queries import BODY, REQUESTS, explain, record_queries

ADD_USERS = """INSERT INTO "user" (id, user_id, username, password_hash, is_logged_in, session_token)
    WITH RECURSIVE n(i) AS (SELECT 100 UNION ALL SELECT i + 1 FROM n WHERE i < 1200)
    SELECT i, i, 'user ' || i, '', false, 'token ' || i FROM n"""
ADD_CONVERSATIONS = """INSERT INTO conversation (name, user_id, created_at, updated_at)
    SELECT name, "user".id, created_at, updated_at FROM conversation, "user" WHERE "user".id >= 100"""
ADD_MESSAGES = """INSERT INTO message (sender, text, conversation_id, created_at)
    SELECT sender, text, conversation.id, message.created_at FROM conversation, message
    WHERE conversation.user_id >= 100 AND message.conversation_id = 1 AND conversation.user_id % 10 = :part"""


@pytest.fixture
def many_rows(app, ada, bob):
    """A conversation of ada with 1,100 messages, among 2,000 of hers and eight of each of 1,100 other users."""
    add_conversations(app, bob, 8, messages=2)
    for statement in (ADD_USERS, ADD_CONVERSATIONS):
        execute(app, statement)
    for part in range(10):  # a statement may not take longer than statement_timeout
        execute(app, ADD_MESSAGES, part=part)
    add_conversations(app, ada, 2000, messages=2)
    execute(app, "UPDATE conversation SET archived_at = updated_at WHERE id % 20 = 0")
    [id] = add_conversations(app, ada, 1, messages=1100)
    execute(app, "ANALYZE")
    return id


def explain_requests(app, client, id):
    """Return (indexes used, full scans) of the queries of each request in REQUESTS, those of all replies included."""
    ids = {"id": id, "message_id": client.list_messages(id)[500]["id"], "user_id": client.user_id}
    plans = {}
    for name, (method, path) in REQUESTS.items():
        with record_queries(app) as queries:
            body = {**BODY, "message_id": ids["message_id"]}
            response = client.open(path.format(**ids), method=method, json=body, headers={"Idempotency-Key": name[:4]})
            assert response.status_code < 300, (name, response.get_data())
            response.close()
        plans[name] = explain_queries(app, queries)
        client.login("ada")
    with record_queries(app) as queries, app.app_context():
        set_abandoned_failed(set())
    plans["sweep of abandoned replies"] = explain_queries(app, queries)
    return plans


def explain_queries(app, queries):
    """Return (indexes used, full scans of tables) of recorded queries."""
    indexes, scans = set(), []
    for statement, parameters in queries:
        if statement.split()[0] in ("SELECT", "WITH", "UPDATE", "DELETE"):
            parameters = parameters[0] if isinstance(parameters, list) else parameters
            used, full, _ = explain(app, statement, parameters)
            indexes |= used
            scans += [(scan, statement) for scan in full if "SCAN" in scan.upper()]
    return indexes, scans


def test_no_request_scans_a_whole_table(app, ada, many_rows):
    plans = explain_requests(app, ada, many_rows)
    assert {name: scans for name, (_, scans) in plans.items() if scans} == {}


def test_every_index_serves_a_request(app, ada, many_rows):
    plans = explain_requests(app, ada, many_rows)
    with app.app_context():
        inspector = inspect(db.engine)
    indexes = {index["name"] for table in ("conversation", "message") for index in inspector.get_indexes(table)}
    used = {index for names, _ in plans.values() for index in names}
    # PostgreSQL reads it only where most conversations are archived, see the test of the filter by archived.
    assert indexes - used <= {"ix_conversation_unarchived"}


def get_url_after_pages(client, url, pages):
    """Return the URL of the page of one item that follows so many pages of 100 items."""
    for _ in range(pages):
        url = get_next_url(client.get(url))
    return url.replace("limit=100", "limit=1")


@pytest.mark.parametrize("archived", ["true", "false"])
@pytest.mark.parametrize("others", ["limit=20", "limit=20&messages=0", "messages=0", "limit=20&messages=0&q=nowhere"])
def test_filter_by_archived_reads_no_other_conversations_in_recent_order(app, ada, many_rows, archived, others):
    rare = "UPDATE conversation SET archived_at = CASE WHEN (id % 20 = 0) = :archived THEN updated_at END"
    execute(app, rare, archived=archived == "true")
    execute(app, "ANALYZE")
    with record_queries(app) as queries:
        ada.list_conversations(archived=archived, order="recent", **dict(parse_qsl(others)))
    indexes, scans, _ = explain(app, *queries[-1])
    assert f"ix_conversation_{'archived' if archived == 'true' else 'unarchived'}" in indexes
    assert [scan for scan in scans if "SCAN" in scan.upper()] == []


PAGED_PATHS = [
    "/api/conversations?limit=100",
    "/api/conversations?limit=100&messages=1",
    "/api/conversations?limit=100&order=recent",
    "/api/conversations/{id}/messages?limit=100",
    "/api/users/status?limit=100",
]


def test_page_1000_takes_no_more_work_than_page_100(app, ada, many_rows):
    for path in PAGED_PATHS:
        plans = []
        for pages in (1, 10):
            url = get_url_after_pages(ada, path.format(id=many_rows), pages)
            with record_queries(app) as queries:
                assert len(get_items(ada.get(url))) == 1, url
            plans.append([explain(app, *query) for query in queries if query[0].startswith("SELECT")])
        works = [sum(work for _, _, work in plan) for plan in plans]
        assert works[1] == pytest.approx(works[0], abs=20), path
        assert [scans for _, scans, _ in plans[1] if scans] == [], path


@pytest.mark.parametrize("path", ["/api/conversations?limit=20&q=nowhere", "/api/messages?q=nowhere"])
def test_search_reads_messages_of_the_caller_only(app, ada, bob, path):
    add_conversations(app, ada, 5, messages=20)
    add_conversations(app, bob, 600, messages=20)
    execute(app, "ANALYZE")
    with record_queries(app) as queries:
        assert ada.get(path).json == []
    indexes, scans = explain_queries(app, queries[-1:])
    assert "ix_message_conversation_id_id" in indexes
    assert [scan for scan, _ in scans if "message" in scan] == []
