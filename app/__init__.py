"""The application factory and the extensions."""

from flask import Flask
from flask.sessions import SecureCookieSessionInterface
from flask_cors import CORS
from flask_login import LoginManager
from flask_migrate import Migrate
from flask_sqlalchemy import SQLAlchemy
from itsdangerous import URLSafeSerializer
from sqlalchemy.exc import OperationalError
from werkzeug.middleware.proxy_fix import ProxyFix

from app.database import Base, Session, configure_engine, engine_options, is_conflict
from config import Config, ConfigError

MAX_CONFLICTS = 5  # of a transaction with others

db = SQLAlchemy(model_class=Base, session_options={"class_": Session, "expire_on_commit": False})
migrate = Migrate(db=db, render_as_batch=True)
login_manager = LoginManager()
cors = CORS()


def repeat_after_conflict(func, *args):
    """Call a function, and again if PostgreSQL ends its transaction in favour of another one; return its result."""
    for _ in range(MAX_CONFLICTS):
        try:
            return func(*args)
        except OperationalError as error:
            if not is_conflict(error):
                raise
            db.session.rollback()
    return func(*args)


class Application(Flask):
    """A Flask application whose views are repeated after a conflict with another transaction."""

    def dispatch_request(self):
        """Return what the view returns."""
        return repeat_after_conflict(super().dispatch_request)


class SessionInterface(SecureCookieSessionInterface):
    """Flask's signed cookies without an age: the database ends sessions, and the servers' clocks need not agree."""

    def __init__(self, app):
        keys = [*(app.config["SECRET_KEY_FALLBACKS"] or ()), app.secret_key]  # the last one signs
        options = {"key_derivation": self.key_derivation, "digest_method": self.digest_method}
        self.signing_serializer = URLSafeSerializer(keys, self.salt, self.serializer, signer_kwargs=options)

    def get_signing_serializer(self, app):
        return self.signing_serializer


def create_app(config=None, bot=None):
    """Return a new application.

    `config`: a mapping of settings that take precedence over the environment. `bot`: a function that replies in place
    of the one that the settings choose, see app/bot.py. Raises ConfigError if a setting is invalid.
    """
    from app.responses import OrjsonProvider
    from app.validation import IdConverter

    app = Application(__name__, static_folder=None)
    app.config.from_object(Config(config))
    app.json = OrjsonProvider(app)
    app.session_interface = SessionInterface(app)
    app.url_map.converters["id"] = IdConverter
    app.url_map.merge_slashes = False
    if proxies := app.config["TRUSTED_PROXIES"]:
        app.wsgi_app = ProxyFix(app.wsgi_app, proxies, proxies, proxies, x_prefix=proxies)
    init_database(app)
    init_extensions(app, bot)
    register_routes(app)
    return app


def init_database(app):
    """Set up the database connections. Raises ConfigError if the folder of a SQLite file cannot be created."""
    url, connect_args = app.config["SQLALCHEMY_DATABASE_URI"], app.config["DATABASE_CONNECT_ARGS"]
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = engine_options(url, connect_args)
    try:
        db.init_app(app)
    except OSError as error:
        raise ConfigError(f"DATABASE_URL requires the folder {app.instance_path}: {error.strerror}") from None
    with app.app_context():
        configure_engine(db.engine)


def init_extensions(app, bot):
    """Set up the other extensions, and the bot. Raises ConfigError if the model's server cannot be used."""
    from app.bot import create_bot
    from app.replies import ReplyManager
    from app.security import rate_limiter

    migrate.init_app(app)
    login_manager.init_app(app)
    cors.init_app(app)
    rate_limiter.init_app(app)
    try:
        app.extensions["replies"] = ReplyManager(app, bot or create_bot(app.config))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def register_routes(app):
    """Register the blueprints, the commands, and what happens around every request."""
    from app import cli, errors, hooks
    from app.routes import auth, chat, docs

    errors.init_app(app)
    hooks.init_app(app)
    for module in (auth, chat, docs):
        app.register_blueprint(module.bp)
    for command in (cli.demo, cli.users, cli.prune):
        app.cli.add_command(command)
