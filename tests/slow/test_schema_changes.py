"""Extending a copy of the project: models, by `flask db migrate` and `flask db upgrade` with rows, and routes."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import CHEAP_HASH, PASSWORD, create_logged_in_client, migrate
from tests.helpers.data import execute
from tests.helpers.server import ROOT, TIMEOUT

LOGIN = f"""
import json
from app import create_app, db

app = create_app()
client = app.test_client()
assert client.post("/api/login", json={{"username": "ada", "password": "{PASSWORD}"}}).status_code == 200
"""
CALL_API = """
results = [
    client.get("/api/conversations").json[0],
    client.get("/api/conversations?limit=1").json[0],
    client.get("/api/conversations/1").json,
    client.post("/api/conversations", json={"name": "New"}).json,
    client.put("/api/conversations/1", json={"name": "Renamed"}).json,
]
assert client.post("/api/conversations/1/messages", json={"text": "Hello"}).status_code == 201
assert client.post("/api/signup", json={"username": "é" * 80, "password": "x"}).status_code == 201
print(json.dumps(results))
"""
CHANGE_TOPIC = """
headers = {"If-None-Match": client.get("/api/conversations").headers["ETag"]}
assert client.get("/api/conversations", headers=headers).status_code == 304
with app.app_context():
    db.session.execute(db.text("UPDATE conversation SET topic = 'tea' WHERE id = 1"))
    db.session.commit()
print(json.dumps(client.get("/api/conversations", headers=headers).json))
"""
ID = "    id: Mapped[int] = mapped_column(primary_key=True)\n"
ROUTE = """
@bp.get("/api/conversations/count")
@login_required
def count_conversations():
    return {"count": len(Conversation.list_for_user(current_user.id))}


"""


def read_rows(app):
    return [execute(app, f'SELECT * FROM "{table}"') for table in ("user", "conversation", "message")]


class Project:
    """A copy of the project that uses a database."""

    def __init__(self, folder, database):
        for name in ("app", "migrations"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("config.py", "run.py"):
            shutil.copy(ROOT / name, folder)
        self.folder = folder
        self.environ = {**os.environ, "DATABASE_URL": database, "PASSWORD_HASH_METHOD": CHEAP_HASH}
        self.environ["SESSIONS_VALID_FROM"] = "2026-01-01T00:00:00Z"

    def replace(self, path, *pairs):
        """Replace texts that each occur once in a file."""
        text = (self.folder / path).read_text()
        for old, new in pairs:
            assert text.count(old) == 1, (path, old)
            text = text.replace(old, new)
        (self.folder / path).write_text(text)

    def run_python(self, *arguments):
        """Run Python in the copy and return what it prints."""
        command, options = [sys.executable, *arguments], {"cwd": self.folder, "env": self.environ}
        result = subprocess.run(command, **options, capture_output=True, text=True, timeout=TIMEOUT)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def migrate(self):
        """Create a migration of what was changed in the models, and apply it; return its text."""
        before = set(self.folder.glob("migrations/versions/*.py"))
        self.run_python("-m", "flask", "db", "migrate", "-m", "change")
        [migration] = set(self.folder.glob("migrations/versions/*.py")) - before
        self.run_python("-m", "flask", "db", "upgrade")
        self.run_python("-m", "flask", "db", "check")
        return migration.read_text()

    def run_logged_in(self, script):
        """Run a script in the copy that has an `app` and a `client` with the session of ada; return what it prints."""
        return json.loads(self.run_python("-c", LOGIN + script))


@pytest.fixture
def database(empty_database):
    """The URL of a database of its own for each test, because the tests change the schema."""
    migrate(empty_database)
    return empty_database


@pytest.fixture
def project(tmp_path, database, ada):
    """A copy of the project, on a database with rows in each table."""
    ada.send_message(ada.create_conversation("Old"))
    (tmp_path / "project").mkdir()
    return Project(tmp_path / "project", database)


def test_concurrent_upgrades_all_succeed(empty_database):
    command = [sys.executable, "-m", "flask", "db"]
    environ = {**os.environ, "DATABASE_URL": empty_database}
    processes = [subprocess.Popen([*command, "upgrade"], cwd=ROOT, env=environ) for _ in range(3)]
    assert [process.wait(TIMEOUT) for process in processes] == [0] * 3
    subprocess.run([*command, "check"], cwd=ROOT, env=environ, timeout=TIMEOUT, check=True)


def test_column_added_to_conversation_and_its_dict_is_shown_everywhere(project):
    column = '    topic: Mapped[str] = mapped_column(default="none", server_default="none")\n'
    to_dict = '{"id": self.id, "name": self.name'
    project.replace("app/models/conversation.py", (ID, ID + column), (to_dict, f'{to_dict}, "topic": self.topic'))
    assert "topic" in project.migrate()
    assert [result["topic"] for result in project.run_logged_in(CALL_API)] == ["none"] * 5
    assert [result["topic"] for result in project.run_logged_in(CHANGE_TOPIC)] == ["tea", "none"]


def test_required_column_without_default_is_refused_by_an_error_that_names_it(project):
    project.replace("app/models/conversation.py", (ID, f"{ID}    topic: Mapped[str]\n"))
    project.run_python("-m", "flask", "db", "migrate", "-m", "change")
    for command in (["-m", "flask", "db", "upgrade"], ["run.py"]):
        with pytest.raises(AssertionError, match=r"Error: a migration failed: .*topic"):
            project.run_python(*command)


def test_route_added_to_a_blueprint_is_served(project):
    before = '@bp.post("/api/conversations")\n'
    project.replace("app/routes/chat.py", (before, ROUTE + before))
    assert project.run_logged_in('print(client.get("/api/conversations/count").text)') == {"count": 1}


def test_user_table_can_be_widened_and_lose_a_column(app, ada, project):
    create_logged_in_client(app, "bob").delete("/api/account", json={"password": PASSWORD})
    before = read_rows(app)
    column = "    nickname: Mapped[str | None]\n"
    project.replace("app/models/user.py", (ID, ID + column))
    project.migrate()
    project.replace("app/models/user.py", (column, ""), ("String(80)", "String(200)"))
    migration = project.migrate()
    assert "drop_column('nickname')" in migration
    assert "length=200" in migration
    assert read_rows(app) == before
    project.run_logged_in(CALL_API)
    assert execute(app, 'SELECT id, user_id FROM "user" ORDER BY id') == [(1, 1), (3, 3)]  # 2 was bob
