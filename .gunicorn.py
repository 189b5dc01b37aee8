"""How gunicorn serves, beyond the settings of config.py: time limits, header limits, JSON errors, a graceful end."""

import errno
import fcntl
import json
import os
import ssl
import sys
import termios
import time
from contextlib import nullcontext, suppress
from functools import partial
from http import HTTPStatus

import gevent
from gunicorn.http import errors
from gunicorn.util import close_graceful
from gunicorn.workers.ggevent import GeventWorker

# Seconds. The first four are totals: a client that sends a byte now and then gains nothing.
TLS_HANDSHAKE_TIMEOUT = 10
REQUEST_HEAD_TIMEOUT = 10
REQUEST_BODY_TIMEOUT = 60
REPLY_GRACE_TIMEOUT = 8  # from SIGTERM on, for replies in progress
SEND_TIMEOUT = 30  # without progress, so that a slow reader is served however long it takes
SEND_CHECK_INTERVAL = 5

MAX_HEAD_SIZE = 32 * 1024  # bytes of all header fields, as in nginx

keepalive = 5  # seconds until the next request
graceful_timeout = 12  # seconds from SIGTERM until the master kills its workers
control_socket_disable = True  # nothing here uses it, and it would be one more way in
sendfile = False  # os.sendfile would bypass SEND_TIMEOUT

limit_request_line = 8190
limit_request_fields = 64
limit_request_field_size = 8190

# Gunicorn believes a proxy on the loopback interface or a Unix socket by default; TRUSTED_PROXIES alone decides that.
forwarded_allow_ips = ""
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
Cross-Origin-Resource-Policy: same-origin\r
Referrer-Policy: no-referrer\r
X-Content-Type-Options: nosniff\r
"""


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
        self.start_head()

    def __getattr__(self, name):
        return getattr(self.sock, name)

    def start_body(self):
        """Set the deadline for the body of the request whose head was read."""
        self.is_reading_head = False
        self.deadline = time.monotonic() + REQUEST_BODY_TIMEOUT

    def start_head(self):
        """Set the deadline for the first byte of the next request."""
        self.is_reading_head = self.is_idle = True
        self.deadline = time.monotonic() + keepalive

    def recv(self, size, flags=0):
        """Receive some bytes, none at the end.

        Raises RequestTimeout after the deadline of a head, and ConnectionResetError if the connection is lost.
        """
        if self.is_ended:
            return b""
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
        try:
            with suppress(BlockingIOError):
                if sent := self.sock.send(data, flags):
                    return sent
            return self.send_when_ready(data, flags)
        except OSError as error:
            raise connection_lost() from error

    def send_when_ready(self, data, flags):
        """Wait until there is room in the kernel's buffer, and send some of the data."""
        self.sock.settimeout(SEND_CHECK_INTERVAL)
        unsent, deadline = self.count_unsent_bytes(), time.monotonic() + SEND_TIMEOUT
        while True:
            with suppress(TimeoutError):
                return self.sock.send(data, flags)
            # The kernel reports room only when a third of its buffer is free: a slow reader makes progress before.
            previous, unsent = unsent, self.count_unsent_bytes()
            if unsent < previous:
                deadline = time.monotonic() + SEND_TIMEOUT
            elif time.monotonic() > deadline:
                raise connection_lost()

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

    def timeout_ctx(self):
        """Leave the time limits to ClientConnection: this one includes the head of the next request."""
        return nullcontext()

    def handle(self, listener, client, addr):
        """Serve a connection, after its TLS handshake if it has one."""
        if isinstance(client, ssl.SSLSocket):
            try:
                with gevent.Timeout(TLS_HANDSHAKE_TIMEOUT, TimeoutError):
                    client.do_handshake()
            except OSError as error:
                self.log.debug("TLS handshake failed: %s", type(error).__name__)
                return
        super().handle(listener, ClientConnection(client), addr)

    def handle_request(self, listener_name, req, sock, addr):
        """Serve a request, and note when it was the last one."""
        sock.start_body()
        try:
            return super().handle_request(listener_name, req, sock, addr)
        finally:
            sock.start_head()
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

    def start_shutdown(self):
        """Start the time that replies in progress have to finish."""
        if self.shutdown_deadline is None:
            self.shutdown_deadline = time.monotonic() + REPLY_GRACE_TIMEOUT
            # Clients that follow a reply read its end, and their connections are closed in time.
            gevent.spawn_later(REPLY_GRACE_TIMEOUT, shut_down_replies, 0)

    def run(self):
        """Serve until the worker is told to end, then wait for the replies in progress, which need no connection.

        SIGINT and SIGQUIT raise SystemExit here: then the replies are stored as they are.
        """
        try:
            super().run()
            self.start_shutdown()
            shut_down_replies(max(0, self.shutdown_deadline - time.monotonic()))
        finally:
            shut_down_replies(0)


def shut_down_replies(timeout):
    """Wait at most `timeout` seconds for the replies in progress, then store the rest as they are."""
    from app import replies  # not before gevent has patched the worker

    replies.shutdown(timeout)


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


worker_class = Worker


def pre_request(worker, req):
    """Bound the header fields together: gunicorn bounds each of them and their number."""
    if sum(len(name) + len(value) for name, value in req.headers) > MAX_HEAD_SIZE:
        raise errors.LimitRequestHeaders("limit request headers size")


def ssl_context(config, default_ssl_context_factory):
    """Return a TLS context that leaves the handshake to Worker.handle, where it has a deadline."""
    context = default_ssl_context_factory()
    context.wrap_socket = partial(context.wrap_socket, do_handshake_on_connect=False)
    return context


def post_fork(server, worker):
    """Prepare a new worker."""
    os.umask(0o077)  # the files of the database are for this user alone
    # Connections are closed before the master kills the worker. Replies have ended a second before.
    worker.cfg.set("graceful_timeout", REPLY_GRACE_TIMEOUT + 1)
