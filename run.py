"""`python run.py` migrates the database and serves for real; `run:app` is the application for any WSGI server."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

from flask_migrate import upgrade

from app import create_app
from config import ConfigError

try:
    app = create_app()
except ConfigError as error:
    sys.exit(f"Error: {error}")


def main(arguments):
    """Migrate once, then hand over to gunicorn, which takes further `arguments` of its own."""
    folder = Path(__file__).parent
    with app.app_context():
        upgrade(folder / "migrations")

    host, port = app.config["HOST"], app.config["PORT"]
    if find_spec("gunicorn") is None:
        app.logger.warning("gunicorn is not installed (it does not run on Windows): Flask's threaded server takes over")
        app.run(host, port, threaded=True)
        return

    # What gunicorn reads, and what all workers share, respawned ones too.
    os.environ["SECRET_KEY"] = app.config["SECRET_KEY"]
    os.environ["WEB_CONCURRENCY"] = str(app.config["WEB_CONCURRENCY"])
    os.environ["SESSIONS_VALID_FROM"] = app.config["SESSIONS_VALID_FROM"].isoformat()
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    options = [f"--config={folder / '.gunicorn.py'}", f"--chdir={folder}", f"--bind={address}"]
    os.execv(sys.executable, [sys.executable, "-m", "gunicorn", *options, *arguments, "run:app"])


if __name__ == "__main__":
    main(sys.argv[1:])
