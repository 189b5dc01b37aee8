"""Rate limits counted in Redis, and in each process while Redis is unavailable."""

import shutil
import signal
import socket
import subprocess
import time
from contextlib import contextmanager, suppress

import pytest
import redis
from flask import Flask
from limits import parse
from werkzeug.exceptions import TooManyRequests

from app import security
from app.security import STORAGE_RETRY_INTERVAL, rate_limiter
from tests.conftest import on_sqlite
from tests.helpers.server import TIMEOUT, find_free_port, is_listening, measure, run_concurrently, wait_until

pytestmark = pytest.mark.skipif(not shutil.which("redis-server"), reason="redis-server is not installed")

LIMIT = parse("5 per minute")


class RedisServer:
    """A Redis server on a free port of its own."""

    def __init__(self, folder, *options):
        self.port = find_free_port()
        self.command = ["redis-server", *options, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder)]
        self.url = f"redis://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL)
        wait_until(lambda: is_listening(self.port))

    def execute(self, *command):
        with redis.Redis(port=self.port) as client:
            return client.execute_command(*command)

    def kill(self):
        self.process.kill()
        self.process.wait(TIMEOUT)


@contextmanager
def run_redis(folder, *options):
    server = RedisServer(folder, "--save", "", *options)
    try:
        yield server
    finally:
        server.kill()


@contextmanager
def run_cluster(folder):
    """Run a cluster of one Redis server."""
    with run_redis(folder, "--cluster-enabled", "yes") as server:
        server.execute("CLUSTER ADDSLOTSRANGE", 0, 16383)
        wait_until(lambda: server.execute("CLUSTER INFO")["cluster_state"] == "ok")
        server.url = f"redis+cluster://127.0.0.1:{server.port}"
        yield server


@contextmanager
def run_sentinel(folder):
    """Run a Redis server and a Sentinel that monitors it; yield the Sentinel."""
    with run_redis(folder) as primary:
        config = folder / "sentinel.conf"
        config.write_text(f"sentinel monitor main 127.0.0.1 {primary.port} 1\n")
        sentinel = RedisServer(folder, str(config), "--sentinel")
        sentinel.url = f"redis+sentinel://127.0.0.1:{sentinel.port}/main"
        try:
            yield sentinel
        finally:
            sentinel.kill()


@pytest.fixture
def server(tmp_path):
    with run_redis(tmp_path) as server:
        yield server


def count_connections(listener):
    """Return how many clients connected since the last call."""
    count = 0
    with suppress(BlockingIOError):
        while True:
            listener.accept()[0].close()
            count += 1
    return count


def create_app(url):
    app = Flask("storage")
    app.config["RATE_LIMIT_STORAGE"] = url
    security.init_app(app)
    return app


def is_accepted(method, app, key="key"):
    """Return whether a method of the rate limiter accepts an attempt."""
    with app.app_context():
        try:
            getattr(rate_limiter, method)(LIMIT, key)
            return True
        except TooManyRequests:
            return False


def record(app, key="key"):
    """Return whether an attempt is within the limit, as a login does."""
    return is_accepted("check", app, key) and is_accepted("record", app, key)


def count_accepted(app, attempts=10, key="key"):
    return sum(record(app, key) for _ in range(attempts))


@pytest.mark.parametrize("run", [run_redis, run_sentinel, run_cluster])
def test_concurrent_attempts_at_apps_with_the_same_storage_share_an_exact_count(run, tmp_path, caplog):
    with run(tmp_path) as server:
        apps = create_app(server.url), create_app(server.url)
        accepted = run_concurrently(40, lambda number: is_accepted("record", apps[number % 2]))
        assert sum(accepted) == 5
        assert caplog.records == []


@on_sqlite
def test_workers_share_the_limit_of_sends(server, serve):
    program = serve(RATE_LIMIT_STORAGE=server.url, SEND_RATE_LIMIT="3 per hour", WEB_CONCURRENCY=2)
    program.all_workers(2)
    with program.create_logged_in_client("ada") as ada:
        id, statuses = ada.create_conversation(), []
        for _ in range(10):
            statuses.append(ada.send_message(id).status)
            ada.close()  # so that the next one is of either worker
    assert statuses == [201] * 3 + [429] * 7


@pytest.mark.parametrize("scheme", ["redis", "redis+cluster", "redis+sentinel"])
def test_app_without_its_storage_counts_in_the_process(scheme, caplog):
    app = create_app(f"{scheme}://127.0.0.1:{find_free_port()}/0")
    assert count_accepted(app) == 5
    assert len(caplog.records) == 1


def test_app_whose_storage_is_killed_counts_in_the_process(server, caplog):
    app = create_app(server.url)
    assert record(app)
    server.kill()
    assert count_accepted(app) == 5
    assert ["(ConnectionError)" in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize("credentials", ["", ":wrong@", "nobody:wrong@"])
def test_app_with_wrong_credentials_counts_in_the_process(tmp_path, caplog, credentials):
    with run_redis(tmp_path, "--requirepass", "secret") as server:
        assert count_accepted(create_app(server.url.replace("//", "//:secret@"))) == 5
        assert caplog.records == []
        assert count_accepted(create_app(server.url.replace("//", f"//{credentials}"))) == 5
    assert ["(AuthenticationError)" in record.getMessage() for record in caplog.records] == [True]


def test_app_with_read_only_storage_counts_in_the_process(server, caplog):
    server.execute("REPLICAOF", "127.0.0.1", find_free_port())
    assert count_accepted(create_app(server.url)) == 5
    assert len(caplog.records) == 1


def test_restarted_storage_is_used_again(server):
    app, other_app = create_app(server.url), create_app(server.url)
    server.kill()
    assert record(app, "other key")
    server.start()
    assert count_accepted(other_app) == 5
    wait_until(lambda: not is_accepted("check", app))
    assert count_accepted(app, 10, "new key") == 5
    assert count_accepted(other_app, 10, "new key") == 0


@pytest.mark.parametrize(
    ("run", "connected"),
    [(run_redis, True), (run_redis, False), (run_sentinel, False), (run_cluster, True), (run_cluster, False)],
)
def test_hanging_storage_costs_a_second_once(run, connected, tmp_path, caplog):
    with run(tmp_path) as server:
        app = create_app(server.url)
        if connected:
            assert record(app)
        server.process.send_signal(signal.SIGSTOP)  # connections are still accepted
        seconds, _ = measure(record, app, "first key")
        assert seconds < 10
        seconds, accepted = measure(count_accepted, app, 50)
        assert accepted == 5
        assert seconds < 25
    assert len(caplog.records) == 1


def test_hanging_storage_is_tried_by_one_call_per_interval():
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listener:
        listener.setblocking(False)
        app = create_app(f"redis://127.0.0.1:{listener.getsockname()[1]}")
        assert record(app)
        assert count_connections(listener) == 1

        time.sleep(STORAGE_RETRY_INTERVAL)
        seconds, accepted = measure(run_concurrently, 20, lambda number: record(app))
        assert sum(accepted) == 4
        assert 1 <= count_connections(listener) <= 3 + seconds // STORAGE_RETRY_INTERVAL
