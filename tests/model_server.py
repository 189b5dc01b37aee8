"""A server of a model on the loopback interface: POST /v1/chat/completions as OpenAI has it, with every failure."""

import json
import select
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain

from tests.serving import PATIENCE


class ModelServer(ThreadingHTTPServer):
    """Plays its `script` to whoever asks; keeps what it was `asked`, and by which `headers`.

    Each step of the script is a piece of the reply (str), events as they are on the wire (bytes), or a function of
    the handler, such as `stall`; the proper end follows. With another `status` than 200 it refuses.
    """

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.status = ["Hello", " there."], 200
        self.asked, self.headers = [], []
        self.hang_ups = threading.Semaphore(0)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def settings(self, **more):
        """Return the settings that make a bot ask this model."""
        return {"BOT_MODEL": "tiny", "OPENAI_BASE_URL": self.url, "OPENAI_API_KEY": "sk-secret", **more}

    def saw_hang_up(self):
        """Tell, as soon as it happens, that a client went away before the end; each once."""
        return self.hang_ups.acquire(timeout=PATIENCE)


@contextmanager
def running(server):
    """Let a server of socketserver's serve while the block lasts; hand it on."""
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class Cut(Exception):
    """The connection is to be closed."""


def stall(handler):
    """Say nothing more until the client goes away."""
    select.select([handler.connection], [], [], PATIENCE)
    raise ConnectionError


def cut(handler):
    """Close the connection in the midst of the answer."""
    raise Cut


def cut_in_a_chunk(handler):
    """Close the connection in the midst of an event."""
    handler.wfile.write(b'ff\r\ndata: {"choices": [{"del')
    raise Cut


def end(handler):
    """End the answer properly, but not the reply."""
    handler.write(b"")
    raise Cut


def data(value):
    """Return a server-sent event."""
    return f"data: {json.dumps(value)}\n\n".encode()


def chunk(delta, finish_reason=None):
    """Return the event that brings a piece of the reply."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return data({"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "tiny", "choices": [choice]})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    in_stream = False

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        self.server.headers.append(self.headers)
        self.close_connection = True
        try:
            if self.server.status != 200:  # some servers tell the client its own key
                error = {"message": f"Refused.\nYour key: {self.headers['Authorization']}", "type": "refusal"}
                self.answer(self.server.status, {"error": error})
            elif self.path != "/v1/chat/completions":
                self.answer(404, {"error": {"message": "Not found"}})
            elif asked.get("stream"):
                self.stream()
            else:
                message = {"role": "assistant", "content": "".join(self.server.script)}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                self.answer(200, {"id": "1", "object": "chat.completion", "model": "tiny", "choices": [choice]})
        except ConnectionError:
            self.server.hang_ups.release()

    def stream(self):
        with suppress(Cut):
            for step in chain(self.server.script, [chunk({}, "stop"), b"data: [DONE]\n\n", b""]):
                if callable(step):
                    step(self)
                else:
                    self.write(chunk({"content": step}) if isinstance(step, str) else step)

    def write(self, events):
        """Write events as an HTTP chunk of their own, after the head of the answer; none are the end."""
        if not self.in_stream:
            self.in_stream = True
            self.head(200, "text/event-stream", "Transfer-Encoding", "chunked")
        self.wfile.write(b"%x\r\n%b\r\n" % (len(events), events))

    def answer(self, status, body):
        body = json.dumps(body).encode()
        self.head(status, "application/json", "Content-Length", str(len(body)))
        self.wfile.write(body)

    def head(self, status, mimetype, *header):
        self.send_response(status)
        self.send_header("Content-Type", mimetype)
        self.send_header("Connection", "close")
        self.send_header(*header)
        self.end_headers()

    def log_message(self, *args):
        pass
