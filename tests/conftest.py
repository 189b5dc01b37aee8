"""The fixtures: an application on each database, logged-in clients, and the program served by `python run.py`."""

import hashlib
import os
import secrets
import sqlite3
from collections import defaultdict
from contextlib import closing, contextmanager

import psycopg
import pytest
from flask.testing import FlaskClient
from flask_migrate import upgrade
from sqlalchemy import event
from sqlalchemy.engine import make_url

from config import SETTINGS, load_config

# Empty counts as unset: neither the environment nor a developer's .env reaches a test, in subprocesses either.
os.environ.update(dict.fromkeys(SETTINGS, ""))

from app import create_app, db, replies, security
from app.bot import create_bot
from tests.helpers.bots import Gate, ScriptedBot
from tests.helpers.server import Server, run_all, wait_until

# Tests do not wait for what another process saves, or requests, as long as users do.
replies.SAVE_INTERVAL, replies.READ_INTERVAL = 0.2, 0.1

PASSWORD = "correct horse"
CHEAP_HASH = "pbkdf2:sha256:1"
SERVER_URL = os.environ.get("TEST_DATABASE_URL")
needs_postgresql = pytest.mark.skipif(not SERVER_URL, reason="TEST_DATABASE_URL names no PostgreSQL server")
SHARED_SESSIONS = {"SECRET_KEY": "for tests only, of all processes", "SESSIONS_VALID_FROM": "2026-01-01T00:00:00Z"}
RESET_IDS = """SELECT setval(pg_get_serial_sequence(quote_ident(name), 'id'), 1, false)
               FROM unnest(ARRAY['user', 'conversation', 'message']) AS name"""
DATABASES = ["sqlite", pytest.param("postgresql", marks=needs_postgresql)]
WRITES = [  # in this order, all succeed
    ("POST", "/api/signup", {"username": "eve", "password": PASSWORD}),
    ("POST", "/api/login", {"username": "ada", "password": PASSWORD}),
    ("POST", "/api/conversations", {"name": "New"}),
    ("PUT", "/api/conversations/1", {"name": "New"}),
    ("PATCH", "/api/conversations/1", {"name": "New"}),
    ("POST", "/api/conversations/1/messages", {"text": "Hello"}),
    ("POST", "/api/conversations/1/messages/2/stop", None),
    ("PUT", "/api/conversations/1/messages/1", {"text": "Hello"}),
    ("DELETE", "/api/conversations/1", None),
    ("PUT", "/api/password", {"current_password": PASSWORD, "new_password": PASSWORD}),
    ("POST", "/api/logout/1", None),
    ("DELETE", "/api/account", {"password": PASSWORD}),
]
on_sqlite, on_postgresql = (pytest.mark.parametrize("database", [each], indirect=True) for each in DATABASES)


class Client(FlaskClient):
    """A test client that signs up, logs in and sends messages; once it has logged in, it has a user_id."""

    user_id = None

    def signup(self, username, password=PASSWORD):
        return self.post("/api/signup", json={"username": username, "password": password})

    def login(self, username, password=PASSWORD):
        response = self.post("/api/login", json={"username": username, "password": password})
        if response.status_code == 200:
            self.user_id = response.json["user"]["user_id"]
        return response

    def logout(self):
        return self.post(f"/api/logout/{self.user_id}")

    def is_logged_in(self):
        return self.get("/api/current_user").status_code == 200

    def create_conversation(self, name="Conversation"):
        """Create a conversation and return its id."""
        return self.post("/api/conversations", json={"name": name}).json["id"]

    def send_message(self, conversation_id, text="Hello", buffered=True, **kwargs):
        path = f"/api/conversations/{conversation_id}/messages"
        return self.post(path, json={"text": text}, buffered=buffered, **kwargs)

    def list_conversations(self, **parameters):
        """Return the conversations that the API lists with these query parameters."""
        response = self.get("/api/conversations", query_string=parameters)
        assert response.status_code == 200, response.json
        return response.json

    def list_messages(self, conversation_id):
        """Return all messages of a conversation."""
        return self.get(f"/api/conversations/{conversation_id}").json["messages"]

    def get_message(self, conversation_id, message_id, **kwargs):
        return self.get(f"/api/conversations/{conversation_id}/messages/{message_id}", **kwargs)

    def edit_message(self, conversation_id, message_id, text, buffered=True, **kwargs):
        path = f"/api/conversations/{conversation_id}/messages/{message_id}"
        return self.put(path, json={"text": text}, buffered=buffered, **kwargs)

    def follow_reply(self, conversation_id, message_id, buffered=True, **kwargs):
        path = f"/api/conversations/{conversation_id}/messages/{message_id}/events"
        return self.get(path, buffered=buffered, **kwargs)

    def list_versions(self, conversation_id, message_id):
        return self.get(f"/api/conversations/{conversation_id}/messages/{message_id}/versions")

    def show_branch(self, conversation_id, message_id):
        return self.put(f"/api/conversations/{conversation_id}/current", json={"message_id": message_id})

    def stop_reply(self, conversation_id, message_id):
        return self.post(f"/api/conversations/{conversation_id}/messages/{message_id}/stop")

    @property
    def session_cookie(self):
        return self.get_cookie("chatbot_session").value

    def observe(self):
        """Return what a request of this client that changes anything would change."""
        return self.list_conversations(), self.get("/api/users/status").json, self.session_cookie

    def get_statuses(self):
        """Return "Online" or "Offline" for each username."""
        return {user["username"]: user["status"] for user in self.get("/api/users/status").json["users"]}


