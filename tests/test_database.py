"""Column types and SQL functions on both databases, connections, locks, and reads in autocommit mode."""

import json
import sqlite3
import time
import unicodedata
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta, timezone
from functools import partial
from threading import Timer

import psycopg
import pytest
from psycopg.errors import DeadlockDetected
from sqlalchemy import func, literal, select
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError

from app import create_app, db
from app.bot import BotError
from app.database import (
    Timestamp,
    autocommit,
    contains,
    database_now,
    fold_case,
    format_timestamp,
    iso8601,
    json_array,
    json_object,
)
from app.models import Message
from tests.conftest import (
    PASSWORD,
    SHARED_SESSIONS,
    create_logged_in_client,
    create_other_client,
    echo,
    on_postgresql,
    on_sqlite,
)
from tests.helpers.bots import Gate, start_reply, wait_for_text
from tests.helpers.data import add_conversations, execute, get_answer, get_texts
from tests.helpers.server import TIMEOUT, measure, run_concurrently, run_in_background, wait_until

TIMESTAMPS = [
    datetime(2026, 1, 31, 12, 0, 0, 0, UTC),
    datetime(2026, 12, 31, 23, 59, 59, 999999, UTC),
    datetime(2026, 1, 1, 1, 30, 0, 5, timezone(timedelta(hours=5, minutes=45))),
    datetime(1, 1, 1, tzinfo=UTC),
    datetime(9999, 12, 31, 23, 59, 59, 1, tzinfo=UTC),
]
UNUSUAL_TEXTS = [
    *("", " ", "é✓", "e\u0301", "😀👩‍👩‍👧", '"', "\\", '\\"', "\\u0041", "'", "%s :a", "{}", "null", "</script>"),
    *("\x01", "\b\f\n\r\t\v", "\x7f\x80\x9f", "\u2028\u2029", "\ufeff", "\ufffe\uffff", "\U0010ffff"),
]
UNASSIGNED = ("Cn", "Co", "Cs")  # categories of code points that are no characters, or none yet
SHORT_TIMEOUT = 0.3  # seconds, and those for which a lock is held


def evaluate(app, *expressions):
    """Return the values that the database computes for SQL expressions."""
    with app.app_context():
        return db.session.execute(select(*expressions)).one()


# Types and functions


@pytest.mark.parametrize("timestamp", TIMESTAMPS, ids=str)
def test_timestamp_is_returned_in_utc_and_as_the_api_shows_it(app, timestamp):
    column, none = literal(timestamp, Timestamp), literal(None, Timestamp)
    value, text, *nones = evaluate(app, column, iso8601(column), none, iso8601(none))
    assert (value, value.utcoffset(), nones) == (timestamp, timedelta(0), [None, None])
    assert text == format_timestamp(timestamp)
    assert datetime.fromisoformat(text) == timestamp


@pytest.mark.parametrize("seconds", [0, -30, 90])
def test_database_now_is_the_current_time_plus_seconds(app, seconds):
    now = database_now(seconds)
    value, *is_before = evaluate(app, now, now < database_now(seconds + 3600), now < database_now(seconds - 3600))
    assert value.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) + timedelta(seconds=seconds) - value) < timedelta(seconds=TIMEOUT)
    assert [bool(value) for value in is_before] == [True, False]


@on_sqlite
def test_sqlite_stores_timestamps_as_the_api_shows_them(app, ada, database):
    messages = ada.send_message(ada.create_conversation()).json
    with closing(sqlite3.connect(make_url(database).database)) as connection:
        rows = connection.execute('SELECT created_at FROM message UNION ALL SELECT last_login FROM "user"').fetchall()
    [user] = ada.get("/api/users/status").json["users"]
    assert rows == [*((message["created_at"],) for message in messages), (user["last_login"],)]


@pytest.mark.parametrize("text", UNUSUAL_TEXTS)
def test_json_object_is_json_of_the_values(app, text):
    items = {"text": literal(text), "none": literal(None, Message.text.type), "id": literal(2**63 - 1, Message.id.type)}
    [result] = evaluate(app, json_object(**items))
    assert json.loads(result) == {"text": text, "none": None, "id": 2**63 - 1}


@pytest.mark.parametrize("count", [0, 1, 1000])
def test_json_array_has_all_rows_in_order(app, ada, count):
    [id] = add_conversations(app, ada, 1, messages=count)
    with app.app_context():
        page = Message.select_page(id).subquery()
        result = db.session.scalar(select(json_array(page.c.json)))
    assert get_texts(json.loads(result)) == [f"Text {n}" for n in range(count)]


