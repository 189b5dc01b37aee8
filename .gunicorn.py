"""How gunicorn serves, beyond the settings of config.py: time limits, header limits, JSON errors, a graceful end.

The master process imports the application, whose memory its workers share.
"""

import errno
import fcntl
import gc
import json
import os
import ssl
import sys
import termios
import time
from contextlib import nullcontext, suppress
from functools import partial
from http import HTTPStatus
from pathlib import Path

import gevent
from flask.logging import default_handler
from gevent.lock import Semaphore
from gevent.server import StreamServer
from gevent.socket import wait_write
from gunicorn import glogging
from gunicorn import sock as gunicorn_sock
from gunicorn.http import errors
from gunicorn.util import close_graceful
from gunicorn.workers.ggevent import GeventWorker

from app.hooks import TIME_FORMAT, JsonFormatter
from app.schema import upgrade_schema

# Seconds. The first three are totals: a client that sends a byte now and then gains nothing.
TLS_HANDSHAKE_TIMEOUT = 10
REQUEST_HEAD_TIMEOUT = 10
REQUEST_BODY_TIMEOUT = 60
SEND_TIMEOUT = 30  # without progress, so that a slow reader is served however long it takes
SEND_CHECK_INTERVAL = 5

MAX_HEAD_SIZE = 16 * 1024  # bytes of all header fields, as in Node.js; to parse Accept or Cookie of that takes 15 ms
CONNECTIONS_PER_TURN = 2  # that a worker accepts: with 1, new ones wait longer; with 10, one worker gets all of a few
EVENT_LOOP_TURN = 1e-6  # seconds: the event loop looks for new data and connections in between

wsgi_app = "run:app"
chdir = str(Path(__file__).parent)
preload_app = True  # the workers share the application's memory, and start at once
keepalive = 5  # seconds until the next request
graceful_timeout = 12  # seconds from SIGTERM until the master kills its workers
REPLY_MARGIN = 4  # seconds before that at which the replies still in progress are ended and stored
CONNECTION_MARGIN = 3  # seconds before that at which the connections still open are closed
control_socket_disable = True  # nothing here uses it, and it would be one more way in
sendfile = False  # os.sendfile would bypass SEND_TIMEOUT

limit_request_line = 8190
limit_request_fields = 64
limit_request_field_size = 8190

# Gunicorn believes a proxy on the loopback interface or a Unix socket by default; TRUSTED_PROXIES alone decides that.
forwarder_headers = ""
secure_scheme_headers = {}

ERROR_MESSAGES = {
    HTTPStatus.BAD_REQUEST: "Malformed HTTP request",
    HTTPStatus.NOT_FOUND: "Not found",
    HTTPStatus.REQUEST_TIMEOUT: f"The request headers must arrive within {REQUEST_HEAD_TIMEOUT} seconds",
    HTTPStatus.REQUEST_URI_TOO_LONG: f"The request line must be at most {limit_request_line} bytes",
    HTTPStatus.EXPECTATION_FAILED: "The Expect header must be 100-continue",
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: (
        f"The request headers must be at most {limit_request_fields} fields of {limit_request_field_size} bytes, "
        f"{MAX_HEAD_SIZE} bytes in all"
    ),
    HTTPStatus.INTERNAL_SERVER_ERROR: "Internal server error",
}
ERROR_HEADERS = """\
Connection: close\r
Content-Type: application/json\r
Cache-Control: no-store\r
Content-Security-Policy: default-src 'none'; frame-ancestors 'none'\r
Cross-Origin-Resource-Policy: cross-origin\r
Referrer-Policy: no-referrer\r
X-Content-Type-Options: nosniff\r
"""


class Logger(glogging.Logger):
    """Gunicorn's log, in the format that LOG_FORMAT says."""

    def setup(self, cfg):
        super().setup(cfg)
        if os.environ.get("LOG_FORMAT") == "json":
            for handler in [*self.error_log.handlers, *self.access_log.handlers]:
                handler.setFormatter(JsonFormatter(datefmt=TIME_FORMAT))


class RequestTimeout(errors.ParseException):
    """The head of a request did not arrive in time."""