def echo(history, **kwargs):
    """A bot that replies with the user's message."""
    return [history[-1][1]]


def migrate(url):
    app = create_app({"DATABASE_URL": url})
    with app.app_context():
        upgrade()
        db.engine.dispose()


@contextmanager
def create_postgresql_database():
    """Create a database on the server of TEST_DATABASE_URL for the time of the block; yield its URL."""
    name = f"chat_test_{secrets.token_hex(4)}"
    with psycopg.connect(SERVER_URL.replace("postgres://", "postgresql://"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        connection.execute(f"ALTER DATABASE {name} SET synchronous_commit = off")
        try:
            yield make_url(SERVER_URL).set(database=name).render_as_string(hide_password=False)
        finally:
            wait_until(lambda: drop_database(connection, name))


def drop_database(connection, name):
    """Drop a database; return False if autovacuum, which only a superuser may end, works there now."""
    try:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
    except psycopg.errors.InsufficientPrivilege:
        return False
    return True


def skip_fsync(connection, record=None):
    """Have a connection to SQLite not wait for the disk, as only a loss of power would show."""
    connection.execute("PRAGMA synchronous=OFF")


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory):
    """The path of a migrated SQLite database, to empty."""
    path = tmp_path_factory.mktemp("sqlite") / "chat.db"
    migrate(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def migrated_postgresql():
    """The URL of a migrated PostgreSQL database, to empty."""
    with create_postgresql_database() as url:
        migrate(url)
        yield url


@pytest.fixture(params=DATABASES)
def database(request):
    """The URL of a migrated database without rows."""
    if request.param == "sqlite":
        path = request.getfixturevalue("migrated_sqlite")
        with closing(sqlite3.connect(path)) as connection:
            skip_fsync(connection)
            connection.executescript("PRAGMA foreign_keys=ON; DELETE FROM user; DELETE FROM sqlite_sequence")
        return f"sqlite:///{path}"
    url = request.getfixturevalue("migrated_postgresql")
    with psycopg.connect(url.replace("postgres://", "postgresql://")) as connection:
        connection.execute('DELETE FROM "user"')  # TRUNCATE would take four times as long
        connection.execute(RESET_IDS)
    return url


@pytest.fixture(params=DATABASES)
def empty_database(request, tmp_path):
    """The URL of a database without tables."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'empty.db'}"
    else:
        with create_postgresql_database() as url:
            yield url


@pytest.fixture(scope="session")
def idle_apps():
    """Applications for other tests to use, by their settings: to create one takes longer than most tests."""
    return defaultdict(list)


def create_fast_app(config, bot):
    """Return a new application for Client whose SQLite connections do not wait for the disk."""
    app = create_app(config, bot=bot)
    app.test_client_class = Client
    with app.app_context():
        if db.engine.dialect.name == "sqlite":
            event.listen(db.engine, "connect", skip_fsync)
    return app


def reuse_app(app, config, bot):
    """Give an application what create_app() gives to a new one: it counts nothing, and no session is open."""
    app.config["SESSIONS_VALID_FROM"] = load_config(config)["SESSIONS_VALID_FROM"]
    security.init_app(app)
    app.extensions["replies"] = replies.ReplyManager(app, bot or create_bot(app.config))
    return app


@pytest.fixture
def make_app(database, idle_apps):
    """A function that returns an application on `database`, with cheap password hashes and other settings."""
    apps = []

    def make(bot=None, **settings):
        config = {"DATABASE_URL": database, "PASSWORD_HASH_METHOD": CHEAP_HASH, **settings}
        idle = idle_apps[tuple(config.items())] if settings in ({}, SHARED_SESSIONS) else []
        app = reuse_app(idle.pop(), config, bot) if idle else create_fast_app(config, bot)
        apps.append((app, idle))
        return app

    yield make
    for app, idle in apps:
        app.extensions["replies"].shutdown(timeout=0)
        with app.app_context():
            wait_until(lambda: db.engine.pool.checkedout() == 0)  # the thread of a reply may be slow
            db.engine.dispose()
        idle.append(app)


@pytest.fixture
def app(make_app):
    return make_app()


@pytest.fixture
def client(app):
    """A client without a session."""
    return app.test_client()


def create_logged_in_client(app, username):
    """Sign up a user and return a client with a session."""
    client = app.test_client()
    assert client.signup(username).status_code == 201
    assert client.login(username).status_code == 200
    return client


def create_other_client(client, app=None):
    """Return a client with the same session, of another application with the same SECRET_KEY if one is given."""
    other = (app or client.application).test_client()
    other.set_cookie("chatbot_session", client.session_cookie)
    other.user_id = client.user_id
    return other


def log_in(app, username="ada", password=PASSWORD):
    """Return a client with a session of a user who has signed up."""
    client = app.test_client()
    assert client.login(username, password).status_code == 200
    return client


def can_log_in(app, password, username="ada"):
    return app.test_client().login(username, password).status_code == 200


class HashingHook:
    """Calls a function in another thread while the next password is hashed; `results` gets what it returned."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch
        self.pbkdf2_hmac = hashlib.pbkdf2_hmac
        self.results = []

    def __call__(self, func):
        self.func = func
        self.monkeypatch.setattr(hashlib, "pbkdf2_hmac", self.run_and_hash)

    def run_and_hash(self, *args):
        self.monkeypatch.setattr(hashlib, "pbkdf2_hmac", self.pbkdf2_hmac)
        self.results += run_all(self.func)
        return self.pbkdf2_hmac(*args)


@pytest.fixture
def while_hashing(monkeypatch):
    """A function that has another one called, in another thread, while the next password is hashed."""
    return HashingHook(monkeypatch)


@pytest.fixture
def ada(app):
    """A client with the session of ada."""
    return create_logged_in_client(app, "ada")


@pytest.fixture
def bob(app):
    """A client with the session of bob."""
    return create_logged_in_client(app, "bob")


@pytest.fixture
def conversation_id(ada):
    """The id of a conversation of ada."""
    return ada.create_conversation()


@pytest.fixture
def echo_ada(make_app):
    """A client with the session of ada, for whom the bot repeats what she sends."""
    return create_logged_in_client(make_app(bot=echo), "ada")


@pytest.fixture
def bot():
    """A bot for make_app() whose steps a test may change."""
    return ScriptedBot("Hello ", "there.")


@pytest.fixture
def other_bot():
    """The bot of the other process."""
    return ScriptedBot("Hello from the other process.")


@pytest.fixture
def other_process(make_app, other_bot, ada):
    """A client with the session of ada at an application that generates its replies by itself."""
    return create_other_client(ada, make_app(other_bot, **SHARED_SESSIONS))


@pytest.fixture(params=["same process", "other process"])
def second_client(request, ada, other_process):
    """Another client with the session of ada, at the same process or at the other one."""
    return create_other_client(ada) if request.param == "same process" else other_process


@pytest.fixture
def gate():
    """An event for which a bot can wait in the middle of a reply; set at the end of the test."""
    gate = Gate()
    yield gate
    gate.set()


@pytest.fixture
def serve(database):
    """A function that serves the program on `database` by `python run.py`; returns a Server."""
    servers = []

    def start(*arguments, **settings):
        settings = {"DATABASE_URL": database, "PASSWORD_HASH_METHOD": CHEAP_HASH, **settings}
        servers.append(Server(*arguments, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()
