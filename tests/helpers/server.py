"""The served program: `python run.py` as a process of its own, and a client that speaks HTTP to it."""

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
from functools import partialmethod
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT = 60  # seconds that anything may take on a busy machine
LISTED_PORTS = (5173, 5174, 3000, 3001, 4200, 8080)  # of development servers, in the default of CORS_ORIGINS
PASSWORD = "correct horse battery staple"
CLIENT_KEEPALIVE = 3  # seconds; the server closes a connection that is idle for 5


def run_concurrently(count, func):
    """Call func(0), func(1), ... at once, each in a thread, and return their results in order."""
    barrier = threading.Barrier(count)

    def run(number):
        barrier.wait(TIMEOUT)
        return func(number)

    with ThreadPoolExecutor(count) as executor:
        return list(executor.map(run, range(count)))


def run_all(*funcs):
    """Call all functions at once, each in a thread, and return their results in order."""
    return run_concurrently(len(funcs), lambda number: funcs[number]())


@contextmanager
def run_in_background(*funcs):
    """Run each function in a thread while the block is executed, then join them; yield their futures."""
    with ThreadPoolExecutor(len(funcs)) as executor:
        yield [executor.submit(func) for func in funcs]


def wait_until(func, timeout=TIMEOUT):
    """Call a function until it returns something true, and return that."""
    deadline = time.monotonic() + timeout
    while not (result := func()):
        assert time.monotonic() < deadline, f"not true within {timeout} s"
        time.sleep(0.01)
    return result


def measure(func, *args, **kwargs):
    """Call a function and return the seconds it took, and its result."""
    start = time.monotonic()
    result = func(*args, **kwargs)
    return time.monotonic() - start, result


