"""`python run.py`, `python -m flask run`: how the program starts, what it listens to, how it ends."""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from http.client import HTTPConnection

import pytest

from config import SETTINGS
from tests.serving import PATIENCE, ROOT, Server, eventually, free_port

pytestmark = pytest.mark.slow
WITHOUT_GUNICORN = """
import importlib.util, runpy, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "gunicorn" else found(name, *rest)
runpy.run_path("run.py", run_name="__main__")
"""


class FlaskServer(Server):
    """Flask's own server, which says otherwise where it listens."""

    def wait_for(self, pattern):
        return super().wait_for(pattern.replace("Listening at:", "Running on"))


def instead(*arguments):
    """Return the prefix that has Server start Python with these arguments rather than with run.py."""
    return ("sh", "-c", f'exec "$0" {shlex.join(arguments)}')


def is_served(port, host="127.0.0.1"):
    """Tell whether the program answers there; False when nobody listens."""
    connection = HTTPConnection(host, port, timeout=PATIENCE)
    try:
        connection.request("GET", "/api/test")
        return connection.getresponse().read() == b'{"message":"Server is running"}'
    except ConnectionRefusedError:
        return False
    finally:
        connection.close()


def has_ipv6():
    with suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


@pytest.fixture
def start(tmp_path):
    """A function that starts a server of some class, on a database without tables unless told otherwise."""
    servers = []

    def start(*arguments, kind=Server, **settings):
        url = f"sqlite:///{tmp_path / 'chat.db'}"
        given = {"DATABASE_URL": url, "PASSWORD_HASH_METHOD": "pbkdf2:sha256:1", "WEB_CONCURRENCY": 1}
        servers.append(kind(*arguments, **given | settings))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


def talks(server):
    """Tell whether someone can sign up, log in and talk: the tables are there."""
    with server.client() as ada:
        ada.signup("ada")
        ada.login("ada")
        return ada.send(ada.create()).status == 201


def test_the_program_migrates_an_empty_database_says_where_it_listens_and_serves(start, empty_database):
    server = start(DATABASE_URL=empty_database)
    assert server.wait_for(rf"Listening at: http://127\.0\.0\.1:{server.port}\b")
    assert talks(server)


def test_the_program_runs_from_another_folder(start):
    server = start(prefix=("sh", "-c", f'cd / && exec "$0" {shlex.quote(str(ROOT / "run.py"))}'))
    assert talks(server)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no clone")
def test_running_a_clone_with_default_settings_leaves_it_clean(start, tmp_path):
    def git(*arguments, folder=tmp_path / "clone"):
        command = ["git", "-C", folder, "-c", "user.name=Ada", "-c", "user.email=ada@example.com", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE).stdout

    for path in git("ls-files", "-z", "-co", "--exclude-standard", folder=ROOT).split("\0"):
        if (ROOT / path).is_file():
            (tmp_path / "clone" / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, tmp_path / "clone" / path)
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "A clone")

    server = start(prefix=("env", "-C", tmp_path / "clone"), **dict.fromkeys(SETTINGS.keys() - {"PORT"}, ""))
    assert talks(server)
    assert (tmp_path / "clone/instance/chatbot.db").is_file()
    assert git("status", "--porcelain") == ""
    assert server.terminate() == 0
    assert git("status", "--porcelain") == ""


def test_host_and_port_choose_where_it_listens(start):
    port = free_port()
    start(HOST="127.0.0.2", PORT=port)
    assert is_served(port, "127.0.0.2")
    assert not is_served(port)


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")
def test_the_host_may_be_an_ipv6_address(start):
    server = start(HOST="::1")
    assert is_served(server.port, "::1")
    assert not is_served(server.port)


def test_further_arguments_are_gunicorns(start):
    server = start("--workers", "1", "--access-logfile", "-", WEB_CONCURRENCY=3)
    assert is_served(server.port)
    assert server.wait_for("GET /api/test HTTP/1.1")
    assert len(server.workers()) == 1


def test_a_session_works_on_every_worker_respawned_ones_too(start):
    server = start(WEB_CONCURRENCY=3)
    workers = eventually(lambda: len(server.workers()) == 3 and server.workers())
    with server.newcomer("ada") as ada:
        works_on_each(workers, server, ada)
        os.kill(workers[0], signal.SIGKILL)
        workers = eventually(lambda: len({*server.workers()} - {workers[0]}) == 3 and server.workers())
        works_on_each(workers, server, ada)


def works_on_each(workers, server, person):
    """Check that a session works on each worker, while the others are stopped."""
    for worker in workers:
        others = {*workers} - {worker}
        for other in others:
            os.kill(other, signal.SIGSTOP)
        with server.spare_client(person) as client:
            assert client.is_logged_in()
            [status] = client.get("/api/users/status").json["users"]
            assert status["status"] == "Online"
        for other in others:
            os.kill(other, signal.SIGCONT)


def test_sigterm_ends_the_program_well_and_all_sessions_with_it(start):
    server = start()
    with server.newcomer("ada") as ada:
        pass
    assert server.terminate() == 0
    with start().spare_client(ada) as client:
        assert not client.is_logged_in()
        [status] = client.get("/api/users/status").json["users"]
        assert status["status"] == "Offline"


def test_without_gunicorn_flasks_server_takes_over_and_says_so(start):
    server = start(kind=FlaskServer, prefix=instead("-c", WITHOUT_GUNICORN))
    assert server.wait_for("gunicorn is not installed")
    assert talks(server)


def test_flask_run_serves_what_flask_db_upgrade_has_made(start, empty_database):
    subprocess.run(
        [sys.executable, "-m", "flask", "db", "upgrade"],
        cwd=ROOT,
        env={**os.environ, "DATABASE_URL": empty_database},
        check=True,
        timeout=PATIENCE,
    )
    server = start(kind=FlaskServer, prefix=instead("-m", "flask", "run", "--port", "0"), DATABASE_URL=empty_database)
    assert talks(server)


@pytest.fixture
def no_database(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("This is not a database, and it is longer than the head of one. " * 20)
    return path


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:////nowhere/chat.db",
        "sqlite:////proc/chat.db",
        "sqlite:///{no_database}",
        "postgres://chat:s3cret@127.0.0.1:{port}/chat",
        "postgres://chat:s3cret@nowhere.invalid/chat",
        "postgres://chat:s3cret@127.0.0.1/chat?nonsense=1",
    ],
)
def test_a_database_that_cannot_be_used_stops_the_start_with_one_line(no_database, url):
    url = url.format(no_database=no_database, port=free_port())
    run = subprocess.run(
        [sys.executable, "run.py"],
        cwd=ROOT,
        env={**os.environ, **dict.fromkeys(SETTINGS, ""), "DATABASE_URL": url},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert run.returncode != 0
    [line] = (run.stdout + run.stderr).splitlines()
    assert line.startswith("Error: the database of DATABASE_URL cannot be used: ")
    assert "s3cret" not in line
    assert no_database.read_text().startswith("This is not a database")
