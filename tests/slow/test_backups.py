"""The README's backup of a SQLite database and its restore, and what a stopped server leaves."""

import shutil
import stat
import subprocess

import pytest

from tests.conftest import SHARED_SESSIONS
from tests.helpers.readme import get_block
from tests.helpers.server import TIMEOUT, Server

BACK_UP, RESTORE = get_block("bash", ".backup").splitlines()

pytestmark = pytest.mark.skipif(not shutil.which("sqlite3"), reason="sqlite3 is not installed")


@pytest.fixture
def start(tmp_path):
    """A function that starts a server of the database in the folder `instance`."""
    servers = []

    def start():
        url = f"sqlite:///{tmp_path / 'instance' / 'chatbot.db'}"
        servers.append(Server(DATABASE_URL=url, **SHARED_SESSIONS))
        return servers[-1]

    (tmp_path / "instance").mkdir()
    yield start
    for server in servers:
        server.kill()


@pytest.mark.parametrize("stop", [Server.terminate, Server.kill])
def test_restored_backup_is_private_and_has_what_was_stored_at_its_time(start, tmp_path, stop):
    server = start()
    with server.create_logged_in_client("ada") as ada:
        id = ada.create_conversation("Before")
        ada.send_message(id, "Before")
        before = ada.get("/api/conversations").json
        subprocess.run(BACK_UP, shell=True, cwd=tmp_path, check=True, timeout=TIMEOUT)
        assert stat.S_IMODE((tmp_path / "instance" / "backup.db").stat().st_mode) == 0o600
        ada.send_message(id, "After")
        ada.create_conversation("After")
    stop(server)
    subprocess.run(RESTORE, shell=True, cwd=tmp_path, check=True, timeout=TIMEOUT)
    with start().other_client(ada) as client:
        assert client.get("/api/conversations").json == before


def test_clean_stop_leaves_the_database_in_one_file(start, tmp_path):
    server = start()
    with server.create_logged_in_client("ada") as ada:
        ada.create_conversation()
        assert server.terminate() == 0
    assert [path.name for path in (tmp_path / "instance").iterdir()] == ["chatbot.db"]
