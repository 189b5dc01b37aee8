"""How `flask db` runs the migrations: all in one transaction, one server at a time, on either database."""

from alembic import context
from alembic.util import CommandError
from flask import current_app
from sqlalchemy.exc import DBAPIError

from app.sql import begin

db = current_app.extensions["migrate"].db
options = {
    **current_app.extensions["migrate"].configure_args,
    "target_metadata": db.metadata,
    "transactional_ddl": True,
}
LOCK = 0x0C4A7B07  # any number, the same for all servers


def migrate(connection):
    if connection.dialect.name == "sqlite":
        # Altering a table here is copying it, and dropping the old one must not cascade to its children.
        connection.exec_driver_sql("PRAGMA foreign_keys=OFF")
    begin(connection.connection.dbapi_connection)
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK})")
    context.configure(connection=connection, **options)
    with context.begin_transaction():
        context.run_migrations()
    connection.commit()


if context.is_offline_mode():
    context.configure(url=db.engine.url, literal_binds=True, **options)
    with context.begin_transaction():
        context.run_migrations()
else:
    try:
        with db.engine.connect() as connection:
            try:
                migrate(connection)
            finally:
                connection.invalidate()
    except DBAPIError as error:
        reason = " ".join(str(error.orig).split())
        raise CommandError(f"the database of DATABASE_URL cannot be used: {reason}") from error
