"""The program as users run it: `python run.py` in a process of its own, and a client that speaks HTTP to it."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from http.client import HTTPConnection
from pathlib import Path

ROOT = Path(__file__).parent.parent
PATIENCE = 60  # seconds that anything may take on a busy machine


class Server:
    """`python run.py` on a free port, with its settings; `lines` is what it has printed so far."""

    def __init__(self, *arguments, **settings):
        settings = {"PORT": "0", **settings}
        self.process = subprocess.Popen(
            [sys.executable, "run.py", *arguments],
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

    def workers(self):
        """Return the process ids of the workers."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()]

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
        try:
            self.connection.request(method, path, body, headers)
            answer = Answer(self.connection.getresponse())
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

    def create(self, name="Talk"):
        """Open a conversation and return its id."""
        return self.post("/api/conversations", {"name": name}).json["id"]

    def send(self, conversation_id, text="Hello", **headers):
        return self.post(f"/api/conversations/{conversation_id}/messages", {"text": text}, **headers)
