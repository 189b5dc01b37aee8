"""`python run.py` starts the production server; `run:app` is the WSGI application for another one."""

import os
import sys
from importlib.util import find_spec

if __name__ == "__main__" and find_spec("gevent"):
    from gevent import monkey

    monkey.patch_all()  # before anything else is imported

from click import get_current_context

from app import create_app
from app.schema import upgrade_schema
from config import ConfigError, require_shared_settings

APP_LOAD_ERROR = 4  # an exit status at which gunicorn stops instead of starting a worker again

os.umask(0o077)  # the database and its folder are for this user only
try:
    if __name__ != "__main__" and not get_current_context(silent=True):  # another server, not the flask command
        require_shared_settings()
    app = create_app()
except ConfigError as error:
    error.show()
    sys.exit(APP_LOAD_ERROR)

if __name__ == "__main__":
    if find_spec("gunicorn"):
        os.environ["WEB_CONCURRENCY"] = str(app.config["WEB_CONCURRENCY"])  # gunicorn reads it when it is imported
        from app.server import Server

        Server(app).run()
    else:
        app.logger.warning("gunicorn is not installed (it does not run on Windows): using Flask's threaded server")
        upgrade_schema(app)
        app.run(app.config["HOST"], app.config["PORT"], threaded=True)