@pytest.mark.parametrize("context", ["{}", "a{}", "{}a", "a{} b", "{}\u0301"])
def test_every_character_is_folded_alike_by_python_and_the_database(app, context):
    assigned = [chr(number) for number in range(1, 0x110000) if unicodedata.category(chr(number)) not in UNASSIGNED]
    for start in range(0, len(assigned), 20_000):
        texts = [context.format(character) for character in assigned[start : start + 20_000]]
        # Between two other characters the folded text must be found exactly.
        folded = "|".join(fold_case(text) for text in texts)
        [is_equal] = evaluate(app, contains(literal(f"-{'|'.join(texts)}-"), f"-{folded}-"))
        assert is_equal, f"between U+{ord(assigned[start]):04X} and {start + 20_000} characters later"


@pytest.mark.parametrize(
    ("text", "q", "is_found"),
    [
        ("Straße", "STRASSE", True),
        ("ΟΔΟΣ", "οδος", True),
        ("οδος", "ΟΔΟΣ", True),
        ("İ", "i\u0307", True),
        ("ǅ", "ǆ", True),
        ("ﬀ", "FF", True),
        ("Å", "a\u030a", True),
        ("Å", "a", False),
        ("K", "k", True),
        ("_", "a", False),
        ("%", "", True),
    ],
)
def test_contains_ignores_case_and_normal_form(app, text, q, is_found):
    assert [bool(value) for value in evaluate(app, contains(literal(text), fold_case(q)))] == [is_found]


# Connections


@on_sqlite
def test_connections_to_sqlite_are_durable_and_strict_and_do_not_wait(database):
    pragmas = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 0}  # 2 is FULL
    with create_app({"DATABASE_URL": database}).app_context():
        with autocommit(db.engine).connect() as first, db.engine.connect() as second:
            for connection in (first, second):
                assert {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in pragmas} == pragmas
        db.engine.dispose()


POSTGRESQL_OPTIONS = {
    "TimeZone": ("Asia/Kathmandu", "UTC"),
    "DateStyle": ("SQL,DMY", "ISO, DMY"),
    "client_encoding": ("LATIN1", "UTF8"),
    "statement_timeout": ("0", "10s"),
}


@on_postgresql
def test_postgresql_server_with_other_defaults_gives_the_same_responses(make_app, database):
    options = "%20".join(f"-c%20{name}%3D{value}" for name, (value, _) in POSTGRESQL_OPTIONS.items())
    app = make_app(DATABASE_URL=f"{database}?options={options}", **SHARED_SESSIONS)
    for name, (_, expected) in POSTGRESQL_OPTIONS.items():
        assert execute(app, f"SHOW {name}") == [(expected,)]
    ada = create_logged_in_client(app, "ada")
    messages = ada.send_message(ada.create_conversation(), "é ✓").json
    users = ada.get("/api/users/status").json
    for timestamp in (users["users"][0]["last_login"], messages[0]["created_at"]):
        assert abs(datetime.now(UTC) - datetime.fromisoformat(timestamp)) < timedelta(seconds=TIMEOUT)
    other = create_other_client(ada, make_app(**SHARED_SESSIONS))
    assert other.get("/api/users/status").json == users
    assert other.list_messages(1) == messages


@on_postgresql
@pytest.mark.parametrize("level", ["serializable", "repeatable%5C%20read"])
def test_concurrent_writes_of_one_user_succeed_whatever_isolation_level_is_the_default(make_app, database, level):
    url = f"{database}?options=-c%20default_transaction_isolation%3D{level}"
    ada = create_logged_in_client(make_app(DATABASE_URL=url, bot=echo, MAX_CONCURRENT_REPLIES=24), "ada")
    ids = [ada.create_conversation() for _ in range(8)]

    def write(number):
        client, id = create_other_client(ada), ids[number % len(ids)]
        login, sent = client.login("ada"), client.send_message(id, str(number))
        renamed = client.put(f"/api/conversations/{id}", json={"name": str(number)})
        return login.status_code, sent.status_code, renamed.status_code

    assert set(run_concurrently(24, write)) == {(200, 201, 200)}
    assert sum(len(conversation["messages"]) for conversation in ada.list_conversations()) == 2 * 24


@on_postgresql
@pytest.mark.parametrize(("method", "is_transaction"), [("GET", False), ("HEAD", False), ("POST", True)])
def test_safe_request_reads_without_a_transaction(app, method, is_transaction):
    with app.test_request_context(method=method):
        first, second = (db.session.scalar(select(func.now())) for _ in range(2))
    assert (first == second) == is_transaction  # now() is the time at which a transaction began


@on_postgresql
def test_statement_that_the_server_does_not_answer_in_time_fails_and_its_connection_is_replaced(app, monkeypatch):
    monkeypatch.setattr("app.postgresql.Connection.timeout", SHORT_TIMEOUT)
    with app.app_context():
        with pytest.raises(OperationalError):
            db.session.execute(select(func.pg_sleep(TIMEOUT)))
        db.session.remove()
        monkeypatch.undo()
        assert db.session.scalar(select(literal(1))) == 1


# Locks


