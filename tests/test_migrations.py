"""Migrations: the schema that they create, what the database refuses, and changes of a schema with rows."""

import re
import shutil

import pytest
from sqlalchemy import inspect
from sqlalchemy.exc import DBAPIError, IntegrityError

from app import create_app, db
from tests.conftest import DATABASES
from tests.helpers.data import execute
from tests.helpers.server import ROOT

SCHEMA = {
    "user": """id BIGINT NOT NULL, user_id BIGINT, username VARCHAR(80) NOT NULL, password_hash VARCHAR(255) NOT NULL,
        is_logged_in BOOLEAN NOT NULL, last_login TIMESTAMP WITH TIME ZONE, last_logout TIMESTAMP WITH TIME ZONE,
        session_token VARCHAR(43), is_disabled BOOLEAN NOT NULL""",
    "conversation": """id BIGINT NOT NULL, name VARCHAR(255) NOT NULL, user_id BIGINT NOT NULL,
        created_at TIMESTAMP WITH TIME ZONE NOT NULL, updated_at TIMESTAMP WITH TIME ZONE NOT NULL,
        archived_at TIMESTAMP WITH TIME ZONE, title_requested_at TIMESTAMP WITH TIME ZONE""",
    "message": """id BIGINT NOT NULL, sender VARCHAR(4) NOT NULL, text TEXT NOT NULL, conversation_id BIGINT NOT NULL,
        created_at TIMESTAMP WITH TIME ZONE NOT NULL, status VARCHAR(11) NOT NULL, parent_id BIGINT,
        is_current BOOLEAN NOT NULL, error VARCHAR(255), heartbeat_at TIMESTAMP WITH TIME ZONE,
        idempotency_key VARCHAR(255)""",
}
ROWS = {
    "user": """INSERT INTO "user" (user_id, username, password_hash, is_logged_in, last_login, session_token)
        VALUES (1, 'ada', 'x', true, '2026-01-31T12:00:00.000000Z', 'abc')""",
    "conversation": """INSERT INTO conversation (name, user_id, created_at, updated_at)
        VALUES ('Tea', 1, '2026-01-31T12:00:01.000000Z', '2026-01-31T12:00:02.000000Z')""",
    "message": """INSERT INTO message (sender, text, conversation_id, created_at)
        VALUES ('bot', 'Hello ✓', 1, '2026-01-31T12:00:02.000000Z')""",
}
MIGRATION = """
import sqlalchemy as sa
from alembic import op

revision = "changed"
down_revision = "0001"


def upgrade():
    with op.batch_alter_table("{table}") as batch:
        {changes}
"""


@pytest.fixture
def empty_app(empty_database):
    """An application on a database without tables."""
    app = create_app({"DATABASE_URL": empty_database})
    yield app
    with app.app_context():
        db.engine.dispose()


@pytest.fixture
def add_migration(tmp_path):
    """A function that adds a migration to a copy of the migrations; returns the copy's path."""

    def add(table, *changes):
        folder = shutil.copytree(ROOT / "migrations", tmp_path / "migrations")
        text = MIGRATION.format(table=table, changes="\n        ".join(changes))
        (folder / "versions" / "changed.py").write_text(text)
        return folder

    return add


def read_rows(app):
    return {table: execute(app, f'SELECT * FROM "{table}"') for table in SCHEMA}


def add_rows(app):
    for statement in ROWS.values():
        execute(app, statement)


def list_tables(app):
    with app.app_context():
        return set(inspect(db.engine).get_table_names())


def run_flask_db(app, *arguments):
    """Run `flask db` in this process; return its exit status."""
    return app.test_cli_runner().invoke(args=["db", *map(str, arguments)]).exit_code


# The schema


@pytest.mark.parametrize("table", SCHEMA)
def test_table_has_the_documented_columns_and_ours(app, table):
    with app.app_context():
        columns, dialect = inspect(db.engine).get_columns(table), db.engine.dialect
    types = {"INTEGER": "BIGINT", "DATETIME": "TIMESTAMP WITH TIME ZONE"} if dialect.name == "sqlite" else {}
    found = set()
    for column in columns:
        type_name = column["type"].compile(dialect)
        null = "" if column["nullable"] else " NOT NULL"
        found.add(f"{column['name']} {types.get(type_name, type_name)}{null}")
    assert found == {*re.split(r",\s+", SCHEMA[table])}


def test_deletion_of_a_user_deletes_their_conversations_and_a_long_chain_of_messages(app):
    add_rows(app)
    chain = "INSERT INTO message (id, sender, text, conversation_id, created_at, parent_id) VALUES "
    for first in range(2, 3002, 500):
        rows = (f"({id}, 'bot', '', 1, '2026-01-31T12:00:02.000000Z', {id - 1})" for id in range(first, first + 500))
        execute(app, chain + ", ".join(rows))
    execute(app, 'DELETE FROM "user"')
    assert read_rows(app) == {table: [] for table in SCHEMA}


def test_database_refuses_to_delete_a_message_before_others(app):
    add_rows(app)
    execute(app, ROWS["message"].replace("created_at", "created_at, parent_id").replace("Z')", "Z', 1)"))
    with pytest.raises(IntegrityError, match=r"fk_message_parent_id_message|FOREIGN KEY"):
        execute(app, "DELETE FROM message WHERE id = 1")


