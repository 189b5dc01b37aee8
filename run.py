"""`python run.py` migrates the database and starts the production server; `run:app` is the WSGI application."""

import os
import shlex
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from flask_migrate import upgrade
from sqlalchemy.exc import DBAPIError, OperationalError

from app import create_app, db
from config import SECRET_KEY_REQUIRED, ConfigError, get_script_info, load_values

FOLDER = Path(__file__).parent
MIGRATIONS = FOLDER / "migrations"
APP_LOAD_ERROR = 4  # an exit status at which gunicorn stops instead of starting the worker again
GUNICORN_ONLY_PRINTS = {"-h", "--help", "-v", "--version", "--check-config", "--print-config"}


def load_app():
    """Create the application, or exit with one line that names the invalid setting."""
    try:
        if __name__ == "__main__":
            set_secure_cookie_default()
        elif get_script_info() is None and "SECRET_KEY" not in load_values():
            raise ConfigError(f"SECRET_KEY {SECRET_KEY_REQUIRED}")
        return create_app()
    except ConfigError as error:
        error.show()
        sys.exit(APP_LOAD_ERROR)


def set_secure_cookie_default():
    """Set SESSION_COOKIE_SECURE for this process and gunicorn's if gunicorn serves HTTPS and it is not set."""
    arguments = sys.argv[1:] + shlex.split(os.environ.get("GUNICORN_CMD_ARGS", ""))
    has_certificate = any(argument.startswith("--certfile") for argument in arguments)
    if has_certificate and "SESSION_COOKIE_SECURE" not in load_values():
        os.environ["SESSION_COOKIE_SECURE"] = "true"


os.umask(0o077)  # the database and its folder are for this user only
app = load_app()


def main(arguments):
    """Migrate the database, then replace this process by gunicorn, which takes further arguments."""
    if find_spec("gunicorn") is None:
        migrate()
        app.logger.warning("gunicorn is not installed (it does not run on Windows): using Flask's threaded server")
        app.run(app.config["HOST"], app.config["PORT"], threaded=True)
        return

    # All workers share these, including those that replace others.
    os.environ["SECRET_KEY"] = app.config["SECRET_KEY"]
    os.environ["SESSIONS_VALID_FROM"] = app.config["SESSIONS_VALID_FROM"].isoformat()
    os.environ["WEB_CONCURRENCY"] = str(app.config["WEB_CONCURRENCY"])
    os.environ["LOG_FORMAT"] = app.config["LOG_FORMAT"]
    command = get_gunicorn_command(arguments)
    if GUNICORN_ONLY_PRINTS.isdisjoint(arguments):
        if arguments and (status := subprocess.call([*command, "--check-config"])):
            sys.exit(status)
        migrate()
    os.execv(sys.executable, command)


def get_gunicorn_command(arguments):
    """Return the command that starts gunicorn."""
    host, port = app.config["HOST"], app.config["PORT"]
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    options = [f"--config={FOLDER / '.gunicorn.py'}", f"--chdir={FOLDER}", f"--bind={address}"]
    return [sys.executable, "-m", "gunicorn", *options, *arguments, "run:app"]


def migrate():
    """Upgrade the database's schema, or exit with one line that says why that failed."""
    try:
        with app.app_context():
            wait_for_database()
            if is_schema_newer():
                app.logger.warning("The database's schema is newer than this program, which leaves it as it is")
            else:
                upgrade(MIGRATIONS)
    except DBAPIError as error:
        sys.exit(f"Error: the database of DATABASE_URL cannot be used: {get_reason(error)}")


def wait_for_database():
    """Return as soon as the database server accepts a connection; raise its error after DATABASE_WAIT seconds."""
    seconds = app.config["DATABASE_WAIT"]
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
                app.logger.warning("Waiting up to %d s for the database: %s", seconds, get_reason(error))
                is_logged = True
        time.sleep(min(1, seconds))


def is_schema_newer():
    """Return whether a migration was applied to the database that this program does not have."""
    with db.engine.connect() as connection:
        applied = MigrationContext.configure(connection).get_current_heads()
    revisions = ScriptDirectory(MIGRATIONS).walk_revisions()
    return not {revision.revision for revision in revisions}.issuperset(applied)


def get_reason(error):
    """Return a database driver's error as one line."""
    return " ".join(str(error.orig).split())


if __name__ == "__main__":
    main(sys.argv[1:])
