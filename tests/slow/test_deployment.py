"""The systemd unit and the Dockerfile: as another user, on a file system that is read-only but for one folder.

Their commands run as they stand there, in a root folder that has the system, Python and the files they name.
"""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tests.conftest import CHEAP_HASH
from tests.helpers.readme import get_block
from tests.helpers.server import ROOT, TIMEOUT, Server

UNIT = (ROOT / ".deploy/chat.service").read_text()
DOCKERFILE = (ROOT / ".deploy/Dockerfile").read_text()
RUN = get_block("bash", "docker run")
STOP_TIMEOUT = int(re.search("--stop-timeout ([0-9]+)", RUN)[1])  # systemd's is 90 unless the unit says less
FOLDER = "/srv/chat"
UID = 10000

# Arguments: the root folder to create, the project, its data and where they are to be, Python and its environment.
# With DynamicUser, systemd gives a service a /tmp of its own.
SCRIPT = r"""
set -e
root=$1 project=$2 data=$3 data_point=$4 base_prefix=$5 prefix=$6
mount -t tmpfs -o mode=755 tmpfs "$root"
for folder in /usr /bin /lib /lib64 /etc "$base_prefix"; do
    [ -e "$folder" ] || continue
    mkdir -p "$root$folder"
    mount -o bind,ro "$folder" "$root$folder"
done
mkdir -p "$root/dev" "$root/proc" "$root/srv/chat" "$root$data_point"
mount --rbind /dev "$root/dev"
mount --rbind /proc "$root/proc"
mount -o bind,ro "$project" "$root/srv/chat"
mount -o bind,ro "$prefix" "$root/srv/chat/.venv"
mount --bind "$data" "$root$data_point"
[ -z "$PRIVATE_TMP" ] || { mkdir -p "$root/tmp"; mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"; }
mount -o remount,ro "$root"
exec chroot --userspec="$OWNER" --groups= "$root" env -C /srv/chat $COMMAND
"""


def can_mount():
    """Return whether this process may give a child a file system of its own."""
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return bool(shutil.which("unshare")) and subprocess.run(command, capture_output=True).returncode == 0


needs_mount = pytest.mark.skipif(not can_mount(), reason="mounting needs root's rights")


def copy_project(folder):
    """Copy the files that the Dockerfile copies, readable by everybody, and return the folder."""
    folder.mkdir()
    for sources in re.findall("^COPY (.+) [^ ]+$", DOCKERFILE, re.MULTILINE):
        for source in sources.split():
            copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
            copy(ROOT / source, folder / source)
    (folder / ".venv").mkdir()
    subprocess.run(["chmod", "-R", "u=rwX,go=rX", folder], check=True)
    return folder


def get_unit_settings():
    """Return the command, the settings and the folder of data of the unit."""
    lines = dict(line.split("=", 1) for line in UNIT.splitlines() if "=" in line)
    name, value = lines["Environment"].split("=", 1)
    return lines["ExecStart"], {name: value, "PRIVATE_TMP": "1"}, f"/var/lib/{lines['StateDirectory']}"


def get_container_settings():
    """Return the command, the settings and the folder of data of the container."""
    command = shlex.join(json.loads(re.search("^CMD (.+)$", DOCKERFILE, re.MULTILINE)[1]))
    settings = dict(re.findall(r"([A-Z_]+)=(\S+)", re.search("^ENV (.+)$", DOCKERFILE, re.MULTILINE)[1]))
    path = {"PATH": f"{FOLDER}/.venv/bin:{os.environ['PATH']}"}  # the image's python has the packages
    return command, settings | path, re.search("-v chat:([^ ]+)", RUN)[1]


@pytest.fixture(params=[get_unit_settings, get_container_settings], ids=["unit", "container"])
def start(request, tmp_path):
    """Return a function that starts the program as the unit or the container does."""
    command, settings, data_point = request.param()
    project, root, data = copy_project(tmp_path / "project"), tmp_path / "root", tmp_path / "data"
    root.mkdir()
    data.mkdir(0o700)
    os.chown(data, UID, UID)
    script = ["unshare", "--mount", "--propagation", "private", "sh", "-c", SCRIPT, "sh"]
    prefix = [*script, root, project, data, data_point, sys.base_prefix, sys.prefix]
    settings |= {"COMMAND": command, "OWNER": f"{UID}:{UID}", "PASSWORD_HASH_METHOD": CHEAP_HASH}
    servers = []

    def start(**more):
        servers.append(Server(prefix=prefix, **settings | more))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@needs_mount
def test_program_serves_as_another_user_and_ends_within_its_grace(start, tmp_path):
    server = start()
    with server.create_logged_in_client("ada") as ada:
        response = ada.send_message(ada.create_conversation(), "/slow 100", Prefer="respond-async")
        assert response.status == 202
    assert {Path(f"/proc/{pid}").stat().st_uid for pid in [server.process.pid, *server.all_workers()]} == {UID}
    os.killpg(server.process.pid, signal.SIGTERM)  # as systemd does
    assert server.process.wait(STOP_TIMEOUT) == 0
    with closing(sqlite3.connect(tmp_path / "data" / "chatbot.db")) as connection:
        statuses = connection.execute("SELECT status FROM message WHERE sender = 'bot'").fetchall()
    assert statuses == [("failed",)]
    assert "Traceback" not in server.output


@needs_mount
def test_container_listens_on_every_address_unit_on_the_loopback_interface_and_systemd_is_told(start, request):
    host = {"container": "0.0.0.0", "unit": "127.0.0.1"}[request.node.callspec.id]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(b"\0chat-test-%d" % os.getpid())
        listener.settimeout(TIMEOUT)
        server = start(NOTIFY_SOCKET=f"@chat-test-{os.getpid()}")
        assert b"READY=1" in listener.recv(4096)
    assert server.wait_for(rf"Listening at: http://{re.escape(host)}:{server.port}\b")


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_unit_is_valid(tmp_path):
    path = tmp_path / "chat.service"
    path.write_text(UNIT.replace(f"{FOLDER}/.venv/bin/python", sys.executable))
    process = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True, timeout=TIMEOUT)
    assert (process.returncode, process.stdout + process.stderr) == (0, "")
