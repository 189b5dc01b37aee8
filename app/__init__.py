"""The application factory and the extensions."""

from flask import Flask
from flask.sessions import SecureCookieSessionInterface
from flask_cors import CORS
from flask_login import LoginManager
from flask_migrate import Migrate
from flask_sqlalchemy import SQLAlchemy
from werkzeug.middleware.proxy_fix import ProxyFix

from app.database import Base, Session, configure_engine, engine_options
from config import ConfigError, load_config

db = SQLAlchemy(model_class=Base, session_options={"class_": Session, "expire_on_commit": False})
migrate = Migrate(db=db, render_as_batch=True)
login_manager = LoginManager()
cors = CORS()


class SessionInterface(SecureCookieSessionInterface):
    """Flask's signed cookies without an age: the database ends sessions, and the servers' clocks need not agree."""

    def open_session(self, app, request):
        """Return the session of the request's cookie, an empty one if this program has not made the cookie."""
        cookie = request.cookies.get(self.get_cookie_name(app), "")
        try:
            return self.session_class(self.get_signing_serializer(app).loads(cookie))
        except Exception:  # a payload that another program signed with this key may raise anything
            return self.session_class()


def create_app(config=None, bot=None):
    """Return a new application.

    `config`: a mapping of settings that take precedence over the environment. `bot`: a function that replies in place
    of the one that the settings choose, see app/bot.py. Raises ConfigError if a setting is invalid.
    """
    from app import cli, errors, hooks
    from app.responses import OrjsonProvider
    from app.validation import IdConverter

    app = Flask(__name__, static_folder=None)
    app.config.from_mapping(load_config(config))
    app.json = OrjsonProvider(app)
    app.session_interface = SessionInterface()
    app.url_map.converters["id"] = IdConverter
    app.url_map.merge_slashes = False
    if proxies := app.config["TRUSTED_PROXIES"]:
        app.wsgi_app = ProxyFix(app.wsgi_app, proxies, proxies, proxies, x_prefix=proxies)
    init_database(app)
    for module in (errors, hooks, cli):
        module.init_app(app)
    init_extensions(app, bot)
    register_blueprints(app)
    return app


def init_database(app):
    """Set up the database connections. Raises ConfigError if the folder of a SQLite file cannot be created."""
    app.config.update(engine_options(app.config["DATABASE_URL"]))
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

    for extension in (migrate, login_manager, cors, rate_limiter):
        extension.init_app(app)
    try:
        app.extensions["replies"] = ReplyManager(app, bot or create_bot(app.config))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def register_blueprints(app):
    """Register the routes."""
    from app.routes import auth, chat, docs

    for module in (auth, chat, docs):
        app.register_blueprint(module.bp)
    app.register_blueprint(docs.swagger_ui, url_prefix="/api/docs")
