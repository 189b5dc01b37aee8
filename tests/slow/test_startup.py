"""How the program starts and ends: `python run.py`, `python -m flask` and other WSGI servers."""

import json
import os
import re
import secrets
import shlex
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from datetime import datetime
from pathlib import Path

import psycopg
import pytest
from sqlalchemy.engine import make_url

from config import SETTINGS
from tests.conftest import SERVER_URL, SHARED_SESSIONS, needs_postgresql
from tests.helpers.server import (
    ROOT,
    TIMEOUT,
    HttpClient,
    connect,
    find_free_port,
    format_head,
    is_listening,
    receive_all,
    wait_until,
)
from tests.helpers.tls import create_certificate, create_tls_context

HAS_IPV6 = Path("/proc/net/if_inet6").exists()
WITHOUT_GUNICORN = 'import runpy, sys; sys.modules["gunicorn"] = None; runpy.run_path("run.py", run_name="__main__")'


def run_python(*arguments, cwd=ROOT, **settings):
    """Run Python in a folder with these settings only, and return the completed process."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **dict.fromkeys(SETTINGS, ""), **settings},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        umask=0o022,
    )


def migrate(url):
    process = run_python("-m", "flask", "db", "upgrade", DATABASE_URL=url)
    assert process.returncode == 0, process.stderr


def read_lines(process):
    """Return the lines that a failed process has printed, without those of gunicorn's log."""
    assert process.returncode != 0
    return [line for line in (process.stdout + process.stderr).splitlines() if not line.startswith("[")]


def run_instead(command):
    """Return the prefix with which Server runs Python with these arguments in place of run.py."""
    return ("sh", "-c", f'exec "$0" {command}')


def can_send_message(server):
    """Return whether a user can sign up, log in and send a message, for which the database needs its tables."""
    with server.create_logged_in_client("ada") as client:
        return client.send_message(client.create_conversation()).status == 201


@pytest.fixture
def database(tmp_path):
    """The URL of a SQLite database without tables."""
    return f"sqlite:///{tmp_path / 'chat.db'}"


@pytest.fixture
def clone(tmp_path):
    """Return a folder with a git repository of the project's files, also of those that are not committed yet."""
    folder = tmp_path / "clone"
    run_git(tmp_path, "init", "-q", folder)
    run_git(ROOT, "--git-dir", folder / ".git", "--work-tree", ROOT, "add", "-A")
    run_git(folder, "-c", "user.name=Ada", "-c", "user.email=ada@example.com", "commit", "-qm", "Clone")
    run_git(folder, "reset", "-q", "--hard")
    return folder


def run_git(folder, *arguments):
    command = ["git", "-C", folder, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT).stdout


def test_run_from_another_folder_on_an_empty_database_migrates_and_serves(serve, empty_database):
    prefix = ("env", "-C", "/", *run_instead(shlex.quote(str(ROOT / "run.py"))))
    server = serve(prefix=prefix, DATABASE_URL=empty_database)
    assert server.wait_for(rf"Listening at: http://127\.0\.0\.1:{server.port}\b")
    assert can_send_message(server)


def test_run_in_a_clone_with_default_settings_leaves_it_clean(serve, clone):
    unset = dict.fromkeys(SETTINGS.keys() - {"PORT"}, "")
    server = serve(prefix=("env", "-C", clone), **unset)
    assert can_send_message(server)
    assert run_git(clone, "status", "--porcelain") == ""
    modes = {path.name: path.stat().st_mode & 0o777 for path in [clone / "instance", *clone.glob("instance/*")]}
    assert modes == {"instance": 0o700} | dict.fromkeys(["chatbot.db", "chatbot.db-shm", "chatbot.db-wal"], 0o600)
    assert server.terminate() == 0
    assert run_git(clone, "status", "--porcelain") == ""


@pytest.mark.parametrize(
    "host",
    ["127.0.0.2", pytest.param("::1", marks=pytest.mark.skipif(not HAS_IPV6, reason="this machine has no ::1"))],
)
def test_host_and_port_choose_the_address(serve, host):
    port = find_free_port()
    serve(HOST=host, PORT=port)
    assert (is_listening(port, host), is_listening(port)) == (True, False)


def test_run_passes_arguments_to_gunicorn(serve):
    server = serve("--workers", "1", "--access-logfile", "-", WEB_CONCURRENCY=3)
    with server.client() as client:
        assert client.get("/api/test").status == 200
    assert server.wait_for("GET /api/test HTTP/1.1")
    assert len(server.workers()) == 1