class ClientConnection:
    """The socket of a client, with deadlines for what it sends and takes.

    After the deadline of a body, or of the wait for another request, the connection reads as if the client had
    closed it.
    """

    def __init__(self, sock):
        self.sock = sock
        self.is_ended = False
        self.start_head(REQUEST_HEAD_TIMEOUT)

    def __getattr__(self, name):
        return getattr(self.sock, name)

    def start_body(self):
        """Set the deadline for the body of the request whose head was read."""
        self.is_reading_head = self.is_idle = False
        self.deadline = time.monotonic() + REQUEST_BODY_TIMEOUT

    def start_head(self, timeout):
        """Set the deadline for the first byte of the next request; the rest of its head has REQUEST_HEAD_TIMEOUT."""
        self.is_reading_head = self.is_idle = True
        self.deadline = time.monotonic() + timeout

    def recv(self, size, flags=0):
        """Receive some bytes, none at the end.

        Raises RequestTimeout after the deadline of a head, and ConnectionResetError if the connection is lost.
        """
        if self.is_ended:
            return b""
        if not self.is_idle:  # the others have their turn: 1 MiB in chunks of a byte takes more than a second
            gevent.sleep(EVENT_LOOP_TURN)
        try:
            data = self.receive_before_deadline(size, flags)
        except TimeoutError:
            self.is_ended = True
            if self.is_reading_head and not self.is_idle:
                raise RequestTimeout from None
            return b""
        if self.is_idle:
            self.is_idle = False
            self.deadline = time.monotonic() + REQUEST_HEAD_TIMEOUT
        return data

    def receive_before_deadline(self, size, flags):
        """Receive some bytes. Raises TimeoutError after the deadline, ConnectionResetError for other errors."""
        remaining = self.deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        self.sock.settimeout(None)  # the socket's own time-out would start again with each byte of a TLS record
        try:
            with gevent.Timeout(remaining, TimeoutError):
                return self.sock.recv(size, flags)
        except TimeoutError:
            raise
        except OSError as error:
            raise connection_lost() from error

    def send(self, data, flags=0):
        """Send some of the data and return how much.

        Raises ConnectionResetError if the connection is lost, or if the client takes nothing for SEND_TIMEOUT.
        """
        self.sock.settimeout(0)
        deadline = time.monotonic() + SEND_TIMEOUT
        try:
            while not (sent := self.send_available(data, flags)) and data:
                if self.wait_for_progress():
                    deadline = time.monotonic() + SEND_TIMEOUT
                elif time.monotonic() > deadline:
                    raise connection_lost()
        except OSError as error:
            raise connection_lost() from error
        return sent

    def send_available(self, data, flags):
        """Send as much as fits into the kernel's buffer now, and return how much."""
        try:
            return self.sock.send(data, flags)
        except BlockingIOError:
            return 0

    def wait_for_progress(self):
        """Wait for room in the kernel's buffer; return whether the client has taken some bytes.

        There may be progress without room: the kernel reports room only when a third of its buffer is free.
        """
        unsent = self.count_unsent_bytes()
        with suppress(TimeoutError):
            wait_write(self.sock.fileno(), SEND_CHECK_INTERVAL)
        return self.count_unsent_bytes() < unsent

    def sendall(self, data, flags=0):
        """Send all of the data. Raises ConnectionResetError as send() does."""
        sent = self.send(data, flags)
        if sent < len(data):
            data = memoryview(data)[sent:]
            while data:
                data = data[self.send(data, flags) :]

    def count_unsent_bytes(self):
        """Return the number of bytes in the kernel's buffer that the client has not acknowledged."""
        return int.from_bytes(fcntl.ioctl(self.sock.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)


def connection_lost():
    """Return an error that gunicorn takes as the client's and does not log."""
    return ConnectionResetError(errno.ECONNRESET, "The connection to the client is lost")


class Worker(GeventWorker):
    """Gunicorn's gevent worker, with time limits for clients, JSON errors, and time for replies to finish."""

    shutdown_deadline = None
    is_quitting = False

    def init_process(self):
        """Divide the grace period between replies and connections, and start."""
        self.reply_grace_timeout = max(0, self.cfg.graceful_timeout - REPLY_MARGIN)
        self.cfg.set("graceful_timeout", max(0, self.cfg.graceful_timeout - CONNECTION_MARGIN))
        self.pipelining = Semaphore()
        super().init_process()

    def server_class(self, listener, spawn, ssl_context=None, **options):
        """Return the server of a listening socket. With several workers, gunicorn's accepts one connection a turn."""
        ssl_args = {"ssl_context": ssl_context} if ssl_context else {}
        server = StreamServer(listener, partial(self.handle, listener), spawn=spawn, **ssl_args)
        server.max_accept = CONNECTIONS_PER_TURN
        return server

    def timeout_ctx(self):
        """Leave the time limits to ClientConnection: this one includes the head of the next request."""
        return nullcontext()

    def handle(self, listener, client, addr):
        """Serve a connection."""
        super().handle(listener, ClientConnection(client), addr)

    def handle_request(self, listener_name, req, sock, addr):
        """Serve a request, and note when it was the last one."""
        # The event loop has a turn even if no read waits: for data of others, and for new connections. After
        # gevent.sleep(0) alone, this connection would come before those.
        if sock.is_idle:  # this request came together with the one before; of all clients that do so, one has a turn
            gevent.sleep(0)  # the next of them comes first
            with self.pipelining:
                gevent.sleep(EVENT_LOOP_TURN)
        else:
            gevent.sleep(EVENT_LOOP_TURN)
        sock.start_body()
        try:
            return super().handle_request(listener_name, req, sock, addr)
        finally:
            sock.start_head(self.cfg.keepalive)
            if not self.alive:
                self.start_shutdown()

    def handle_error(self, req, client, addr, exc):
        """Answer a request that the application never saw, or could not answer, with a JSON error.

        The log quotes nothing of a malformed request, which may hold a password.
        """
        if isinstance(exc, gevent.GreenletExit | ssl.SSLError):
            return
        status = get_error_status(exc)
        if status == HTTPStatus.INTERNAL_SERVER_ERROR:
            self.log.error("Error handling request", exc_info=exc)
        elif status != HTTPStatus.REQUEST_TIMEOUT:
            self.log.warning("Invalid request from %s: %s", addr[0] if addr else "-", type(exc).__name__)
        with suppress(OSError):
            client.sendall(format_error_response(status))
            close_graceful(client.sock)  # an ordinary close() would reset a connection with unread data

    def handle_exit(self, sig, frame):
        """Handle SIGTERM."""
        super().handle_exit(sig, frame)
        self.start_shutdown()

    def handle_quit(self, sig, frame):
        """Handle SIGINT and SIGQUIT. Ctrl-C sends both, and the second must not interrupt the end of the first."""
        if not self.is_quitting:
            self.is_quitting = True
            super().handle_quit(sig, frame)

    def start_shutdown(self):
        """Start the grace period of the replies in progress. When it is over, their followers read how they ended."""
        if self.shutdown_deadline is None:
            self.shutdown_deadline = time.monotonic() + self.reply_grace_timeout
            gevent.spawn_later(self.reply_grace_timeout, self.shut_down_replies, 0)

    def shut_down_replies(self, timeout):
        """Wait at most `timeout` seconds for the replies in progress, then store the others as they are."""
        self.wsgi.extensions["replies"].shutdown(timeout)

    def run(self):
        """Serve until the worker is told to end, then wait for the replies in progress, which need no connection.

        SIGINT and SIGQUIT raise SystemExit here.
        """
        try:
            super().run()
            self.start_shutdown()
            self.shut_down_replies(max(0, self.shutdown_deadline - time.monotonic()))
        finally:
            self.shut_down_replies(0)


def get_error_status(error):
    """Return the status of an exception of gunicorn's or the application's."""
    match error:
        case errors.InvalidResponseHeader() | errors.InvalidResponseHeaderName():
            return HTTPStatus.INTERNAL_SERVER_ERROR
        case RequestTimeout():
            return HTTPStatus.REQUEST_TIMEOUT
        case errors.LimitRequestLine():
            return HTTPStatus.REQUEST_URI_TOO_LONG
        case errors.LimitRequestHeaders():
            return HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        case errors.ExpectationFailed():
            return HTTPStatus.EXPECTATION_FAILED
        case errors.ConfigurationProblem():  # a path outside the prefix that SCRIPT_NAME in the environment names
            return HTTPStatus.NOT_FOUND
        case errors.ParseException():
            return HTTPStatus.BAD_REQUEST
        case _:
            return HTTPStatus.INTERNAL_SERVER_ERROR


def format_error_response(status):
    """Return a response as bytes."""
    body = json.dumps({"error": ERROR_MESSAGES[status]})
    head = f"HTTP/1.1 {status.value} {status.phrase}\r\n{ERROR_HEADERS}Content-Length: {len(body)}\r\n\r\n"
    return (head + body).encode()


logger_class = Logger
worker_class = Worker


def on_starting(server):
    """Migrate the database before any worker starts, if the certificate can be used."""
    check_certificate(server.cfg)
    upgrade_schema(server.app.wsgi())


def pre_fork(server, worker):
    """Leave what is imported out of garbage collections: they would copy that memory, which the workers share."""
    gc.freeze()


def check_certificate(cfg):
    """Exit with one line if gunicorn is to serve HTTPS and cannot: it would find that out in each worker."""
    try:
        if cfg.is_ssl:
            gunicorn_sock.ssl_context(cfg)
    except (OSError, TypeError) as error:
        sys.exit(f"Error: --certfile {cfg.certfile} with --keyfile {cfg.keyfile} cannot be used: {error}")


def post_worker_init(worker):
    """Let the log write to stderr directly: to find the stream of each request takes longer than to write to it."""
    if worker.cfg.errorlog == "-":
        default_handler.setStream(sys.stderr)


def pre_request(worker, req):
    """Bound the header fields together: gunicorn bounds each of them and their number."""
    if sum(len(name) + len(value) for name, value in req.headers) > MAX_HEAD_SIZE:
        raise errors.LimitRequestHeaders("limit request headers size")


def ssl_context(config, default_ssl_context_factory):
    """Return a TLS context whose handshakes have a deadline."""
    context = default_ssl_context_factory()
    context.wrap_socket = partial(wrap_socket, context.wrap_socket)
    return context


def wrap_socket(context_wrap_socket, client, **options):
    """Return the TLS socket of a client. If the handshake fails or takes too long, end the connection's greenlet."""
    try:
        with gevent.Timeout(TLS_HANDSHAKE_TIMEOUT, TimeoutError):
            return context_wrap_socket(client, **options)
    except OSError:
        raise gevent.GreenletExit from None  # the one exception that gevent does not report with a traceback
