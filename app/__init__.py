"""The application factory and the extensions."""

import logging
from functools import lru_cache

import flask
from flask.logging import default_handler
from flask.sessions import SecureCookieSessionInterface
from flask_cors import CORS
from flask_limiter import Limiter
from flask_limiter.util import get_remote_address
from flask_login import LoginManager
from flask_migrate import Migrate
from flask_sqlalchemy import SQLAlchemy
from flask_swagger_ui import get_swaggerui_blueprint
from werkzeug.middleware.proxy_fix import ProxyFix

from app.bot import make_bot
from app.sql import Base, engine_options, prepare
from config import SETTINGS, Config

db = SQLAlchemy(model_class=Base, session_options={"expire_on_commit": False})
migrate = Migrate(db=db, render_as_batch=True)
login_manager = LoginManager()
cors = CORS()
limiter = Limiter(get_remote_address, strategy="moving-window")


class CookieSessions(SecureCookieSessionInterface):
    """Flask's signed cookies, each verified once, without an age, and sent only when they change.

    The moment of the login decides what is alive, so no two servers' clocks need agree. Every answer varies with the
    cookie as it is, so an answer that leaves the session alone needs nothing of it.
    """

    def __init__(self, app):
        self.serializer = super().get_signing_serializer(app)
        loads = self.serializer.loads
        self.serializer.loads = lru_cache(10_000)(lambda value, max_age: loads(value))

    def get_signing_serializer(self, app):
        return self.serializer

    def save_session(self, app, session, response):
        if session.modified:
            super().save_session(app, session, response)


def create_app(config=None):
    """Make the application.

    `config`, a mapping or an object with upper-case attributes, is laid over the environment's settings.
    Raises config.ConfigError for a setting that is wrong.
    """
    from app.routes import auth, chat, init_app

    app = flask.Flask(__name__, static_folder=None)
    app.config.update(settings(config))
    app.logger.setLevel(logging.INFO)
    default_handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    app.session_interface = CookieSessions(app)
    if proxies := app.config["TRUSTED_PROXIES"]:
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=proxies, x_proto=proxies)

    db.init_app(app)
    with app.app_context():
        prepare(db.engine)
    migrate.init_app(app)
    # All of its init_app, but for a hook into every request for the remember cookie, which nobody gets.
    app.login_manager = login_manager
    # Known already, the limiter hooks into no request: throttle() asks it where it must.
    app.extensions["limiter"] = {limiter}
    limiter.init_app(app)

    app.extensions["bot"] = make_bot(app.config)
    init_app(app)
    app.register_blueprint(auth.bp)
    app.register_blueprint(chat.bp)
    documentation = {"app_name": "AI Chatbot Backend", "validatorUrl": None}
    app.register_blueprint(get_swaggerui_blueprint("/api/docs", "/api/openapi.json", documentation))
    cors.init_app(app)
    return app


def settings(config):
    """Return app.config: the settings, what the extensions derive from them, the rest of `config`."""
    if not isinstance(config, dict):
        overlay = flask.Config("")
        overlay.from_object(config)
        config = overlay
    values = flask.Config("")
    values.from_object(Config({name: value for name, value in config.items() if name in SETTINGS}))
    patience = {}
    if values["RATE_LIMIT_STORAGE"].startswith("redis"):
        patience = {"socket_connect_timeout": 1, "socket_timeout": 1}  # seconds
    url = config.get("SQLALCHEMY_DATABASE_URI", values["DATABASE_URL"])
    values.update(
        SQLALCHEMY_DATABASE_URI=url,
        SQLALCHEMY_ENGINE_OPTIONS=engine_options(url),
        RATELIMIT_STORAGE_URI=values["RATE_LIMIT_STORAGE"],
        RATELIMIT_STORAGE_OPTIONS={"wrap_exceptions": True, **patience},
        CORS_ALWAYS_SEND=False,
        CORS_EXPOSE_HEADERS=["ETag", "Idempotent-Replayed", "Link", "Retry-After", "X-Request-ID"],
        CORS_INTERCEPT_EXCEPTIONS=False,
        CORS_MAX_AGE=600,
        CORS_VARY_HEADER=False,  # every answer varies
        CORS_SUPPORTS_CREDENTIALS=True,
        MAX_CONTENT_LENGTH=2**20,
        REMEMBER_COOKIE_NAME=";",  # which no cookie can be called: there are sessions only
        PERMANENT_SESSION_LIFETIME=400 * 86400,
        SESSION_REFRESH_EACH_REQUEST=False,
        SESSION_PROTECTION=None,
    )
    return values | {name: value for name, value in config.items() if name not in SETTINGS}