@pytest.mark.parametrize(
    ("argument", "status", "output"),
    [
        ("--help", 0, r"(?s)usage: .*--bind"),
        ("--unknown", 2, "unrecognized arguments: --unknown"),
        ("--bind=localhost:http", 1, "'http' is not a valid port number"),
        ("--certfile=/nowhere", 1, r"Error: --certfile /nowhere with --keyfile None cannot be used: .*No such file"),
        ("other:app", 2, "unrecognized arguments: other:app"),
    ],
)
def test_run_does_not_migrate_before_gunicorn_accepts_the_arguments(tmp_path, argument, status, output):
    path = tmp_path / "chat.db"
    process = run_python("run.py", argument, DATABASE_URL=f"sqlite:///{path}")
    assert process.returncode == status
    assert re.search(output, process.stdout + process.stderr)
    assert not path.exists()


def test_every_line_of_the_server_is_an_object_with_log_format_json(serve):
    server = serve("--access-logfile", "-", LOG_FORMAT="json")
    for request in (b"INVALID\r\n\r\n", format_head("GET /api/test HTTP/1.1", "Connection: close")):
        with connect(server.port) as connection:
            connection.sendall(request)
            receive_all(connection)
    assert server.terminate() == 0
    server.reader.join(TIMEOUT)
    lines = [json.loads(line) for line in server.lines]
    assert all(datetime.fromisoformat(line["time"]).tzinfo and line["request_id"] for line in lines)
    loggers = {line["logger"]: line["level"] for line in lines}
    assert loggers == {"gunicorn.error": "INFO", "gunicorn.access": "INFO", "app.requests": "INFO"}
    assert ["Invalid request" in line["message"] for line in lines if line["level"] == "WARNING"] == [True]


def test_session_works_on_every_worker_and_on_its_replacement(serve):
    server = serve(WEB_CONCURRENCY=2)
    with server.create_logged_in_client("ada") as ada:
        for _ in range(2):
            for stopped in server.all_workers(2):
                os.kill(stopped, signal.SIGSTOP)
                with server.other_client(ada) as client:
                    assert client.get("/api/users/status").json["users"][0]["status"] == "Online"
                    assert client.is_logged_in()
                os.kill(stopped, signal.SIGCONT)
            os.kill(stopped, signal.SIGKILL)
            wait_until(lambda killed=stopped: killed not in server.workers())


def test_run_with_certificate_sends_secure_cookies(serve, tmp_path):
    server = serve("--certfile", str(create_certificate(tmp_path)))
    with HttpClient(server.port, context=create_tls_context()) as client:
        client.signup("ada")
        cookie = client.login("ada").headers["Set-Cookie"]
    assert cookie.startswith("__Host-chatbot_session=")
    assert {"Secure", "Path=/"} <= {*cookie.split("; ")}
    assert "Domain" not in cookie


def test_run_without_gunicorn_uses_the_server_of_flask(serve):
    server = serve(prefix=run_instead(f"-c {shlex.quote(WITHOUT_GUNICORN)}"))
    assert server.wait_for("gunicorn is not installed")
    assert can_send_message(server)


@pytest.mark.parametrize("command", ["flask run --port 0", "gunicorn --bind 127.0.0.1:0 run:app"])
def test_other_server_serves_a_database_that_flask_db_upgrade_created(serve, empty_database, command):
    migrate(empty_database)
    settings = {"DATABASE_URL": empty_database, "WEB_CONCURRENCY": 1, **SHARED_SESSIONS}
    assert can_send_message(serve(prefix=run_instead(f"-m {command}"), **settings))


@pytest.mark.parametrize("command", ["-c 'import app; app.create_app()'", "-m flask --app run users list"])
def test_script_or_flask_command_without_secret_key_runs_on_a_file_for_its_user_alone(tmp_path, command):
    path = tmp_path / "chat.db"
    migrate(f"sqlite:///{path}")
    assert path.stat().st_mode & 0o777 == 0o600
    assert run_python(*shlex.split(command), DATABASE_URL=f"sqlite:///{path}").returncode == 0


