"""The database: what the migrations make of it, whoever runs them, and what it refuses and keeps."""

import os
import re
import sqlite3
import subprocess
import sys
from contextlib import ExitStack, closing
from datetime import UTC, datetime, timedelta
from threading import Timer

import pytest
from flask_migrate import check, downgrade, upgrade
from sqlalchemy import inspect
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, IntegrityError

from app import create_app, db
from tests.conftest import NEEDS_POSTGRESQL, newcomer
from tests.serving import PATIENCE, ROOT

on_sqlite = pytest.mark.parametrize("database", ["sqlite"], indirect=True)
on_postgresql = pytest.mark.parametrize("database", [pytest.param("postgresql", marks=NEEDS_POSTGRESQL)], indirect=True)

MOMENT = "TIMESTAMP WITH TIME ZONE"
SCHEMA = {
    "user": {
        "id": "BIGINT NOT NULL",
        "user_id": "BIGINT NOT NULL",
        "username": "VARCHAR(80) NOT NULL",
        "password_hash": "VARCHAR(255) NOT NULL",
        "is_logged_in": "BOOLEAN NOT NULL",
        "last_login": MOMENT,
        "last_logout": MOMENT,
    },
    "conversation": {
        "id": "BIGINT NOT NULL",
        "name": "VARCHAR(255) NOT NULL",
        "user_id": "BIGINT NOT NULL",
        "created_at": f"{MOMENT} NOT NULL",
    },
    "message": {
        "id": "BIGINT NOT NULL",
        "sender": "VARCHAR(4) NOT NULL",
        "text": "TEXT NOT NULL",
        "conversation_id": "BIGINT NOT NULL",
        "created_at": f"{MOMENT} NOT NULL",
        "idempotency_key": "VARCHAR(255)",
    },
}
ROWS = {
    "user": """INSERT INTO "user" (username, password_hash, is_logged_in, last_login)
        VALUES ('ada', 'x', true, '2026-01-31T12:00:00.000000Z')""",
    "conversation": """INSERT INTO conversation (name, user_id, created_at)
        VALUES ('Talk', 1, '2026-01-31T12:00:01.000000Z')""",
    "message": """INSERT INTO message (sender, text, conversation_id, created_at)
        VALUES ('bot', 'Hello ✓', 1, '2026-01-31T12:00:02.000000Z')""",
}


@pytest.fixture
def engine(app):
    with app.app_context():
        return db.engine


@pytest.fixture
def empty(empty_database):
    """An application in its context, on a database without tables."""
    app = create_app({"DATABASE_URL": empty_database})
    with app.app_context():
        yield app
        db.engine.dispose()


def execute(engine, *statements):
    """Run the statements in one transaction; return the rows of the last, if it makes some."""
    with engine.begin() as connection:
        results = [connection.exec_driver_sql(statement) for statement in statements]
        return [tuple(row) for row in results[-1]] if results[-1].returns_rows else None


def contents(engine):
    return {table: execute(engine, f'SELECT * FROM "{table}"') for table in SCHEMA}


def tables(engine):
    return set(inspect(engine).get_table_names())


def test_the_tables_have_the_documented_columns(engine):
    def spelled(column):
        kind = column["type"].compile(engine.dialect)
        kind = {"INTEGER": "BIGINT", "DATETIME": MOMENT}.get(kind, kind) if engine.name == "sqlite" else kind
        return kind if column["nullable"] else f"{kind} NOT NULL"

    assert tables(engine) == {*SCHEMA, "alembic_version"}
    for table, columns in SCHEMA.items():
        assert {column["name"]: spelled(column) for column in inspect(engine).get_columns(table)} == columns


def test_constraints_and_indexes_are_named_by_the_convention(engine):
    inspector = inspect(engine)
    uniques = {
        (table, unique["name"], *unique["column_names"])
        for table in SCHEMA
        for unique in inspector.get_unique_constraints(table)
    }
    assert uniques == {("user", "uq_user_user_id", "user_id"), ("user", "uq_user_username", "username")}
    indexes = {
        (table, index["name"], bool(index["unique"]), *index["column_names"])
        for table in SCHEMA
        for index in inspector.get_indexes(table)
        if not index.get("duplicates_constraint")
    }
    keys = ("conversation_id", "idempotency_key")
    assert indexes == {
        ("conversation", "ix_conversation_user_id_id", False, "user_id", "id"),
        ("message", "ix_message_conversation_id_id", False, "conversation_id", "id"),
        ("message", "ix_message_conversation_id_idempotency_key", True, *keys),
    }
    checks = {(table, check["name"]) for table in SCHEMA for check in inspector.get_check_constraints(table)}
    assert checks == {("message", "ck_message_sender")}
    if engine.name == "postgresql":  # SQLite's own key is spelled in its column, and has no name
        assert {inspector.get_pk_constraint(table)["name"] for table in SCHEMA} == {f"pk_{table}" for table in SCHEMA}


