"""A model server on the loopback interface: POST /v1/chat/completions as OpenAI's, with every deviation and failure."""

import json
import select
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.helpers.server import TIMEOUT, run_in_background


class ModelServer(ThreadingHTTPServer):
    """A server that plays its `script`, followed by its `ending`, in response to every request.

    A step is a chunk's text (str), server-sent events as they are on the wire (bytes), or a function of the handler,
    such as `stall`. `requests` has the body of each request, `headers` their headers, `paths` their paths.
    With a TLS context it speaks https; if it also is a proxy, it does so after CONNECT, in place of the other server.
    If `refuse`, a function of the request, returns a (status, body, headers), that is the response instead.
    """

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, tls_context=None, is_proxy=False):
        super().__init__(("127.0.0.1", 0), Handler)
        self.scheme = "https" if tls_context else "http"
        self.tls_context = tls_context
        self.is_proxy = is_proxy
        self.script = ["Hello", " there."]
        self.ending = [chunk({}, "stop"), DONE]
        self.refuse = lambda request: None
        self.requests, self.headers, self.paths = [], [], []
        self.connection_count = 0
        self.hang_ups = threading.Semaphore(0)

    @property
    def url(self):
        return f"{self.scheme}://localhost:{self.server_port}/v1"

    def settings(self, **overrides):
        """Return the settings that make a bot ask this server."""
        return {"BOT_MODEL": "tiny", "OPENAI_BASE_URL": self.url, "OPENAI_API_KEY": "sk-secret", **overrides}

    def wait_for_hang_up(self):
        """Return whether a client closed its connection before the end of a response; each one counts once."""
        return self.hang_ups.acquire(timeout=TIMEOUT)

    def finish_request(self, request, client_address):
        if self.tls_context and not self.is_proxy:
            request.settimeout(TIMEOUT)
            with self.tls_context.wrap_socket(request, server_side=True) as tls_request:
                super().finish_request(tls_request, client_address)
        else:
            super().finish_request(request, client_address)

    def handle_error(self, request, client_address):
        """Ignore that a client closed its connection."""


@contextmanager
def running(server):
    """Serve while the block is executed; yield the server."""
    with server, run_in_background(lambda: server.serve_forever(0.01)):
        try:
            yield server
        finally:
            server.shutdown()


class ConnectionCut(Exception):
    """The connection is to be closed."""


def stall(handler):
    """Send nothing until the client closes the connection."""
    select.select([handler.connection], [], [], TIMEOUT)
    raise ConnectionError


def cut(handler):
    """Close the connection between two events."""
    raise ConnectionCut


def cut_in_event(handler):
    """Close the connection within an event."""
    handler.wfile.write(b'ff\r\ndata: {"choices": [{"del')
    raise ConnectionCut


def end(handler):
    """End the response properly, without the ending of the reply."""
    handler.write(b"")
    raise ConnectionCut


def drip(data, interval=0.02):
    """Return a step that sends some data byte by byte, again and again, until the client closes the connection."""

    def step(handler):
        while True:
            for byte in data:
                handler.wfile.write(bytes([byte]))
                if select.select([handler.connection], [], [], interval)[0]:
                    raise ConnectionError

    return step


def write_raw(data):
    """Return a step that sends some bytes as they are, in place of a head or a chunk."""
    return lambda handler: handler.wfile.write(data)


def event(value):
    """Return a server-sent event."""
    return f"data: {json.dumps(value)}\n\n".encode()


def choice(**fields):
    """Return the event for a choice with these fields alone."""
    return event({"choices": [fields]})


def chunk(delta, finish_reason=None):
    """Return the event for a chunk of the reply."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return event({"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "tiny", "choices": [choice]})


DONE = b"data: [DONE]\n\n"
EMPTY_CHUNK = chunk({"content": ""})
COMMENTS = drip(b"3\r\n:\n\n\r\n")
SILENCES = {
    "before the head": [stall],
    "dripping head": [drip(b"HTTP/1.1 200 OK\r\n" + b"X: " + b"x" * 10_000)],
    "after the head": [b": comment\n\n", stall],
    "after text": ["Hello", stall],
    "after thinking": ["<think>Hm", stall],
    "comments": ["Hello", COMMENTS],
    "empty chunks": ["Hello", drip(b"%x\r\n%b\r\n" % (len(EMPTY_CHUNK), EMPTY_CHUNK), 0.001)],
    "dripping line": ["Hello", drip(b"1\r\nx\r\n")],
    "dripping chunk size": ["Hello", drip(b"0")],
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = TIMEOUT

    def setup(self):
        super().setup()
        self.server.connection_count += 1

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        self.server.headers.append(self.headers)
        self.server.paths.append(self.path)
        self.is_head_sent = False
        try:
            if refusal := self.server.refuse(request):
                self.respond(*refusal)
            else:
                for step in [*self.server.script, *self.server.ending, b""]:
                    step(self) if callable(step) else self.write(step)
        except ConnectionCut:
            self.close_connection = True
        except ConnectionError:
            self.close_connection = True
            self.server.hang_ups.release()

    def do_CONNECT(self):
        self.server.headers.append(self.headers)
        self.server.paths.append(self.path)
        self.send_response(200)
        self.end_headers()
        self.connection = self.server.tls_context.wrap_socket(self.connection, server_side=True)
        self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb", buffering=0)
        self.close_connection = False

    def finish(self):
        super().finish()
        if self.server.is_proxy:
            self.connection.close()

    def write(self, step):
        """Write a chunk's text or events as one HTTP chunk; no events are the end of the response."""
        events = chunk({"content": step}) if isinstance(step, str) else step
        if not self.is_head_sent:
            self.is_head_sent = True
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
        self.wfile.write(b"%x\r\n%b\r\n" % (len(events), events))

    def respond(self, status, body=b"", headers=()):
        """Send a whole response; a body that is not bytes is sent as JSON."""
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **dict(headers)}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass
