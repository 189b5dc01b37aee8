"""The application factory and the extensions."""

from flask import Flask
from flask.sessions import SecureCookieSessionInterface
from flask_cors import CORS
from flask_login import LoginManager
from flask_migrate import Migrate
from flask_sqlalchemy import SQLAlchemy
from itsdangerous import URLSafeSerializer
from werkzeug.middleware.proxy_fix import ProxyFix

from app.database import Base, Session, configure_engine, engine_options
from config import ConfigError, load_config

db = SQLAlchemy(model_class=Base, session_options={"class_": Session, "expire_on_commit": False})
migrate = Migrate(db=db, render_as_batch=True)
login_manager = LoginManager()
cors = CORS()


class SessionInterface(SecureCookieSessionInterface):
    """Flask's signed cookies without an age, as the database ends sessions: the servers' clocks need not agree."""

    def get_signing_serializer(self, app):
        keys = [*app.config["SECRET_KEY_FALLBACKS"], app.secret_key]  # the last one signs
        options = {"key_derivation": self.key_derivation, "digest_method": self.digest_method}
        return URLSafeSerializer(keys, self.salt, self.serializer, signer_kwargs=options)

    def open_session(self, app, request):
        """Return the session of the cookie, an empty one if another program made it, even with the same key."""
        try:
            session = super().open_session(app, request)
        except Exception:  # of the values that the cookie may hold, many kinds
            return self.session_class()
        session.pop("_remember", None)  # Flask-Login's, which this program never sets
        return session


def create_app(config=None, bot=None):
    """Return a new application.

    `config`: a mapping of settings that take precedence over the environment. `bot`: a function that replies in place
    of the one that the settings choose, see app/bot.py. Raises ConfigError if a setting is invalid.
    """
    from app import cli, errors, hooks, security
    from app.responses import OrjsonProvider
    from app.routes import auth, chat, docs
    from app.validation import IdConverter

    app = Flask(__name__, static_folder=None)
    app.config.update(load_config(config))
    app.json = OrjsonProvider(app)
    app.session_interface = SessionInterface()
    app.url_map.converters["id"] = IdConverter
    app.url_map.merge_slashes = False
    if proxies := app.config["TRUSTED_PROXIES"]:
        app.wsgi_app = ProxyFix(app.wsgi_app, proxies, proxies, proxies, x_prefix=proxies)
    init_extensions(app, bot)
    for module in (errors, hooks, security, cli):
        module.init_app(app)
    for module in (auth, chat, docs):
        app.register_blueprint(module.bp)
    return app


def init_extensions(app, bot):
    """Set up the extensions. Raises ConfigError if the folder of a SQLite file or the bot cannot be used."""
    from app.bot import create_bot
    from app.replies import ReplyManager

    app.config.update(engine_options(app.config["DATABASE_URL"]))
    try:
        db.init_app(app)
    except OSError as error:
        raise ConfigError(f"DATABASE_URL requires the folder {app.instance_path}: {error.strerror}") from None
    try:
        app.extensions["replies"] = ReplyManager(app, bot or create_bot(app.config))
    except (OSError, ValueError):  # from None, as the error may quote a password
        raise ConfigError("OPENAI_BASE_URL, its proxy or SSLKEYLOGFILE cannot be used") from None
    with app.app_context():
        configure_engine(db.engine)

    for extension in (migrate, login_manager, cors):
        extension.init_app(app)
