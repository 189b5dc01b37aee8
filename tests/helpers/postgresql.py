"""A PostgreSQL server of its own for a test, to stop and start."""

import os
import shutil
import subprocess
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg

from tests.helpers.server import TIMEOUT, find_free_port, wait_until


def find_initdb():
    """Return the path of PostgreSQL's initdb, or None."""
    return next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))), None) or shutil.which("initdb")


class PostgreSQLServer:
    """A PostgreSQL server with its data in a folder; as root, it runs as the user postgres.

    With a primary, which must have been started, it is a replica of that. `source` is the folder of another
    PostgreSQL than that of the machine.
    """

    def __init__(self, folder, primary=None, source=None):
        self.programs = Path(find_initdb()).parent
        self.folder = folder
        if source:  # the user postgres may not be able to read the original
            self.programs = shutil.copytree(source, folder / "postgresql", symlinks=True) / "bin"
        self.user = "postgres" if os.getuid() == 0 else None
        self.port = find_free_port()
        if self.user:
            shutil.chown(folder, self.user)
        data = folder / "data"
        if primary:
            self.run("pg_basebackup", "-d", primary.url, "-D", data, "-R", "-N", "-c", "fast")
        else:
            self.run("initdb", "-D", data, "-U", "chat", "-A", "trust", "-N", "-E", "UTF8")

    @property
    def url(self):
        return f"postgresql://chat@127.0.0.1:{self.port}/postgres"

    def run(self, program, *arguments):
        """Run a program of PostgreSQL's."""
        command = [self.programs / program, *map(str, arguments)]
        subprocess.run(command, user=self.user, cwd="/", stdout=subprocess.DEVNULL, timeout=2 * TIMEOUT, check=True)

    def start(self, **settings):
        settings = {"listen_addresses": "127.0.0.1", **settings}
        options = f"-p {self.port} -k {self.folder} " + " ".join(f"-c {name}={settings[name]}" for name in settings)
        self.run("pg_ctl", "start", "-w", "-D", self.folder / "data", "-l", self.folder / "log", "-o", options)

    def promote(self):
        """Let a replica become the primary."""
        self.run("pg_ctl", "promote", "-w", "-D", self.folder / "data")

    def list_processes(self):
        """Return the process ids of the server, that of the main process first."""
        pid = (self.folder / "data" / "postmaster.pid").read_text().split()[0]
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        return [int(pid), *map(int, children.split())]

    def send_signal(self, number):
        """Send a signal to all processes. After SIGSTOP, connections are still accepted, but nothing is answered."""
        for pid in self.list_processes():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def stop(self, mode):
        """Stop the server: `fast` ends its sessions, `immediate` is like a crash."""
        self.run("pg_ctl", "stop", "-w", "-D", self.folder / "data", "-m", mode)


@contextmanager
def run_pgbouncer(postgresql, pool_size):
    """Run PgBouncer in transaction mode, whose clients share a few connections to a server; yield its URL and pid."""
    port = find_free_port()
    config = postgresql.folder / "pgbouncer.ini"
    config.write_text(f"""
        [databases]
        postgres = host=127.0.0.1 port={postgresql.port} user=chat
        [pgbouncer]
        listen_addr = 127.0.0.1
        listen_port = {port}
        unix_socket_dir =
        auth_type = any
        pool_mode = transaction
        default_pool_size = {pool_size}
        logfile = {postgresql.folder / "pgbouncer.log"}
    """)
    config.chmod(0o644)
    url = f"postgresql://chat@127.0.0.1:{port}/postgres"
    process = subprocess.Popen(["pgbouncer", "-q", config], user=postgresql.user, cwd="/")
    try:
        wait_until(lambda: can_connect(url))
        yield url, process.pid
    finally:
        process.kill()
        process.wait()


def can_connect(url):
    """Return whether a PostgreSQL server or PgBouncer accepts connections."""
    with suppress(psycopg.OperationalError), psycopg.connect(url):
        return True
    return False
