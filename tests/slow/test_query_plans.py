"""How the databases execute the queries of requests: by indexes, and without more work for more rows."""

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


def explain_queries(app, queries):
    """Return (indexes used, full scans of tables) of recorded queries."""
    indexes, scans = set(), []
    for statement, parameters in queries:
        if statement.split()[0] in ("SELECT", "WITH", "UPDATE", "DELETE"):
            used, full, _ = explain(app, statement, parameters[0] if isinstance(parameters, list) else parameters)
            indexes |= used
            scans += [(scan, statement) for scan in full if "SCAN" in scan.upper()]
    return indexes, scans


def test_no_request_scans_a_whole_table_and_every_index_serves_one(app, ada, many_rows):
    ids = {"id": many_rows, "message_id": ada.list_messages(many_rows)[500]["id"], "user_id": ada.user_id}
    used = set()
    for name, (method, path) in REQUESTS.items():
        with record_queries(app) as queries:
            body = {**BODY, "message_id": ids["message_id"]}
            response = ada.open(path.format(**ids), method=method, json=body, headers={"Idempotency-Key": name[:4]})
            assert response.status_code < 300, (name, response.get_data())
            response.close()
        indexes, scans = explain_queries(app, queries)
        assert scans == [], name
        used |= indexes
        ada.login("ada")
    with record_queries(app) as queries, app.app_context():
        set_abandoned_failed(set())
    indexes, scans = explain_queries(app, queries)
    assert scans == []
    with app.app_context():
        every = {
            index["name"] for table in ("conversation", "message") for index in inspect(db.engine).get_indexes(table)
        }
    # PostgreSQL reads the exception only where most conversations are archived, see the next test.
    assert every - used - indexes <= {"ix_conversation_unarchived"}


@pytest.mark.parametrize("archived", ["true", "false"])
def test_filter_by_archived_reads_no_other_conversations_in_recent_order(app, ada, many_rows, archived):
    rare = "UPDATE conversation SET archived_at = CASE WHEN (id % 20 = 0) = :archived THEN updated_at END"
    execute(app, rare, archived=archived == "true")
    execute(app, "ANALYZE")
    for others in ({"limit": 20}, {"limit": 20, "messages": 0}, {"messages": 0}, {"limit": 20, "q": "nowhere"}):
        with record_queries(app) as queries:
            ada.list_conversations(archived=archived, order="recent", **others)
        indexes, scans = explain_queries(app, queries[-1:])
        assert f"ix_conversation_{'archived' if archived == 'true' else 'unarchived'}" in indexes, others
        assert scans == [], others


PAGED_PATHS = [
    "/api/conversations?limit=100",
    "/api/conversations?limit=100&messages=1",
    "/api/conversations?limit=100&order=recent",
    "/api/conversations/{id}/messages?limit=100",
    "/api/users/status?limit=100",
]


def get_url_after_pages(client, url, pages):
    """Return the URL of the page of one item that follows so many pages of 100 items."""
    for _ in range(pages):
        url = get_next_url(client.get(url))
    return url.replace("limit=100", "limit=1")


def test_page_1000_takes_no_more_work_than_page_100(app, ada, many_rows):
    for path in PAGED_PATHS:
        works = []
        for pages in (1, 10):
            url = get_url_after_pages(ada, path.format(id=many_rows), pages)
            with record_queries(app) as queries:
                assert len(get_items(ada.get(url))) == 1, url
            plans = [explain(app, *query) for query in queries if query[0].startswith("SELECT")]
            assert [scans for _, scans, _ in plans if scans] == [], path
            works.append(sum(work for _, _, work in plans))
        assert works[1] == pytest.approx(works[0], abs=20), path


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