def find_free_port():
    """Return a port of the loopback interface that is not in use."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def find_listed_port():
    """Return a port that is not in use, and whose origin CORS_ORIGINS lists by default."""
    return next(port for port in LISTED_PORTS if not is_listening(port))


def connect(port):
    """Return a TCP connection to a port of the loopback interface."""
    return socket.create_connection(("127.0.0.1", port), TIMEOUT)


def is_listening(port, host="127.0.0.1"):
    """Return whether a server accepts connections."""
    with suppress(OSError), socket.create_connection((host, port), TIMEOUT):
        return True
    return False


def format_head(request_line, *fields, cookie=None):
    """Return the head of a request as bytes, with a Host field."""
    lines = [request_line, "Host: localhost", *fields]
    if cookie:
        lines.append(f"Cookie: {cookie}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def receive_all(connection):
    """Return what the server sends until it closes the connection or resets it."""
    data = bytearray()
    with suppress(ConnectionError):
        while chunk := connection.recv(65536):
            data += chunk
    return bytes(data)


class Server:
    """`python run.py` on a free port.

    `arguments` are gunicorn's, `prefix` is a command that runs the program (such as `setpriv`) or another server
    instead, `settings` are environment variables.
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
        self.reader = threading.Thread(target=self._read_output, daemon=True)
        self.reader.start()
        try:
            self.port = int(self.wait_for(r"(?:Listening at:|Running on) https?://\S+:(\d+)")[1])
        except BaseException:
            self.kill()
            raise

    def _read_output(self):
        with self.process.stdout as output:
            self.lines.extend(iter(output.readline, ""))

    @property
    def output(self):
        """What the program has printed so far."""
        return "".join(self.lines)

    def wait_for(self, pattern):
        """Return the first match of a regular expression in the output, as soon as there is one."""
        deadline = time.monotonic() + TIMEOUT
        is_alive = True
        while is_alive and time.monotonic() < deadline:
            is_alive = self.reader.is_alive()
            if match := re.search(pattern, self.output):
                return match
            time.sleep(0.02)
        raise AssertionError(f"{pattern!r} does not match:\n{self.output}")

    def client(self):
        """Return a client without a session."""
        return HttpClient(self.port)

    def other_client(self, client):
        """Return another client with the same session."""
        other = self.client()
        other.cookie = client.cookie
        return other

    def create_logged_in_client(self, username):
        """Sign up a user and return a client with a session of theirs."""
        client = self.client()
        assert client.signup(username).status == 201
        assert client.login(username).status == 200
        return client

    def workers(self):
        """Return the process ids of the workers."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()]

    def all_workers(self, count=2):
        """Return the process ids of the workers as soon as there are `count`."""
        return wait_until(lambda: len(pids := self.workers()) == count and pids)

    def terminate(self):
        """Send SIGTERM, wait for the end of the program and return its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(TIMEOUT)

    def kill(self):
        """Kill the master and every worker at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(TIMEOUT)
        self.reader.join(TIMEOUT)


class Response:
    """A response that was read to its end."""

    def __init__(self, response):
        self.status = response.status
        self.headers = response.headers
        self.body = response.read()

    @property
    def json(self):
        return json.loads(self.body)


def read_response(connection):
    """Read a response from a socket to its end."""
    with HTTPResponse(connection) as response:
        response.begin()
        return Response(response)


class HttpClient:
    """A client with one keep-alive connection and a session cookie; with an SSL context it speaks https.

    Raises OSError or http.client.HTTPException when the connection is lost.
    """

    def __init__(self, port, timeout=TIMEOUT, context=None):
        if context:
            self.connection = HTTPSConnection("localhost", port, timeout=timeout, context=context)
        else:
            self.connection = HTTPConnection("127.0.0.1", port, timeout=timeout)
        self.cookie = None
        self.last_used_at = 0.0

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def close(self):
        self.connection.close()

    def send_request(self, method, path, body=None, **headers):
        """Send a request and return the http.client.HTTPResponse, whose body is still to be read.

        A body is sent as JSON, unless it is bytes; in the names of headers `_` stands for `-`.
        """
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if self.cookie:
            headers.setdefault("Cookie", self.cookie)
        if body is not None:
            headers.setdefault("Content-Type", "application/json")
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
        if time.monotonic() - self.last_used_at > CLIENT_KEEPALIVE:
            self.close()
        self.connection.request(method, path, body, headers)
        response = self.connection.getresponse()
        if cookie := response.headers["Set-Cookie"]:
            self.cookie = cookie.partition(";")[0]
        return response

    def request(self, method, path, body=None, **headers):
        """Send a request and return the Response."""
        try:
            response = Response(self.send_request(method, path, body, **headers))
        except BaseException:
            self.close()
            raise
        self.last_used_at = time.monotonic()
        return response

    get = partialmethod(request, "GET")
    post = partialmethod(request, "POST")
    put = partialmethod(request, "PUT")
    delete = partialmethod(request, "DELETE")

    def stream(self, method, path, body=None, **headers):
        """Send a request and yield its server-sent events, as they arrive, as (event, data, id).

        The data is parsed as JSON; comments are left out; the id is None if the event has none.
        """
        try:
            response = self.send_request(method, path, body, **{"Accept": "text/event-stream", **headers})
            assert response.headers.get_content_type() == "text/event-stream", (response.status, response.read())
            yield from parse_events(response)
        finally:
            self.close()

    def signup(self, username, password=PASSWORD):
        return self.post("/api/signup", {"username": username, "password": password})

    def login(self, username, password=PASSWORD):
        return self.post("/api/login", {"username": username, "password": password})

    def is_logged_in(self):
        return self.get("/api/current_user").status == 200

    def create_conversation(self, name="Conversation"):
        """Create a conversation and return its id."""
        return self.post("/api/conversations", {"name": name}).json["id"]

    def send_message(self, conversation_id, text="Hello", **headers):
        return self.post(f"/api/conversations/{conversation_id}/messages", {"text": text}, **headers)

    def list_messages(self, conversation_id):
        """Return all messages of a conversation."""
        return self.get(f"/api/conversations/{conversation_id}").json["messages"]


def parse_events(lines):
    """Yield the server-sent events of an iterable of lines as (event, data, id)."""
    fields = {}
    for line in lines:
        name, _, value = line.decode().rstrip("\r\n").partition(":")
        if name:
            fields[name] = value.removeprefix(" ")
        elif "data" in fields:
            yield fields.get("event", "message"), json.loads(fields["data"]), fields.get("id")
            fields = {}
        else:
            fields = {}
