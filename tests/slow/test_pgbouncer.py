"""The served program on PostgreSQL through PgBouncer in transaction mode."""

import shutil
from contextlib import ExitStack

import psycopg
import pytest

from tests.helpers.postgresql import run_pgbouncer
from tests.helpers.server import run_concurrently
from tests.slow.conftest import run_server

CLIENTS = 24
POOL_SIZE = 4
CONVERSATIONS = 3
ROLE_DEFAULTS = {
    "client_encoding": "LATIN1",
    "DateStyle": "SQL, DMY",
    "TimeZone": "Asia/Kathmandu",
    "default_transaction_isolation": "serializable",
    "statement_timeout": "1min",
}


@pytest.fixture
def pgbouncer(postgresql):
    """The URL of a PgBouncer in transaction mode, whose clients share a few connections to PostgreSQL."""
    if not shutil.which("pgbouncer"):
        pytest.skip("PgBouncer is not installed")
    with psycopg.connect(postgresql.url, autocommit=True) as connection:
        for name, value in ROLE_DEFAULTS.items():
            connection.execute(f"ALTER ROLE chat SET {name} TO '{value}'")
    with run_pgbouncer(postgresql, POOL_SIZE) as (url, _):
        yield url


def use_api(server, number):
    """Sign up and use all that needs the database, several times; return the statuses and the last lists."""
    with server.client() as client:
        responses = [client.signup(f"user {number}")]
        for _ in range(CONVERSATIONS):
            responses.append(client.login(f"user {number}"))
            id = client.create_conversation(f"é ✓ {number}")
            responses += [client.send_message(id, f"{text} {number}") for text in ("Hello", "/long 3", "é ✓")]
            responses.append(client.put(f"/api/conversations/{id}", {"name": f"Renamed {number}"}))
            responses += [
                client.get(path) for path in ("/api/users/status", "/api/current_user", "/api/messages?q=%C3%A9")
            ]
            responses.append(client.get("/api/conversations"))
        return [response.status for response in responses], responses[-1].json


def show_settings(url):
    """Return the settings that PgBouncer's connections to PostgreSQL have when another program uses them."""
    with ExitStack() as stack:
        connections = [stack.enter_context(psycopg.connect(url)) for _ in range(POOL_SIZE)]
        return [
            {name: connection.execute(f"SHOW {name}").fetchone()[0] for name in ROLE_DEFAULTS}
            for connection in connections  # in a transaction each, so that none of them can share
        ]


def test_concurrent_clients_get_no_error_through_pgbouncer_and_leave_no_setting_behind(pgbouncer):
    defaults = show_settings(pgbouncer)
    url = f"{pgbouncer}?prepare_threshold=none"
    with run_server(url, SIGNUP_RATE_LIMIT="1000 per minute") as server:
        results = run_concurrently(CLIENTS, lambda number: use_api(server, number))
        assert {status for statuses, _ in results for status in statuses} == {200, 201}, server.output
        for number, (_, conversations) in enumerate(results):
            assert [conversation["name"] for conversation in conversations] == [f"Renamed {number}"] * CONVERSATIONS
            for conversation in conversations:
                texts = [message["text"] for message in conversation["messages"][::2]]
                assert texts == [f"{text} {number}" for text in ("Hello", "/long 3", "é ✓")]
        assert "Traceback" not in server.output
    assert show_settings(pgbouncer) == defaults
