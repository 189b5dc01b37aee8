"""Everything in this folder is slow: it starts processes, fills databases, waits, kills, or needs other servers."""

import shutil
import sqlite3
import subprocess
import tempfile
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from tests.conftest import CHEAP_HASH, SHARED_SESSIONS
from tests.helpers.postgresql import PostgreSQLServer, find_initdb
from tests.helpers.server import Server

CHROMIUM_OPTIONS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--host-resolver-rules=MAP chat.example.com 127.0.0.1",
]


def pytest_ignore_collect(config):
    """Do not even import these modules if all of their tests would be deselected."""
    return True if config.option.markexpr == "not slow" else None


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)


@contextmanager
def run_server(url, prefix=(), arguments=(), **settings):
    """Serve the program on a database while the block is executed; each server accepts the sessions of the others."""
    settings = {"DATABASE_URL": url, "PASSWORD_HASH_METHOD": CHEAP_HASH, **SHARED_SESSIONS, **settings}
    server = Server(*arguments, prefix=prefix, **settings)
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture
def database(database, tmp_path):
    """The URL of a migrated database without rows; a SQLite file is the test's own, to damage."""
    if not database.startswith("sqlite"):
        return database
    path = tmp_path / "chat.db"
    source = sqlite3.connect(database.removeprefix("sqlite:///"))
    with closing(source), closing(sqlite3.connect(path)) as copy:
        source.backup(copy)
    return f"sqlite:///{path}"


@pytest.fixture(scope="module")
def browser():
    """Chromium, by Playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not (chromium := shutil.which("chromium")):
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=CHROMIUM_OPTIONS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The program, served on a SQLite database for all tests of a module."""
    with run_server(f"sqlite:///{tmp_path_factory.mktemp('server') / 'chat.db'}") as server:
        yield server


@pytest.fixture
def create_postgresql():
    """A function that returns a new PostgreSQL server, which is stopped and deleted at the end of the test."""
    if not find_initdb():
        pytest.skip("PostgreSQL is not installed")
    servers = []

    def create(**options):
        folder = Path(tempfile.mkdtemp(prefix="chat-postgresql-"))  # tmp_path is closed to the user postgres
        servers.append(PostgreSQLServer(folder, **options))
        return servers[-1]

    yield create
    for server in servers:
        with suppress(subprocess.CalledProcessError):
            server.stop("immediate")
        shutil.rmtree(server.folder)


@pytest.fixture
def postgresql(create_postgresql):
    """A PostgreSQL server of its own for a test."""
    server = create_postgresql()
    server.start()
    return server
