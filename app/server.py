"""The production server: gunicorn with gevent workers, by its documented custom application."""

import gc
import logging
import re
import socket
import sys

import gevent
from flask.logging import default_handler
from gunicorn import glogging
from gunicorn.app.base import Application
from gunicorn.sock import ssl_context
from gunicorn.workers.ggevent import GeventWorker

from app.database import truncate_wal, upgrade_schema
from app.hooks import TIME_FORMAT, JsonFormatter

SOCKET_TIMEOUT = 30  # seconds in which a client must send or take something
SEND_BUFFER_SIZE = 256 * 1024  # bytes in the kernel: a slow reader must make progress within SOCKET_TIMEOUT
EVENT_LOOP_TURN = 1e-6  # seconds: without it the mean latency of eight clients rises from 5 to 50 ms
GRACE_TIMEOUT = 12  # seconds from SIGTERM until the master kills its workers
CONNECTION_MARGIN = 3  # seconds before that at which a worker closes the connections still open
REPLY_MARGIN = 4  # seconds before that at which the replies still in progress are ended and stored


class Server(Application):
    """Gunicorn serving an application; the command line and GUNICORN_CMD_ARGS take precedence over get_settings()."""

    def __init__(self, app):
        self.app = app
        super().__init__()
        check_certificate(self.cfg)
        if self.cfg.is_ssl and app.config["SESSION_COOKIE_SECURE"] is None:
            app.config["SESSION_COOKIE_SECURE"] = True
            app.config["SESSION_COOKIE_NAME"] = f"__Host-{app.config['SESSION_COOKIE_NAME']}"

    def init(self, parser, opts, args):
        """Return gunicorn's settings; exit if the command line names an application."""
        if args:
            parser.error(f"unrecognized arguments: {' '.join(args)}")
        return get_settings(self.app)

    def load(self):
        """Return the application, which the workers share with the master."""
        return self.app


def get_settings(app):
    """Return gunicorn's settings for an application."""
    host, port = app.config["HOST"], app.config["PORT"]
    return {
        "bind": f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
        "workers": app.config["WEB_CONCURRENCY"],
        "worker_class": Worker,
        "logger_class": JsonLogger if app.config["LOG_FORMAT"] == "json" else Logger,
        "preload_app": True,
        "keepalive": 5,  # seconds in which a request's head must arrive
        "graceful_timeout": GRACE_TIMEOUT,
        "control_socket_disable": True,  # nothing here uses it, and it would be one more way in
        "limit_request_fields": 64,
        # By default, gunicorn believes a proxy on the loopback interface; TRUSTED_PROXIES alone decides that.
        "forwarder_headers": "",
        "secure_scheme_headers": {},
        "on_starting": lambda arbiter: upgrade_schema(app),
        "on_exit": lambda arbiter: truncate_wal(app),
        "pre_fork": freeze_memory,
        "post_worker_init": write_log_directly,
    }


def check_certificate(cfg):
    """Exit with one line if gunicorn is to serve HTTPS and cannot: it would find that out in each worker."""
    try:
        if cfg.is_ssl:
            ssl_context(cfg)
    except (OSError, TypeError) as error:
        sys.exit(f"Error: --certfile {cfg.certfile} with --keyfile {cfg.keyfile} cannot be used: {error}")


def freeze_memory(arbiter, worker):
    """Leave what is imported out of garbage collections: they would copy that memory, which the workers share."""
    gc.freeze()


def write_log_directly(worker):
    """Let the log write to stderr directly: to find the stream of each request takes longer than to write to it."""
    if worker.cfg.errorlog == "-":
        default_handler.setStream(sys.stderr)


class Logger(glogging.Logger):
    """Gunicorn's log, without quotations of malformed requests, which may hold a password."""

    def setup(self, cfg):
        super().setup(cfg)
        self.error_log.filters = [redact_invalid_requests]


class JsonLogger(Logger):
    """Gunicorn's log in JSON."""

    def setup(self, cfg):
        super().setup(cfg)
        for handler in [*self.error_log.handlers, *self.access_log.handlers]:
            handler.setFormatter(JsonFormatter(datefmt=TIME_FORMAT))


def redact_invalid_requests(record):
    """Cut off what gunicorn quotes of a malformed request, and return True."""
    if record.levelno == logging.WARNING:
        record.msg = re.sub(r"^(Invalid request from ip=\S*): .*", r"\1", str(record.msg), flags=re.DOTALL)
    return True


class Worker(GeventWorker):
    """Gunicorn's gevent worker, which drops silent clients, and gives replies in progress time to finish."""

    is_quitting = False

    def handle(self, listener, client, addr):
        """Serve a connection."""
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_SIZE)
        super().handle(listener, client, addr)

    def handle_request(self, listener_name, req, sock, addr):
        """Serve a request; close the connection if the client sends or takes nothing for SOCKET_TIMEOUT."""
        gevent.sleep(EVENT_LOOP_TURN)  # other connections have their turn
        sock.settimeout(SOCKET_TIMEOUT)
        try:
            return super().handle_request(listener_name, req, sock, addr)
        except TimeoutError:
            raise StopIteration from None  # as gunicorn closes a connection

    def handle_quit(self, sig, frame):
        """Handle SIGINT and SIGQUIT. Ctrl-C sends both, and the second must not interrupt the end of the first."""
        if not self.is_quitting:
            self.is_quitting = True
            super().handle_quit(sig, frame)

    def run(self):
        """Serve until the worker is told to end, then wait for the replies in progress; SIGINT ends them at once."""
        reply_timeout = max(0, self.cfg.graceful_timeout - REPLY_MARGIN)
        self.cfg.set("graceful_timeout", max(0, self.cfg.graceful_timeout - CONNECTION_MARGIN))
        gevent.get_hub().NOT_ERROR += (OSError,)  # a failed TLS handshake is the client's fault: no traceback
        try:
            shutdown = gevent.spawn(self.shut_down_replies, reply_timeout)
            super().run()
            shutdown.join()
        finally:
            self.wsgi.extensions["replies"].shutdown(0)

    def shut_down_replies(self, timeout):
        """When the worker is told to end, wait some seconds for the replies, then store the others as they are."""
        while self.alive:
            gevent.sleep(0.2)
        self.wsgi.extensions["replies"].shutdown(timeout)