@pytest.mark.parametrize("command", ["run.py", "-m flask run", "-m flask db upgrade"])
@pytest.mark.parametrize(
    ("origins", "path", "content", "error"),
    [
        ("http://a\n*", ".env", b"", "CORS_ORIGINS must .+"),
        ("", ".env", "PORT=1".encode("utf-16"), r"/\S+/clone/\.env .*must be .+"),
        ("", "instance", b"", ".*DATABASE_URL.*"),
    ],
    ids=["invalid setting", "invalid file", "no folder"],
)
def test_unusable_setting_or_file_stops_the_program_with_its_name(clone, origins, path, content, error, command):
    (clone / path).write_bytes(content)
    process = run_python(*command.split(), cwd=clone, CORS_ORIGINS=origins, FLASK_SKIP_DOTENV="1")
    assert process.returncode != 0
    assert re.match(f"Error: {error}\n", process.stderr)
    assert "Traceback" not in process.stderr
    assert process.stdout == ""


@pytest.mark.parametrize("command", ["-c 'import run'", "-m gunicorn --bind 127.0.0.1:0 run:app"])
def test_other_server_without_what_its_processes_share_does_not_start(command):
    for settings, name in (({}, "SECRET_KEY"), ({"SECRET_KEY": "x" * 32}, "SESSIONS_VALID_FROM")):
        process = run_python(*shlex.split(command), WEB_CONCURRENCY="1", **settings)
        [line] = read_lines(process)
        assert (process.returncode, line.startswith(f"Error: {name} must be set")) == (4, True)


@pytest.mark.parametrize(
    "url",
    [
        *("sqlite:////nowhere/chat.db", "sqlite:///{notes}", "postgres://chat:s3cret@nowhere.invalid/chat"),
        "postgres://chat:s3cret@127.0.0.1:{port},127.0.0.2:{port}/chat",
    ],
)
def test_unusable_database_stops_the_program_with_one_line(tmp_path, url):
    notes = tmp_path / "notes.txt"
    notes.write_text("This is not a database, and it is longer than the header of one. " * 20)
    url = url.format(notes=notes, port=find_free_port())
    [line] = read_lines(run_python("run.py", DATABASE_URL=url, DATABASE_WAIT="0"))
    assert line.startswith("Error: the database of DATABASE_URL cannot be used: ")
    assert "s3cret" not in line
    assert notes.read_text().startswith("This is not a database")


@pytest.fixture
def missing_database():
    """The URL of a PostgreSQL database that does not exist, and a function that creates it with options."""
    name = f"chat_test_{secrets.token_hex(4)}"
    with psycopg.connect(SERVER_URL.replace("postgres://", "postgresql://"), autocommit=True) as connection:
        url = make_url(SERVER_URL).set(database=name).render_as_string(hide_password=False)
        yield url, lambda options="": connection.execute(f"CREATE DATABASE {name} {options}")
        connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


@needs_postgresql
@pytest.mark.parametrize(("encoding", "command"), [("LATIN1", "run.py"), ("SQL_ASCII", "-m flask db upgrade")])
def test_database_that_cannot_hold_unicode_stops_the_program_with_one_line(missing_database, encoding, command):
    url, create = missing_database
    create(f"TEMPLATE template0 ENCODING '{encoding}' LOCALE 'C'")
    [line] = read_lines(run_python(*command.split(), DATABASE_URL=url))
    assert re.search(f"Error: .*its encoding must be UTF8, not {encoding}", line)


def test_run_waits_for_the_database_server_up_to_database_wait():
    url = f"postgresql://chat:s3cret@127.0.0.1:{find_free_port()}/chat"
    waiting, error = read_lines(run_python("run.py", DATABASE_URL=url, DATABASE_WAIT="1"))
    assert "Waiting up to 1 s for the database: " in waiting
    assert error.startswith("Error: the database of DATABASE_URL cannot be used: ")
    assert "s3cret" not in waiting + error


@needs_postgresql
def test_run_serves_as_soon_as_the_database_is_available(missing_database):
    url, create = missing_database
    command = ["env", f"DATABASE_URL={url}", f"DATABASE_WAIT={TIMEOUT}", "PORT=0", sys.executable, "run.py"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert any("Waiting up to" in line for line in process.stderr)
            create()
            assert any("Listening at" in line for line in process.stderr)
        finally:
            process.terminate()


def test_run_on_a_newer_schema_warns_and_serves(serve, tmp_path):
    serve().terminate()
    with closing(sqlite3.connect(tmp_path / "chat.db")) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999_from_the_future'")
    server = serve()
    assert server.wait_for("schema is newer than this program")
    assert can_send_message(server)
