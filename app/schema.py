"""The database when the server starts and ends: its migrations, and its last connection."""

import sys
import time
from contextlib import suppress
from pathlib import Path

from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from flask import current_app
from flask_migrate import upgrade
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError

from app import db
from app.database import autocommit
from app.errors import get_reason

MIGRATIONS = Path(__file__).parents[1] / "migrations"


def upgrade_schema(app):
    """Upgrade the database's schema, or exit with one line that says why that failed. Closes its connections."""
    try:
        with app.app_context():
            wait_for_database()
            if is_schema_newer():
                app.logger.warning("The database's schema is newer than this program, which leaves it as it is")
            else:
                upgrade(MIGRATIONS)
            db.engine.dispose()  # no process that is forked from this one may use its connections
    except DBAPIError as error:
        sys.exit(f"Error: the database of DATABASE_URL cannot be used: {get_reason(error)}")


def wait_for_database():
    """Return as soon as the database server accepts a connection; raise its error after DATABASE_WAIT seconds."""
    seconds = current_app.config["DATABASE_WAIT"]
    deadline = time.monotonic() + seconds
    is_logged = False
    while True:
        try:
            db.engine.connect().close()
            return
        except OperationalError as error:
            if db.engine.dialect.name == "sqlite" or time.monotonic() >= deadline:
                raise
            if not is_logged:
                current_app.logger.warning("Waiting up to %d s for the database: %s", seconds, get_reason(error))
                is_logged = True
        time.sleep(min(1, seconds))


def is_schema_newer():
    """Return whether a migration was applied to the database that this program does not have."""
    with db.engine.connect() as connection:
        applied = MigrationContext.configure(connection).get_current_heads()
    revisions = ScriptDirectory(MIGRATIONS).walk_revisions()
    return not {revision.revision for revision in revisions}.issuperset(applied)


def close_database(app):
    """Let SQLite move its write-ahead log into the database, so that a copy of that file is whole."""
    with app.app_context(), suppress(SQLAlchemyError):
        if db.engine.dialect.name == "sqlite":
            with autocommit(db.engine).connect() as connection:
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
            db.engine.dispose()
