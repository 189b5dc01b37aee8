"""`python run.py` starts the production server; `run:app` is the WSGI application."""

import os
import shlex
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

GUNICORN_CONFIG = Path(__file__).with_name(".gunicorn.py")
APP_LOAD_ERROR = 4  # an exit status at which gunicorn stops instead of starting a worker again


def main():
    """Migrate the database and serve: with gunicorn, which takes the arguments, or with Flask's server without it."""
    if find_spec("gunicorn"):
        from gevent import monkey

        monkey.patch_all()  # before the application and gunicorn are imported
        serve_with_gunicorn()
    else:
        serve_with_flask()


def serve_with_gunicorn():
    """Become gunicorn's master process. It migrates the database as soon as the arguments turn out to be valid."""
    from config import Config

    with exit_on_config_error():
        set_secure_cookie_default()
        config = Config()
    address = f"[{config.HOST}]:{config.PORT}" if ":" in config.HOST else f"{config.HOST}:{config.PORT}"
    options = shlex.join([f"--config={GUNICORN_CONFIG}", f"--bind={address}"])
    os.environ["GUNICORN_CMD_ARGS"] = f"{options} {os.environ.get('GUNICORN_CMD_ARGS', '')}"
    # For gunicorn itself, and for a process that replaces this one at an upgrade.
    os.environ["WEB_CONCURRENCY"] = str(config.WEB_CONCURRENCY)
    os.environ["LOG_FORMAT"] = config.LOG_FORMAT
    os.environ["SECRET_KEY"] = config.SECRET_KEY
    os.environ["SESSIONS_VALID_FROM"] = config.SESSIONS_VALID_FROM.isoformat()
    from gunicorn.app.wsgiapp import run

    run()


def serve_with_flask():
    """Migrate the database and serve with threads."""
    from app.schema import upgrade_schema

    app = load_app()
    upgrade_schema(app)
    app.logger.warning("gunicorn is not installed (it does not run on Windows): using Flask's threaded server")
    app.run(app.config["HOST"], app.config["PORT"], threaded=True)


def set_secure_cookie_default():
    """Set SESSION_COOKIE_SECURE for this server if it serves HTTPS and the setting is not set."""
    from config import load_values

    arguments = sys.argv[1:] + shlex.split(os.environ.get("GUNICORN_CMD_ARGS", ""))
    has_certificate = any(argument.startswith("--certfile") for argument in arguments)
    if has_certificate and "SESSION_COOKIE_SECURE" not in load_values():
        os.environ["SESSION_COOKIE_SECURE"] = "true"


def load_app():
    """Return the application, or exit with one line that names the invalid setting."""
    from app import create_app
    from config import MUST_BE_SHARED, ConfigError, get_script_info, load_values

    with exit_on_config_error():
        if __name__ != "__main__" and get_script_info() is None:
            for name in ("SECRET_KEY", "SESSIONS_VALID_FROM"):
                if name not in load_values():
                    raise ConfigError(f"{name} {MUST_BE_SHARED}")
        return create_app()


@contextmanager
def exit_on_config_error():
    """Exit with one line if the block raises ConfigError."""
    from config import ConfigError

    try:
        yield
    except ConfigError as error:
        error.show()
        sys.exit(APP_LOAD_ERROR)


os.umask(0o077)  # the database and its folder are for this user only
if __name__ == "__main__":
    main()
else:
    app = load_app()
