"""`python run.py` migrates the database and starts the production server; `run:app` is the WSGI application."""

import os
import sys
from importlib.util import find_spec

IS_GUNICORN_USED = __name__ == "__main__" and find_spec("gunicorn")
if IS_GUNICORN_USED:
    from gevent import monkey

    monkey.patch_all()  # before anything else is imported

from app import create_app
from app.database import truncate_wal, upgrade_schema
from config import ConfigError, require_shared_settings

os.umask(0o077)  # the database and its folder are for this user only
try:
    if __name__ != "__main__":
        require_shared_settings()
    app = create_app()
except ConfigError as error:
    error.show()
    sys.exit(4)  # gunicorn's status for an application that cannot be loaded

if IS_GUNICORN_USED:
    os.environ["WEB_CONCURRENCY"] = str(app.config["WEB_CONCURRENCY"])  # gunicorn reads it when it is imported
    from app.server import Server

    Server(app).run()
elif __name__ == "__main__":
    upgrade_schema(app)
    app.logger.warning("gunicorn is not installed (it does not run on Windows): using Flask's threaded server")
    app.run(app.config["HOST"], app.config["PORT"], threaded=True)
    truncate_wal(app)
