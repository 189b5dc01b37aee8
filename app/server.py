"""The production server: gunicorn, as a custom application, with gevent workers."""

import gc
import re
import socket
import sys
from functools import partial

import gevent
from gunicorn import glogging
from gunicorn.app.base import Application
from gunicorn.sock import ssl_context
from gunicorn.workers.base_async import AsyncWorker
from gunicorn.workers.ggevent import GeventWorker

from app.hooks import create_formatter
from app.schema import close_database, upgrade_schema
from config import secure_cookies

CLIENT_TIMEOUT = 30  # seconds in which a client sends or takes something
SEND_BUFFER = 2**18  # bytes: the kernel lets go on when a third is sent, which takes a slow client less than that
CONNECTION_MARGIN = 3  # seconds before the master kills a worker at which it closes the connections still open
REPLY_TIMEOUT = 8  # seconds that replies in progress have after SIGTERM
EVENT_LOOP_TURN = 1e-6  # seconds; without that pause, the mean latency of eight clients rises from 5 to 50 ms


class Logger(glogging.Logger):
    """Gunicorn's log in the format of LOG_FORMAT."""

    log_format = "text"

    def setup(self, cfg):
        super().setup(cfg)
        if self.log_format == "json":
            for handler in [*self.error_log.handlers, *self.access_log.handlers]:
                handler.setFormatter(create_formatter("json"))

    def warning(self, msg, *args, **kwargs):
        """Log a warning; of a malformed request only the kind of error, as the rest may be a password."""
        kind = type(sys.exc_info()[1]).__name__
        super().warning(re.sub(r"(?s)(Invalid request from ip=\S*): .*", rf"\1: {kind}", msg), *args, **kwargs)

    def exception(self, msg, *args, **kwargs):
        """Log an exception; a client that is too slow is no error of the server's."""
        if isinstance(sys.exc_info()[1], TimeoutError):
            self.info("A client sent or took nothing for %d seconds", CLIENT_TIMEOUT)
        else:
            super().exception(msg, *args, **kwargs)


class Worker(GeventWorker):
    """Gunicorn's gevent worker, with a time-out for clients, and time for replies to finish."""

    is_quitting = False

    def handle(self, listener, client, addr):
        """Serve a connection, as GeventWorker does, which would set no time-out."""
        client.settimeout(CLIENT_TIMEOUT)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        AsyncWorker.handle(self, listener, client, addr)

    def handle_request(self, listener_name, req, sock, addr):
        """Serve a request after a turn of the event loop, in which others have theirs."""
        gevent.sleep(EVENT_LOOP_TURN)
        super().handle_request(listener_name, req, sock, addr)

    def handle_exit(self, sig, frame):
        """Handle SIGTERM: end the replies while the connections are open, so that followers get the last event."""
        super().handle_exit(sig, frame)
        gevent.spawn(self.wsgi.extensions["replies"].shutdown, REPLY_TIMEOUT)

    def handle_quit(self, sig, frame):
        """Handle SIGINT and SIGQUIT. Ctrl-C sends both, and the second must not interrupt the end of the first."""
        if not self.is_quitting:
            self.is_quitting = True
            super().handle_quit(sig, frame)

    def run(self):
        """Serve until the worker is told to end (SIGINT and SIGQUIT raise SystemExit), then wait for the replies."""
        gevent.get_hub().NOT_ERROR += (OSError,)  # a connection that ends before its handshake has no traceback
        self.cfg.set("graceful_timeout", max(0, self.cfg.graceful_timeout - CONNECTION_MARGIN))
        replies = self.wsgi.extensions["replies"]
        try:
            super().run()
            replies.shutdown(REPLY_TIMEOUT)
        finally:
            replies.shutdown(0)


class Server(Application):
    """Gunicorn with the settings of an application. The command line and GUNICORN_CMD_ARGS take precedence."""

    def __init__(self, app):
        self.app = app
        super().__init__()
        if self.cfg.is_ssl:
            secure_cookies(app.config)

    def init(self, parser, opts, args):
        """Return gunicorn's settings; the application is this one, so that the command line has options only."""
        if args:
            parser.error(f"unrecognized arguments: {' '.join(args)}")
        config = self.app.config
        host = f"[{config['HOST']}]" if ":" in config["HOST"] else config["HOST"]
        Logger.log_format = config["LOG_FORMAT"]
        return {
            "bind": f"{host}:{config['PORT']}",
            "workers": config["WEB_CONCURRENCY"],
            "worker_class": Worker,
            "logger_class": Logger,
            "preload_app": True,  # the workers share the application's memory, and start at once
            "limit_request_fields": 64,
            "keepalive": 5,  # seconds for the head of the next request
            "graceful_timeout": 12,  # seconds from SIGTERM until the master kills its workers
            "control_socket_disable": True,  # nothing here uses it, and it would be one more way in
            "forwarder_headers": "",  # TRUSTED_PROXIES alone decides what is believed
            "secure_scheme_headers": {},
            "ssl_context": create_ssl_context,
            "on_starting": lambda arbiter: prepare(self.app, arbiter.cfg),
            "pre_fork": lambda arbiter, worker: gc.freeze(),  # collections would copy what the workers share
            "on_exit": lambda arbiter: close_database(self.app),
        }

    def load(self):
        """Return the WSGI application."""
        return self.app


def create_ssl_context(cfg, default_factory):
    """Return a TLS context that leaves the handshake to the worker, which has a time-out for it."""
    context = default_factory()
    context.wrap_socket = partial(context.wrap_socket, do_handshake_on_connect=False)
    return context


def prepare(app, cfg):
    """Migrate the database before any worker starts, or exit with one line if a certificate cannot be used."""
    try:
        if cfg.is_ssl:
            ssl_context(cfg)
    except (OSError, TypeError) as error:
        sys.exit(f"Error: --certfile {cfg.certfile} with --keyfile {cfg.keyfile} cannot be used: {error}")
    upgrade_schema(app)
