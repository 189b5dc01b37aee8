"""`python run.py` migrates the database and serves for real; `run:app` is the application for any WSGI server."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

from alembic.util import CommandError
from flask_migrate import upgrade
from sqlalchemy.exc import DBAPIError

from app import create_app
from config import ConfigError

try:
    app = create_app()
except ConfigError as error:
    sys.exit(f"Error: {error}")


def main(arguments):
    """Migrate once, then hand over to gunicorn, which takes further `arguments` of its own."""
    try:
        with app.app_context():
            upgrade(Path(__file__).with_name("migrations"))
    except (DBAPIError, CommandError) as error:
        reason = " ".join(str(getattr(error, "orig", error)).split())
        sys.exit(f"Error: the database of DATABASE_URL cannot be used: {reason}")

    host, port = app.config["HOST"], app.config["PORT"]
    if find_spec("gunicorn") is None:
        app.logger.warning("gunicorn is not installed (it does not run on Windows): Flask's threaded server takes over")
        app.run(host, port, threaded=True)
        return

    # What gunicorn reads, and what all workers share, respawned ones too.
    os.environ["SECRET_KEY"] = app.config["SECRET_KEY"]
    os.environ["WEB_CONCURRENCY"] = str(app.config["WEB_CONCURRENCY"])
    os.environ["SESSIONS_VALID_FROM"] = app.config["SESSIONS_VALID_FROM"].isoformat()
    settings = {
        "bind": f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
        "worker-class": "gevent",
        "keep-alive": 5,  # seconds for a client to send its next head
        "graceful-timeout": 12,  # seconds for the answers under way at a SIGTERM
        "chdir": Path(__file__).parent,
    }
    options = [f"--{name}={value}" for name, value in settings.items()]
    os.execv(sys.executable, [sys.executable, "-m", "gunicorn", *options, "--no-control-socket", *arguments, "run:app"])


if __name__ == "__main__":
    main(sys.argv[1:])
