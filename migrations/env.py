"""How `flask db` runs the migrations: in one transaction, one server at a time, on SQLite and PostgreSQL."""

from alembic import context
from alembic.util import CommandError
from flask import current_app
from sqlalchemy import Table, event, inspect
from sqlalchemy.exc import DBAPIError

from app.database import get_reason

db = current_app.extensions["migrate"].db
options = {
    **current_app.extensions["migrate"].configure_args,
    "target_metadata": db.metadata,
    "transactional_ddl": True,
}
ADVISORY_LOCK = 0x0C4A7B07  # any number, the same for all servers


@event.listens_for(Table, "before_create")
def use_autoincrement(table, connection, **kwargs):
    """Let SQLite never reuse an id, not even in the copy of a table that Alembic creates to alter it."""
    table.dialect_options["sqlite"]["autoincrement"] = True


def get_last_ids(connection):
    """Return {table: highest id that it ever had} of SQLite, which forgets it when a copy replaces the table."""
    if connection.dialect.name != "sqlite" or not inspect(connection).has_table("sqlite_sequence"):
        return {}
    return dict(connection.exec_driver_sql("SELECT name, seq FROM sqlite_sequence").all())


def restore_last_ids(connection, last_ids):
    """Set the highest ids of the tables that still exist to those before the migrations, if they are lower now."""
    tables = inspect(connection).get_table_names()
    current = get_last_ids(connection)
    for table in last_ids.keys() & tables:
        if current.get(table, 0) < last_ids[table]:  # a database that is up to date may be read-only
            connection.exec_driver_sql("DELETE FROM sqlite_sequence WHERE name = ?", (table,))
            connection.exec_driver_sql(
                "INSERT INTO sqlite_sequence (name, seq) VALUES (?, ?)", (table, last_ids[table])
            )


def connect():
    """Return a new connection to the database of DATABASE_URL. Raises CommandError if there is none."""
    try:
        connection = db.engine.connect()
    except DBAPIError as error:
        raise CommandError(f"the database of DATABASE_URL cannot be used: {get_reason(error)}") from error
    if connection.dialect.name == "sqlite":
        # Alembic alters a table by copying it; dropping the old one must not delete the rows that refer to it.
        connection.connection.dbapi_connection.execute("PRAGMA foreign_keys=OFF")
    return connection


def migrate(connection):
    """Run the migrations in one transaction. Raises CommandError with what failed."""
    try:
        if connection.dialect.name == "postgresql":
            connection.connection.dbapi_connection.timeout = None
            connection.exec_driver_sql("SET LOCAL statement_timeout TO 0")
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({ADVISORY_LOCK})")
        last_ids = get_last_ids(connection)
        context.configure(connection=connection, **options)
        with context.begin_transaction():
            context.run_migrations()
        restore_last_ids(connection, last_ids)
        connection.commit()
    except DBAPIError as error:
        raise CommandError(f"a migration failed: {get_reason(error)} [{' '.join(error.statement.split())}]") from error


if context.is_offline_mode():
    context.configure(url=db.engine.url, literal_binds=True, **options)
    with context.begin_transaction():
        context.run_migrations()
else:
    with connect() as connection:
        try:
            migrate(connection)
        finally:
            connection.invalidate()  # its foreign keys are off
