"""Requests, the queries that they send, and the plans by which the databases execute them."""

import re
from collections import Counter
from contextlib import contextmanager
from threading import get_ident

from sqlalchemy import event

from app import db
from tests.conftest import PASSWORD

REQUESTS = {
    "list": ("GET", "/api/conversations"),
    "list with messages": ("GET", "/api/conversations?messages=1"),
    "page": ("GET", "/api/conversations?limit=20"),
    "later page": ("GET", "/api/conversations?limit=20&before={id}"),
    "recent order": ("GET", "/api/conversations?limit=20&order=recent"),
    "search": ("GET", "/api/conversations?limit=20&messages=0&q=nowhere"),
    "archived": ("GET", "/api/conversations?archived=true&order=recent&limit=20&messages=0"),
    "not archived": ("GET", "/api/conversations?archived=false&order=recent&limit=20&messages=0"),
    "conversation": ("GET", "/api/conversations/{id}"),
    "messages": ("GET", "/api/conversations/{id}/messages"),
    "earlier messages": ("GET", "/api/conversations/{id}/messages?before={message_id}"),
    "versions": ("GET", "/api/conversations/{id}?versions=1"),
    "versions of a message": ("GET", "/api/conversations/{id}/messages/{message_id}/versions"),
    "message": ("GET", "/api/conversations/{id}/messages/{message_id}"),
    "events": ("GET", "/api/conversations/{id}/messages/{message_id}/events"),
    "rename": ("PUT", "/api/conversations/{id}"),
    "archive": ("PATCH", "/api/conversations/{id}"),
    "title": ("POST", "/api/conversations/{id}/title"),
    "change of the branch": ("PUT", "/api/conversations/{id}/current"),
    "send, history and idempotency key": ("POST", "/api/conversations/{id}/messages"),
    "edit": ("PUT", "/api/conversations/{id}/messages/{message_id}"),
    "stop": ("POST", "/api/conversations/{id}/messages/{message_id}/stop"),
    "session token": ("GET", "/api/current_user"),
    "login": ("POST", "/api/login"),
    "logout": ("POST", "/api/logout/{user_id}"),
    "delete": ("DELETE", "/api/conversations/{id}"),
    "users": ("GET", "/api/users/status?limit=20"),
}
BODY = {"name": "New", "archived": True, "text": "Hello", "message_id": 1, "username": "ada", "password": PASSWORD}


@contextmanager
def record_queries(app):
    """Record the (SQL, parameters) that are sent while the block is executed."""
    queries = []

    def record(connection, cursor, statement, parameters, context, executemany):
        queries.append((statement, parameters))

    with app.app_context():
        engine = db.engine
    event.listen(engine, "before_cursor_execute", record)
    try:
        yield queries
    finally:
        event.remove(engine, "before_cursor_execute", record)


@contextmanager
def count_connections(app):
    """Count the connections that threads use while the block is executed; yield [the most of one thread at a time]."""
    in_use, most = Counter(), [0]

    def check_out(connection, record, proxy):
        record.info["thread"] = get_ident()
        in_use[get_ident()] += 1
        most[0] = max(most[0], in_use[get_ident()])

    def check_in(connection, record):
        in_use[record.info.pop("thread", None)] -= 1

    with app.app_context():
        pool = db.engine.pool
    event.listen(pool, "checkout", check_out)
    event.listen(pool, "checkin", check_in)
    try:
        yield most
    finally:
        event.remove(pool, "checkout", check_out)
        event.remove(pool, "checkin", check_in)


def explain(app, statement, parameters):
    """Return (indexes used, full scans and sorts of whole tables, amount of work) of a query.

    The work is counted in SQLite's instructions, or in the rows that PostgreSQL's nodes touch. Sorting what a LIMIT
    has cut off is not sorting a whole table.
    """
    with app.app_context(), db.engine.connect() as connection:
        if db.engine.dialect.name == "sqlite":
            return explain_for_sqlite(connection, statement, parameters)
        return explain_for_postgresql(connection, statement, parameters)


def explain_for_sqlite(connection, statement, parameters):
    instructions = []
    driver_connection = connection.connection.driver_connection
    driver_connection.set_progress_handler(lambda: instructions.append(1), 1)
    connection.exec_driver_sql(statement, parameters)
    driver_connection.set_progress_handler(None, 0)
    steps = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()
    plan = "\n".join(step[-1] for step in steps)
    full_scan = r"SCAN (?!anon_|above|below|CONSTANT)\w+\b(?! VIRTUAL)"  # a virtual table is json_each()
    scans = re.findall(rf"{full_scan}|(?<!SCAN anon_\d\n)USE TEMP B-TREE FOR ORDER BY", plan)
    # A partial index has no rows but those of its condition.
    scans = [scan for scan in scans if f"{scan} USING INDEX ix_message_in_progress" not in plan]
    connection.rollback()
    return set(re.findall(r"INDEX (\w+)", plan)), scans, len(instructions)


def explain_for_postgresql(connection, statement, parameters):
    explained = connection.exec_driver_sql(f"EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) {statement}", parameters)
    nodes = flatten_plan(explained.scalar()[0]["Plan"])
    connection.rollback()
    scans = [
        f"{node['Node Type']} {node.get('Relation Name', '')}".strip()
        for node in nodes
        if node["Node Type"] == "Seq Scan" or ("Sort" in node["Node Type"] and not has_limit(node))
    ]
    work = sum((node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"] for node in nodes)
    return {node["Index Name"] for node in nodes if "Index Name" in node}, scans, work


def has_limit(node):
    """Return whether a LIMIT bounds the rows of a node of a plan of PostgreSQL's."""
    return any(descendant["Node Type"] == "Limit" for descendant in flatten_plan(node))


def flatten_plan(node):
    """Return all nodes of a plan of PostgreSQL's."""
    return [node, *(descendant for child in node.get("Plans", ()) for descendant in flatten_plan(child))]