@pytest.mark.parametrize(
    ("table", "column", "parent", "name"),
    [
        ("conversation", "user_id", "user", "fk_conversation_user_id_user"),
        ("message", "conversation_id", "conversation", "fk_message_conversation_id_conversation"),
    ],
)
def test_a_child_goes_with_its_parent(engine, table, column, parent, name):
    [key] = inspect(engine).get_foreign_keys(table)
    assert key["constrained_columns"] == [column]
    assert (key["referred_table"], key["referred_columns"]) == (parent, ["id"])
    assert (key["name"], key["options"]) == (name, {"ondelete": "CASCADE"})
    execute(engine, *ROWS.values(), f'DELETE FROM "{parent}"')
    assert contents(engine)[table] == []


@on_sqlite
def test_on_sqlite_ids_are_never_given_twice(engine):
    rows = execute(engine, "SELECT name, sql FROM sqlite_master WHERE type = 'table'")
    assert {name for name, sql in rows if "AUTOINCREMENT" in sql} == set(SCHEMA)


@pytest.mark.parametrize("table", SCHEMA)
def test_an_id_is_not_reused(engine, table):
    execute(engine, *ROWS.values(), f'DELETE FROM "{table}" WHERE id = 1')
    parents = list(SCHEMA)[: list(SCHEMA).index(table)]
    assert execute(engine, ROWS[table], f'SELECT id FROM "{table}"') == [(2,)]
    assert all(len(contents(engine)[parent]) == 1 for parent in parents)


def test_ids_have_64_bits(engine):
    name = "INSERT INTO conversation (id, name, user_id, created_at)"
    execute(engine, ROWS["user"], f"{name} VALUES ({2**63 - 1}, 'Talk', 1, '2026-01-31T12:00:01.000000Z')")
    assert execute(engine, "SELECT id FROM conversation") == [(2**63 - 1,)]


@pytest.mark.parametrize("sender", ["system", "User", "", "Bot"])
def test_a_sender_is_user_or_bot(engine, sender):
    with pytest.raises(DBAPIError, match=r"ck_message_sender|too long"):
        execute(engine, ROWS["user"], ROWS["conversation"], ROWS["message"].replace("'bot'", f"'{sender}'"))


def test_a_user_id_is_the_id_and_cannot_be_written(engine):
    assert execute(engine, ROWS["user"], 'SELECT id, user_id FROM "user"') == [(1, 1)]
    with pytest.raises(DBAPIError, match="user_id"):
        execute(engine, 'UPDATE "user" SET user_id = 7')
    with pytest.raises(DBAPIError, match="user_id"):
        execute(
            engine, """INSERT INTO "user" (user_id, username, password_hash, is_logged_in) VALUES (7, 'b', 'x', true)"""
        )


def test_a_username_is_taken_once(engine):
    with pytest.raises(IntegrityError):
        execute(engine, ROWS["user"], ROWS["user"])


@pytest.mark.parametrize("table", ["conversation", "message"])
def test_a_child_needs_its_parent(engine, table):
    with pytest.raises(IntegrityError):
        execute(engine, ROWS[table])


def test_the_models_and_the_migrations_agree(empty):
    upgrade()
    check()  # the command `flask db check`, which exits where there is something to add
    execute(db.engine, "DROP INDEX ix_message_conversation_id_id")
    with pytest.raises(SystemExit):
        check()


def test_migrations_go_up_down_and_up_again(empty):
    upgrade()
    assert tables(db.engine) == {*SCHEMA, "alembic_version"}
    downgrade(revision="base")
    assert tables(db.engine) == {"alembic_version"}
    assert execute(db.engine, "SELECT * FROM alembic_version") == []
    upgrade()
    assert tables(db.engine) == {*SCHEMA, "alembic_version"}
    check()


