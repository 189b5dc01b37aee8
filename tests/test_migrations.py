"""Migrations: the schema that they create, what the database refuses, and changes of a schema with rows."""

import shutil

import pytest
from sqlalchemy import inspect
from sqlalchemy.exc import DBAPIError, IntegrityError

from app import create_app, db
from tests.conftest import DATABASES, on_sqlite
from tests.helpers.data import execute
from tests.helpers.server import ROOT

TIMESTAMP = "TIMESTAMP WITH TIME ZONE"
SCHEMA = {
    "user": {
        "id": "BIGINT NOT NULL",
        "user_id": "BIGINT",
        "username": "VARCHAR(80) NOT NULL",
        "password_hash": "VARCHAR(255) NOT NULL",
        "is_logged_in": "BOOLEAN NOT NULL",
        "last_login": TIMESTAMP,
        "last_logout": TIMESTAMP,
        "session_token": "VARCHAR(43)",
        "is_disabled": "BOOLEAN NOT NULL",
    },
    "conversation": {
        "id": "BIGINT NOT NULL",
        "name": "VARCHAR(255) NOT NULL",
        "user_id": "BIGINT NOT NULL",
        "created_at": f"{TIMESTAMP} NOT NULL",
        "updated_at": f"{TIMESTAMP} NOT NULL",
        "archived_at": TIMESTAMP,
        "title_requested_at": TIMESTAMP,
    },
    "message": {
        "id": "BIGINT NOT NULL",
        "sender": "VARCHAR(4) NOT NULL",
        "text": "TEXT NOT NULL",
        "conversation_id": "BIGINT NOT NULL",
        "created_at": f"{TIMESTAMP} NOT NULL",
        "status": "VARCHAR(11) NOT NULL",
        "parent_id": "BIGINT",
        "is_current": "BOOLEAN NOT NULL",
        "error": "VARCHAR(255)",
        "heartbeat_at": TIMESTAMP,
        "idempotency_key": "VARCHAR(255)",
    },
}
INDEXES = {
    ("conversation", "ix_conversation_user_id_id", False, "user_id", "id"),
    ("conversation", "ix_conversation_user_id_updated_at_id", False, "user_id", "updated_at", "id"),
    ("conversation", "ix_conversation_archived", False, "user_id", "updated_at", "id"),
    ("conversation", "ix_conversation_unarchived", False, "user_id", "updated_at", "id"),
    ("message", "ix_message_conversation_id_id", False, "conversation_id", "id"),
    ("message", "ix_message_conversation_id_idempotency_key", True, "conversation_id", "idempotency_key"),
    ("message", "ix_message_in_progress", False, "conversation_id"),
    ("message", "ix_message_parent_id", False, "parent_id"),
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

revision = "{revision}"
down_revision = "0001"


def upgrade():
    with op.batch_alter_table("{table}") as batch:
        {change}
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
    """A function that adds a migration after the first to a copy of the migrations; returns the copy's path."""

    def add(table, change):
        folder = shutil.copytree(ROOT / "migrations", tmp_path / "migrations")
        for path in folder.glob("versions/*.py"):
            if not path.name.startswith("0001"):
                path.unlink()
        (folder / "versions" / "changed.py").write_text(
            MIGRATION.format(revision="changed", table=table, change=change)
        )
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


def test_tables_have_the_documented_columns_and_ours(app):
    with app.app_context():
        engine = db.engine

    def describe(column):
        type_name = column["type"].compile(engine.dialect)
        if engine.dialect.name == "sqlite":
            type_name = {"INTEGER": "BIGINT", "DATETIME": TIMESTAMP}.get(type_name, type_name)
        return type_name if column["nullable"] else f"{type_name} NOT NULL"

    inspector = inspect(engine)
    assert set(inspector.get_table_names()) == {*SCHEMA, "alembic_version"}
    for table, columns in SCHEMA.items():
        assert {column["name"]: describe(column) for column in inspector.get_columns(table)} == columns


def test_constraints_and_indexes_are_named_by_the_convention(app):
    with app.app_context():
        inspector, is_sqlite = inspect(db.engine), db.engine.dialect.name == "sqlite"
    uniques = {(unique["name"], *unique["column_names"]) for unique in inspector.get_unique_constraints("user")}
    assert uniques == {(f"uq_user_{name}", name) for name in ("user_id", "username", "session_token")}
    assert {
        (table, index["name"], bool(index["unique"]), *index["column_names"])
        for table in SCHEMA
        for index in inspector.get_indexes(table)
        if not index.get("duplicates_constraint")
    } == INDEXES
    checks = {(table, check["name"]) for table in SCHEMA for check in inspector.get_check_constraints(table)}
    assert checks == {("message", f"ck_message_{name}") for name in ("sender", "status", "user_status", "heartbeat")}
    if not is_sqlite:  # SQLite's primary key belongs to its column and has no name
        assert {inspector.get_pk_constraint(table)["name"] for table in SCHEMA} == {f"pk_{table}" for table in SCHEMA}


@pytest.mark.parametrize(
    ("table", "column", "parent"),
    [
        ("conversation", "user_id", "user"),
        ("message", "conversation_id", "conversation"),
    ],
)
def test_deletion_of_a_row_deletes_what_refers_to_it(app, table, column, parent):
    with app.app_context():
        [key] = [key for key in inspect(db.engine).get_foreign_keys(table) if key["constrained_columns"] == [column]]
    assert (key["referred_table"], key["referred_columns"]) == (parent, ["id"])
    assert (key["name"], key["options"]) == (f"fk_{table}_{column}_{parent}", {"ondelete": "CASCADE"})
    add_rows(app)
    execute(app, f'DELETE FROM "{parent}" WHERE id = 1')
    assert read_rows(app)[table] == []


def test_deletion_of_a_conversation_deletes_a_long_chain_of_messages(app):
    add_rows(app)
    chain = "INSERT INTO message (id, sender, text, conversation_id, created_at, parent_id) VALUES "
    for first in range(2, 3002, 500):
        rows = (f"({id}, 'bot', '', 1, '2026-01-31T12:00:02.000000Z', {id - 1})" for id in range(first, first + 500))
        execute(app, chain + ", ".join(rows))
    execute(app, "DELETE FROM conversation")
    assert read_rows(app)["message"] == []


def test_database_refuses_to_delete_a_message_before_others(app):
    add_rows(app)
    execute(app, ROWS["message"].replace("created_at", "created_at, parent_id").replace("Z')", "Z', 1)"))
    with pytest.raises(IntegrityError, match=r"fk_message_parent_id_message|FOREIGN KEY"):
        execute(app, "DELETE FROM message WHERE id = 1")


@on_sqlite
def test_ids_on_sqlite_are_autoincremented(app):
    rows = execute(app, "SELECT name, sql FROM sqlite_master WHERE type = 'table'")
    assert {name for name, sql in rows if "AUTOINCREMENT" in sql} == set(SCHEMA)


@pytest.mark.parametrize("table", SCHEMA)
def test_id_of_the_newest_row_is_not_reused_after_deletion(app, table):
    add_rows(app)
    execute(app, f'DELETE FROM "{table}"')
    execute(app, ROWS[table])
    assert execute(app, f'SELECT id FROM "{table}"') == [(2,)]


@pytest.mark.parametrize(
    ("table", "old", "new", "constraint"),
    [
        ("user", "", "", "username"),
        ("user", "'ada'", "'bob'", "user_id"),
        ("user", "1, 'ada'", "2, 'bob'", "session_token"),
        ("conversation", "'Tea', 1", "'Tea', 2", "fk_conversation_user_id_user|FOREIGN KEY"),
        ("message", "✓', 1", "✓', 2", "fk_message_conversation_id_conversation|FOREIGN KEY"),
        ("message", "'bot'", "'Bot'", "ck_message_sender"),
        ("message", "'bot'", "''", "ck_message_sender"),
        ("message", "'bot'", "'system'", "ck_message_sender|too long"),
    ],
)
def test_database_refuses_an_invalid_row(app, table, old, new, constraint):
    add_rows(app)
    with pytest.raises(DBAPIError, match=constraint):
        execute(app, ROWS[table].replace(old, new))


def test_database_refuses_null_in_a_required_column(app):
    add_rows(app)
    required = [(table, name) for table in SCHEMA for name, type_name in SCHEMA[table].items() if "NOT" in type_name]
    for table, name in required:
        with pytest.raises(IntegrityError, match=name):
            execute(app, f'UPDATE "{table}" SET {name} = NULL')


# Migrating


def test_migrations_and_models_agree(empty_app):
    assert run_flask_db(empty_app, "upgrade") == 0
    assert run_flask_db(empty_app, "check") == 0
    execute(empty_app, "DROP INDEX ix_message_conversation_id_id")
    assert run_flask_db(empty_app, "check") == 1


def test_downgrade_drops_all_tables_and_upgrade_creates_them_again(empty_app):
    assert run_flask_db(empty_app, "upgrade") == 0
    assert list_tables(empty_app) == {*SCHEMA, "alembic_version"}
    assert run_flask_db(empty_app, "downgrade", "base") == 0
    assert list_tables(empty_app) == {"alembic_version"}
    assert execute(empty_app, "SELECT * FROM alembic_version") == []
    assert run_flask_db(empty_app, "upgrade") == 0
    assert run_flask_db(empty_app, "check") == 0


def test_rows_of_the_first_version_survive_upgrade_and_downgrade(empty_app):
    assert run_flask_db(empty_app, "upgrade", "0001") == 0
    add_rows(empty_app)
    before = read_rows(empty_app)
    assert run_flask_db(empty_app, "upgrade") == 0
    after = read_rows(empty_app)
    assert all(after[table][0][: len(row)] == row for table, [row] in before.items())
    assert run_flask_db(empty_app, "downgrade", "0001") == 0
    assert read_rows(empty_app) == before


CHANGES_OF_USER = {
    "widen username": 'batch.alter_column("username", type_=sa.String(200), existing_type=sa.String(80))',
    "drop a column": 'batch.drop_column("last_logout")',
}


@pytest.mark.parametrize("change", CHANGES_OF_USER.values(), ids=CHANGES_OF_USER)
def test_change_of_the_user_table_keeps_its_rows_and_never_reuses_an_id(empty_app, add_migration, change):
    assert run_flask_db(empty_app, "upgrade", "0001") == 0
    add_rows(empty_app)
    before = read_rows(empty_app)
    columns = ", ".join(name for name in SCHEMA["user"] if name != "last_logout")
    [ada] = execute(empty_app, f'SELECT {columns} FROM "user"')
    new_user = ROWS["user"].replace("1, 'ada'", "2, 'bob'").replace("'abc'", "'def'")
    execute(empty_app, new_user)
    execute(empty_app, """DELETE FROM "user" WHERE username = 'bob'""")

    assert run_flask_db(empty_app, "upgrade", "--directory", add_migration("user", change)) == 0
    assert execute(empty_app, f'SELECT {columns} FROM "user"') == [ada]
    assert read_rows(empty_app) == {**before, "user": execute(empty_app, 'SELECT * FROM "user"')}
    execute(empty_app, new_user)
    assert execute(empty_app, 'SELECT max(id) FROM "user"') == [(3,)]  # 2 was that of the deleted user
    with pytest.raises(IntegrityError, match="username"):
        execute(empty_app, ROWS["user"].replace("1, 'ada'", "9, 'ada'").replace("'abc'", "'ghi'"))
    with pytest.raises(IntegrityError, match="user_id"):
        execute(empty_app, ROWS["user"].replace("'ada'", "'eve'").replace("'abc'", "'ghi'"))
    execute(empty_app, 'DELETE FROM "user" WHERE id = 1')
    assert read_rows(empty_app)["conversation"] == []


@pytest.mark.parametrize("table", SCHEMA)
def test_change_of_a_table_whose_rows_were_deleted_never_reuses_an_id(empty_app, add_migration, table):
    assert run_flask_db(empty_app, "upgrade", "0001") == 0
    add_rows(empty_app)
    execute(empty_app, f'DELETE FROM "{table}"')
    folder = add_migration(table, 'batch.alter_column("id", comment="changed")')
    assert run_flask_db(empty_app, "upgrade", "--directory", folder) == 0
    execute(empty_app, ROWS[table])
    assert execute(empty_app, f'SELECT id FROM "{table}"') == [(2,)]


def test_failing_migration_logs_what_failed_and_changes_nothing(empty_app, add_migration, caplog):
    assert run_flask_db(empty_app, "upgrade", "0001") == 0
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
