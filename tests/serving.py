"""The program as users run it: `python run.py` in a process of its own, and a client that speaks HTTP to it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path

ROOT = Path(__file__).parent.parent
PATIENCE = 60  # seconds that anything may take on a busy machine


def crowd(size, act):
    """Call act(0), act(1), ... each in a thread of its own, all at once; return what they return, in order."""
    start = threading.Barrier(size)

    def join(number):
        start.wait(PATIENCE)
        return act(number)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(join, range(size)))


def together(*acts):
    """Call each of `acts` in a thread of its own, all at once; return what they return, in order."""
    return crowd(len(acts), lambda number: acts[number]())


@contextmanager
def background(*acts):
    """Run each of `acts` in a thread while the block lasts, then join them; hand on their futures."""
    with ThreadPoolExecutor(len(acts)) as pool:
        yield [pool.submit(act) for act in acts]


def timed(act, *args, **kwargs):
    """Return how many seconds a call took, and what it returned."""
    started = time.monotonic()
    result = act(*args, **kwargs)
    return time.monotonic() - started, result


def eventually(check, patience=PATIENCE):
    """Call `check` until it returns something true; return that."""
    deadline = time.monotonic() + patience
    while not (result := check()):
        assert time.monotonic() < deadline, f"waited {patience} s in vain"
        time.sleep(0.05)
    return result


def figure(name, value):
    """Add a line to the file that TEST_FIGURES names, if it is set: what was measured, in which test."""
    if path := os.environ.get("TEST_FIGURES"):
        test = os.environ["PYTEST_CURRENT_TEST"].split("::")[-1].removesuffix(" (call)")
        with open(path, "a") as file:
            file.write(f"{test}: {name} = {value:.3g}\n" if isinstance(value, float) else f"{test}: {name} = {value}\n")


def free_port():
    """Return a port of the loopback interface that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class Server:
    """`python run.py` on a free port, with its settings; `lines` is what it has printed so far.

    `prefix` is a command that runs the program, such as `setpriv`.
    """

    def __init__(self, *arguments, prefix=(), **settings):
        settings = {"PORT": "0", **settings}
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "run.py", *arguments],
            cwd=ROOT,
            env={**os.environ, **{name: str(value) for name, value in settings.items()}},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        if settings["PORT"] == "0":
            self.port = int(self.wait_for(r"Listening at: http://\S+:(\d+)")[1])
        else:
            self.port = int(settings["PORT"])
            self.wait_for("Listening at")

    def _read(self):
        with self.process.stdout as output:
            self.lines.extend(iter(output.readline, ""))

    def wait_for(self, pattern):
        """Return the first match of `pattern` in a line of the output, as soon as it is there."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            for line in list(self.lines):
                if match := re.search(pattern, line):
                    return match
            if self.process.poll() is not None and not self.reader.is_alive():
                break
            time.sleep(0.02)
        raise AssertionError(f"no line like {pattern!r} in:\n{''.join(self.lines)}")

    def client(self):
        return HttpClient(self.port)

    def spare_client(self, client):
        """Return another client with the same session."""
        spare = self.client()
        spare.cookie = client.cookie
        return spare

    def newcomer(self, username):
        """Return the client of someone who has just signed up and logged in."""
        client = self.client()
        assert client.signup(username).status == 201
        assert client.login(username).status == 200
        return client

    @property
    def output(self):
        return "".join(self.lines)

    def workers(self):
        """Return the process ids of the workers."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()]

    def all_workers(self, count=2):
        """Return the process ids of the workers as soon as there are so many."""
        return eventually(lambda: len(pids := self.workers()) == count and pids)

    def terminate(self):
        """Send SIGTERM; return the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)

    def kill(self):
        """End the master and every worker at once, as a power cut would."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE)
        self.reader.join(PATIENCE)


class Answer:
    """What came back: status, headers, body; `json` is the body parsed."""

    def __init__(self, response):
        self.status = response.status
        self.headers = response.headers
        self.body = response.read()

    @property
    def json(self):
        return json.loads(self.body)


class HttpClient:
    """A client with one keep-alive connection and a session cookie. Raises OSError or HTTPException when cut off."""

    def __init__(self, port, timeout=PATIENCE):
        self.connection = HTTPConnection("127.0.0.1", port, timeout=timeout)
        self.cookie = None
        self.used = 0.0

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def close(self):
        self.connection.close()

    def request(self, method, path, body=None, **headers):
        """Send a request, with `body` as JSON if there is one; headers by name, `_` for `-`."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if self.cookie:
            headers["Cookie"] = self.cookie
        if body is not None:
            headers["Content-Type"] = "application/json"
            body = json.dumps(body)
        if time.monotonic() - self.used > 3:  # the server hangs up on a client that is silent for 5 s
            self.close()
        try:
            self.connection.request(method, path, body, headers)
            answer = Answer(self.connection.getresponse())
            self.used = time.monotonic()
        except BaseException:
            self.close()
            raise
        if "Set-Cookie" in answer.headers:
            self.cookie = answer.headers["Set-Cookie"].split(";")[0]
        return answer

    def get(self, path, **headers):
        return self.request("GET", path, **headers)

    def post(self, path, body=None, **headers):
        return self.request("POST", path, body, **headers)

    def signup(self, username, password="correct horse"):
        return self.post("/api/signup", {"username": username, "password": password})

    def login(self, username, password="correct horse"):
        return self.post("/api/login", {"username": username, "password": password})

    def is_logged_in(self):
        return self.get("/api/current_user").status == 200

    def create(self, name="Talk"):
        """Open a conversation and return its id."""
        return self.post("/api/conversations", {"name": name}).json["id"]

    def send(self, conversation_id, text="Hello", **headers):
        return self.post(f"/api/conversations/{conversation_id}/messages", {"text": text}, **headers)

    def messages(self, conversation_id):
        """Return the messages of one of the caller's conversations."""
        [talk] = [talk for talk in self.get("/api/conversations").json if talk["id"] == conversation_id]
        return talk["messages"]


def pairs(messages):
    """Return what the user said, one by one; pairs must be whole and adjacent, ids must ascend."""
    ids = [message["id"] for message in messages]
    assert ids == sorted(set(ids))
    assert [message["sender"] for message in messages] == ["user", "bot"] * (len(messages) // 2)
    said = [message["text"] for message in messages[::2]]
    for text, reply in zip(said, messages[1::2], strict=True):
        assert text.startswith("/") or text[:70] in reply["text"]  # the simulated bot repeats what it was told
    return said