def test_what_the_first_version_stored_survives_every_later_one(empty):
    upgrade(revision="0001")
    execute(db.engine, *ROWS.values())
    before = contents(db.engine)
    upgrade()
    after = contents(db.engine)
    assert all(after[table][0][: len(row)] == row for table, [row] in before.items())
    downgrade(revision="0001")
    assert contents(db.engine) == before


def test_servers_may_migrate_at_once(empty_database, empty):
    command = [sys.executable, "-m", "flask", "db", "upgrade"]
    with ExitStack() as stack:
        servers = [
            stack.enter_context(subprocess.Popen(command, cwd=ROOT, env={**os.environ, "DATABASE_URL": empty_database}))
            for _ in range(4)
        ]
        assert [server.wait(PATIENCE) for server in servers] == [0] * 4
    check()


def test_a_new_database_is_waited_for_while_another_writes_to_it(tmp_path):
    path = tmp_path / "new.db"
    app = create_app({"DATABASE_URL": f"sqlite:///{path}"})
    with closing(sqlite3.connect(path, check_same_thread=False, isolation_level=None)) as other, app.app_context():
        other.execute("BEGIN IMMEDIATE")
        release = Timer(0.2, other.execute, ["COMMIT"])
        release.start()
        with db.engine.connect() as connection:
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        release.join()
        db.engine.dispose()


@pytest.mark.parametrize(
    ("method", "path"), [("get", "/api/users/status"), ("post", "/api/signup"), ("post", "/api/login")]
)
def test_without_tables_the_answer_and_the_log_say_what_to_run(empty_database, caplog, method, path):
    app = create_app({"DATABASE_URL": empty_database})
    answer = getattr(app.test_client(), method)(path, json={"username": "ada", "password": "correct horse"})
    assert answer.status_code == 503
    assert answer.json == {"error": "The database lacks its tables: run python -m flask db upgrade"}
    assert int(answer.headers["Retry-After"]) > 0
    [record] = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "run python -m flask db upgrade" in record.message
    assert not record.exc_info
    with app.app_context():
        db.engine.dispose()


@on_sqlite
def test_every_connection_to_sqlite_is_durable_strict_and_patient(engine):
    with ExitStack() as stack:
        for connection in [stack.enter_context(engine.connect()) for _ in range(3)]:
            pragmas = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
            values = [connection.exec_driver_sql(f"PRAGMA {pragma}").scalar() for pragma in pragmas]
            assert values == ["wal", 2, 1, 10_000]  # 2 is FULL


@on_sqlite
def test_sqlite_stores_times_as_they_are_sent(app, ada, database):
    ada.send(ada.create())
    ada.logout()
    with sqlite3.connect(make_url(database).database) as connection:
        times = connection.execute(
            'SELECT last_login, last_logout, c.created_at, m.created_at FROM "user", conversation c, message m'
        ).fetchall()
    connection.close()
    assert len(times) == 2
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", time) for row in times for time in row)
    [status] = app.test_client().get("/api/users/status").json["users"]
    assert (status["last_login"], status["last_logout"]) == times[0][:2]


@on_postgresql
@pytest.mark.parametrize("zone", ["Asia/Kathmandu", "America/St_Johns"])
def test_postgresql_keeps_moments_whatever_the_connections_time_zone(make_app, database, zone):
    started = {"SESSIONS_VALID_FROM": "2026-01-01T00:00:00Z"}
    elsewhere = make_app(DATABASE_URL=f"{database}?options=-c%20timezone%3D{zone}", **started)
    with elsewhere.app_context():
        assert execute(db.engine, "SHOW timezone") == [(zone,)]
    ada = newcomer(elsewhere, "ada")
    [message, _] = ada.send(ada.create()).json
    [status] = ada.get("/api/users/status").json["users"]
    for time in (status["last_login"], message["created_at"]):
        assert time.endswith("Z")
        assert abs(datetime.now(UTC) - datetime.fromisoformat(time)) < timedelta(seconds=PATIENCE)
    assert ada.is_logged_in()

    here = make_app(**started).test_client()
    assert here.get("/api/users/status").json["users"] == [status]
    here.login("ada")
    assert here.get("/api/conversations").json[0]["messages"][0] == message
