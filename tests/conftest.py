"""The fixtures: an application on each database, people who use it, and the program served for real."""

import os
import secrets
import sqlite3
from contextlib import contextmanager

import psycopg
import pytest
from flask.testing import FlaskClient
from flask_migrate import upgrade
from sqlalchemy import event
from sqlalchemy.engine import make_url

from config import SETTINGS

# Empty counts as unset: neither the environment nor a developer's .env reaches a test, in subprocesses either.
os.environ.update(dict.fromkeys(SETTINGS, ""))

from app import create_app, db
from tests.serving import Server

PASSWORD = "correct horse"
SERVER_URL = os.environ.get("TEST_DATABASE_URL")
NEEDS_POSTGRESQL = pytest.mark.skipif(not SERVER_URL, reason="TEST_DATABASE_URL names no PostgreSQL server")


class Client(FlaskClient):
    """A test client that knows how to sign up and log in; once it has, it has a user_id."""

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

    def create(self, name="Talk"):
        """Open a conversation and return its id."""
        return self.post("/api/conversations", json={"name": name}).json["id"]

    def send(self, conversation_id, text="Hello", **kwargs):
        return self.post(f"/api/conversations/{conversation_id}/messages", json={"text": text}, **kwargs)

    def is_logged_in(self):
        return self.get("/api/current_user").status_code == 200

    @property
    def session_cookie(self):
        return self.get_cookie("session").value


def migrate(url):
    app = create_app({"DATABASE_URL": url})
    with app.app_context():
        upgrade()
        db.engine.dispose()


@contextmanager
def postgresql_database():
    """Make a database of its own on the server that TEST_DATABASE_URL names; hand on its URL."""
    name = f"chat_test_{secrets.token_hex(4)}"
    with psycopg.connect(SERVER_URL.replace("postgres://", "postgresql://"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        try:
            yield make_url(SERVER_URL).set(database=name).render_as_string(hide_password=False)
        finally:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def pytest_collection_modifyitems(items):
    """Starting the program takes seconds, so what serves it is slow; the README's walk is enough of it for a start."""
    for item in items:
        if "serve" in item.fixturenames and item.module.__name__ != "tests.test_readme":
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory):
    path = tmp_path_factory.mktemp("sqlite") / "migrated.db"
    migrate(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def migrated_postgresql():
    with postgresql_database() as url:
        migrate(url)
        yield url


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=NEEDS_POSTGRESQL)])
def database(request, tmp_path):
    """The URL of a migrated database with nothing in it."""
    if request.param == "sqlite":
        path = tmp_path / "chat.db"
        with sqlite3.connect(request.getfixturevalue("migrated_sqlite")) as source, sqlite3.connect(path) as copy:
            source.backup(copy)
        source.close()
        copy.close()
        return f"sqlite:///{path}"
    url = request.getfixturevalue("migrated_postgresql")
    with psycopg.connect(url.replace("postgres://", "postgresql://")) as connection:
        connection.execute('TRUNCATE "user" RESTART IDENTITY CASCADE')
    return url


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=NEEDS_POSTGRESQL)])
def empty_database(request, tmp_path):
    """The URL of a database without tables."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'empty.db'}"
    else:
        with postgresql_database() as url:
            yield url


@pytest.fixture
def make_app(database):
    """A function that makes an application on `database`, with cheap passwords and settings laid over."""
    apps = []

    def make(**settings):
        apps.append(create_app({"DATABASE_URL": database, "PASSWORD_HASH_METHOD": "pbkdf2:sha256:1", **settings}))
        apps[-1].test_client_class = Client
        return apps[-1]

    yield make
    for app in apps:
        with app.app_context():
            db.engine.dispose()


@pytest.fixture
def app(make_app):
    return make_app()


@pytest.fixture
def client(app):
    """Someone without a session."""
    return app.test_client()


def newcomer(app, username):
    person = app.test_client()
    assert person.signup(username).status_code == 201
    assert person.login(username).status_code == 200
    return person


@pytest.fixture
def ada(app):
    """Someone with a session."""
    return newcomer(app, "ada")


@pytest.fixture
def bob(app):
    """Someone else with a session."""
    return newcomer(app, "bob")


@contextmanager
def statements(app):
    """Collect the SQL that is sent meanwhile."""
    with app.app_context():
        engine = db.engine
    sent = []

    def note(connection, cursor, statement, *rest):
        sent.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    yield sent
    event.remove(engine, "before_cursor_execute", note)


@pytest.fixture
def serve(database):
    """A function that serves the program on `database` by `python run.py`; returns a tests.serving.Server."""
    servers = []

    def start(*arguments, **settings):
        servers.append(
            Server(*arguments, **{"DATABASE_URL": database, "PASSWORD_HASH_METHOD": "pbkdf2:sha256:1", **settings})
        )
        return servers[-1]

    yield start
    for server in servers:
        server.kill()