@contextmanager
def lock_sqlite(url):
    """Hold SQLite's write lock as another program may do; yield a function that releases it."""
    with closing(sqlite3.connect(make_url(url).database, check_same_thread=False, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield lambda: connection.execute("COMMIT")


@on_sqlite
def test_reads_go_on_while_another_program_writes_and_writes_wait(ada, database):
    with lock_sqlite(database) as release, run_in_background(ada.create_conversation) as [creation]:
        for path in ("/api/test", "/api/health", "/api/current_user", "/api/conversations", "/api/users/status"):
            assert ada.get(path).status_code == 200
        assert not creation.done()
        release()
        assert creation.result(TIMEOUT) == 1
    assert len(ada.list_conversations()) == 1


@on_sqlite
def test_write_returns_503_if_another_program_does_not_end_its_own(ada, database, monkeypatch):
    monkeypatch.setattr("app.database.SQLITE_LOCK_TIMEOUT", SHORT_TIMEOUT)
    with lock_sqlite(database):
        seconds, response = measure(ada.post, "/api/conversations", json={"name": "Tea"})
    assert get_answer(response) == (503, {"error": "The database is unavailable, try again later"})
    assert int(response.headers["Retry-After"]) > 0
    assert SHORT_TIMEOUT <= seconds < TIMEOUT
    assert ada.create_conversation() == 1


def test_new_sqlite_file_is_opened_after_another_program_has_written_to_it(tmp_path):
    url = f"sqlite:///{tmp_path / 'new.db'}"
    app = create_app({"DATABASE_URL": url})
    with lock_sqlite(url) as release:
        timer = Timer(SHORT_TIMEOUT, release)
        timer.start()
        assert execute(app, "PRAGMA journal_mode") == [("wal",)]
        timer.join()
    with app.app_context():
        db.engine.dispose()


@contextmanager
def lock_conversation(url, id):
    """Lock a conversation on PostgreSQL; yield the connection."""
    with psycopg.connect(url.replace("postgres://", "postgresql://")) as connection:
        connection.execute("UPDATE conversation SET name = 'Renamed' WHERE id = %s", [id])
        yield connection


def wait_until_blocked(connection):
    """Wait until another transaction waits for a lock of this connection's."""
    query = "SELECT count(*) FROM pg_locks WHERE pg_backend_pid() = ANY(pg_blocking_pids(pid))"
    wait_until(lambda: connection.execute(query).fetchone()[0])


@on_postgresql
def test_request_whose_transaction_is_ended_because_of_a_deadlock_returns_503(ada, database):
    id = ada.create_conversation()
    with (
        lock_conversation(database, id) as connection,
        run_in_background(partial(ada.delete, "/api/account", json={"password": PASSWORD})) as [deletion],
    ):
        wait_until_blocked(connection)
        with suppress(DeadlockDetected):  # PostgreSQL ends this one if the machine has stalled for a second
            connection.execute('UPDATE "user" SET last_login = now()')  # which the request has locked
        connection.commit()
    response = deletion.result()
    assert (response.status_code, "Retry-After" in response.headers) in [(503, True), (204, False)]


ENDS = {  # how the bot goes on, and the texts and statuses of the messages then
    "complete": (["Hello"], [("Hi", None), ("Hello", None)]),
    "failed": (["Hello", BotError()], [("Hi", None), ("Hello", "failed")]),
    "failed at once": ([BotError()], [("Hi", None), ("", "failed")]),
}


@on_postgresql
@pytest.mark.parametrize(("steps", "messages"), ENDS.values(), ids=ENDS)
def test_end_of_reply_is_stored_while_its_conversation_is_locked(make_app, bot, gate, database, steps, messages):
    ada = create_logged_in_client(make_app(bot=bot), "ada")
    bot.scripts["Hi"] = [gate.wait, *steps]
    id = ada.create_conversation()
    start_reply(ada, id, "Hi")
    with lock_conversation(database, id):
        gate.set()
        wait_until(lambda: [(item["text"], item.get("status")) for item in ada.list_messages(id)] == messages)


@on_postgresql
def test_growing_reply_is_stored_while_its_conversation_is_locked(make_app, bot, gate, database):
    ada, start = create_logged_in_client(make_app(bot=bot), "ada"), Gate()
    bot.scripts["Hi"] = [start.wait, "Hello ", gate.wait]
    id = ada.create_conversation()
    _, reply = start_reply(ada, id, "Hi")
    with lock_conversation(database, id):
        start.set()
        wait_for_text(ada, id, reply["id"], "Hello ")


@on_postgresql
def test_many_sends_that_wait_for_a_locked_conversation_delay_no_other_user(ada, bob, database):
    id, other_id = ada.create_conversation(), bob.create_conversation()
    clients = [create_other_client(ada) for _ in range(16)]  # more than there are connections
    with lock_conversation(database, id) as connection:
        with run_in_background(*[partial(client.send_message, id) for client in clients]) as sends:
            wait_until_blocked(connection)
            time.sleep(SHORT_TIMEOUT)  # until all wait
            assert bob.send_message(other_id).status_code == 201
            connection.commit()
        assert {send.result().status_code for send in sends} == {201}