@pytest.mark.parametrize("table", SCHEMA)
def test_id_of_the_newest_row_is_not_reused_after_deletion(app, table):
    add_rows(app)
    execute(app, f'DELETE FROM "{table}"')
    execute(app, ROWS[table])
    assert execute(app, f'SELECT id FROM "{table}"') == [(2,)]


@pytest.mark.parametrize(
    ("table", "change", "constraint"),
    [
        ("user", "username = 'ada'", r"uq_user_username|user\.username"),
        ("user", "user_id = 1", r"uq_user_user_id|user\.user_id"),
        ("user", "session_token = 'abc'", r"uq_user_session_token|user\.session_token"),
        ("conversation", "user_id = 9", "fk_conversation_user_id_user|FOREIGN KEY"),
        ("message", "conversation_id = 9", "fk_message_conversation_id_conversation|FOREIGN KEY"),
        ("message", "sender = 'Bot'", "ck_message_sender"),
        ("message", "sender = 'system'", "ck_message_sender|too long"),
        ("message", "status = 'lost'", "ck_message_status"),
        ("message", "sender = 'user', status = 'failed'", "ck_message_user_status"),
        ("message", "status = 'in_progress'", "ck_message_heartbeat"),
    ],
)
def test_database_refuses_an_invalid_row(app, table, change, constraint):
    add_rows(app)
    execute(app, ROWS["user"].replace("1, 'ada'", "2, 'bob'").replace("'abc'", "'def'"))
    with pytest.raises(DBAPIError, match=constraint):
        execute(app, f'UPDATE "{table}" SET {change} WHERE id = (SELECT max(id) FROM "{table}")')


# Migrating


def test_upgrade_creates_what_the_models_describe_and_downgrade_drops_it(empty_app):
    for _ in range(2):
        assert run_flask_db(empty_app, "upgrade") == run_flask_db(empty_app, "check") == 0
        assert list_tables(empty_app) == {*SCHEMA, "alembic_version"}
        execute(empty_app, "DROP INDEX ix_message_conversation_id_id")
        assert run_flask_db(empty_app, "check") == 1
        execute(empty_app, "CREATE INDEX ix_message_conversation_id_id ON message (conversation_id, id)")
        assert run_flask_db(empty_app, "downgrade", "base") == 0
        assert list_tables(empty_app) == {"alembic_version"}


def test_change_of_the_user_table_keeps_its_rows_and_constraints(empty_app, add_migration):
    assert run_flask_db(empty_app, "upgrade") == 0
    add_rows(empty_app)
    before = read_rows(empty_app)
    columns = "id, user_id, username, password_hash, is_logged_in, last_login, session_token, is_disabled"
    [ada] = execute(empty_app, f'SELECT {columns} FROM "user"')
    wide = 'batch.alter_column("username", type_=sa.String(200), existing_type=sa.String(80))'
    folder = add_migration("user", wide, 'batch.drop_column("last_logout")')
    assert run_flask_db(empty_app, "upgrade", "--directory", folder) == 0
    assert read_rows(empty_app) == {**before, "user": [ada]}
    for row in ("9, 'ada'", "1, 'eve'"):
        with pytest.raises(IntegrityError, match=r"username|user_id"):
            execute(empty_app, ROWS["user"].replace("1, 'ada'", row).replace("'abc'", "'ghi'"))
    execute(empty_app, 'DELETE FROM "user" WHERE id = 1')
    assert read_rows(empty_app)["conversation"] == []


@pytest.mark.parametrize("table", SCHEMA)
def test_change_of_a_table_whose_rows_were_deleted_never_reuses_an_id(empty_app, add_migration, table):
    assert run_flask_db(empty_app, "upgrade") == 0
    add_rows(empty_app)
    execute(empty_app, f'DELETE FROM "{table}"')
    folder = add_migration(table, 'batch.alter_column("id", comment="changed")')
    assert run_flask_db(empty_app, "upgrade", "--directory", folder) == 0
    execute(empty_app, ROWS[table])
    assert execute(empty_app, f'SELECT id FROM "{table}"') == [(2,)]


def test_failing_migration_logs_what_failed_and_changes_nothing(empty_app, add_migration, caplog):
    assert run_flask_db(empty_app, "upgrade") == 0
    add_rows(empty_app)
    before = read_rows(empty_app)
    change = 'batch.add_column(sa.Column("topic", sa.String(20), nullable=False))'
    assert run_flask_db(empty_app, "upgrade", "--directory", add_migration("conversation", change)) == 1
    [record] = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.getMessage().startswith("Error: a migration failed: ")
    assert "topic" in record.getMessage()
    assert "\n" not in record.getMessage()
    assert read_rows(empty_app) == before
    assert execute(empty_app, "SELECT * FROM alembic_version") == [("0001",)]


@pytest.mark.parametrize("empty_database", DATABASES[1:], indirect=True)
def test_migration_may_take_longer_than_a_request(empty_app, add_migration, monkeypatch):
    assert run_flask_db(empty_app, "upgrade") == 0
    folder = add_migration("conversation", 'op.execute("SELECT pg_sleep(1)")')
    monkeypatch.setattr("app.postgresql.Connection.timeout", 0.5)
    assert run_flask_db(empty_app, "upgrade", "--directory", folder) == 0
