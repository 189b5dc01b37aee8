"""Connections to PostgreSQL: what is set on them, and how long they wait for the server."""

from threading import Thread

import psycopg
from psycopg.pq import TransactionStatus
from sqlalchemy import event

CONNECT_TIMEOUT = 6  # seconds for a new connection, unless connect_timeout in DATABASE_URL is longer
MIN_ADDRESS_TIMEOUT = 2  # seconds of these for each address: psycopg raises a shorter time to this
ADDRESSES_PER_HOST = 2  # as a rule: one of IPv6, and one of IPv4
PING_TIMEOUT = 3  # seconds for the ping of a connection from the pool
ANSWER_TIMEOUT = 11  # seconds for a statement: more than the server's own limit, see TIMEOUTS
# What the program relies on. A pooler such as PgBouncer in transaction mode keeps these for each of its clients.
SETTINGS = "SET client_encoding TO 'UTF8'; SET DateStyle TO 'ISO'; SET TimeZone TO 'UTC'"
TIMEOUTS = "SET statement_timeout TO '10s'; SET idle_in_transaction_session_timeout TO '60s'"


class Connection(psycopg.Connection):
    """A connection that is closed if the server does not answer within `timeout` seconds, or None for no limit."""

    timeout = PING_TIMEOUT

    def wait(self, gen, **kwargs):
        """Return the result of a generator of psycopg's. Raises OperationalError if the server does not answer."""
        try:
            return super().wait(gen, **{"timeout": self.timeout, **kwargs})
        except psycopg.OperationalError:
            if self.info.transaction_status == TransactionStatus.ACTIVE:  # the statement has not ended
                self.close()
            raise


def configure_engine(engine):
    """Set up each connection of an engine."""
    event.listen(engine, "do_connect", connect)
    event.listen(engine, "checkout", set_answer_timeout)
    event.listen(engine, "checkin", set_ping_timeout)


def connect(dialect, record, args, kwargs):
    """Return a new connection, see open_connection(). Raises OperationalError if it takes too long."""
    address_count = ADDRESSES_PER_HOST * len(kwargs.get("host", "").split(","))
    kwargs = {"connect_timeout": max(CONNECT_TIMEOUT // address_count, MIN_ADDRESS_TIMEOUT), **kwargs}
    attempt = ConnectionAttempt(args, kwargs)
    attempt.start()
    return attempt.get_connection(max(CONNECT_TIMEOUT, kwargs["connect_timeout"]))


class ConnectionAttempt(Thread):
    """A connection that is opened while others wait: psycopg's connect_timeout counts for each address again."""

    def __init__(self, args, kwargs):
        super().__init__(name="connect", daemon=True)
        self.args, self.kwargs = args, kwargs
        self.connection = self.error = None
        self.is_late = False

    def run(self):
        """Open the connection; close it if nobody waits for it any more."""
        try:
            self.connection = open_connection(*self.args, **self.kwargs)
        except Exception as error:
            self.error = error
        if self.is_late and self.connection:
            self.connection.close()

    def get_connection(self, timeout):
        """Return the connection. Raises the error of the attempt, or OperationalError after `timeout` seconds."""
        self.join(timeout)
        self.is_late = self.is_alive()
        if self.is_late:
            raise psycopg.OperationalError(f"no connection within {timeout} s")
        if self.error:
            raise self.error
        return self.connection


def open_connection(*args, **kwargs):
    """Return a new connection with SETTINGS, whatever the server's or the role's defaults are.

    Raises NotSupportedError if the database cannot hold every character.
    """
    connection = Connection.connect(*args, **kwargs, autocommit=True)
    encoding = connection.info.parameter_status("server_encoding")
    if encoding != "UTF8":
        connection.close()
        raise psycopg.NotSupportedError(f"its encoding must be UTF8, not {encoding}")
    connection.execute(SETTINGS)
    if connection.prepare_threshold is not None:  # else a pooler would share these with its other clients
        connection.execute(TIMEOUTS)
    connection.autocommit = False
    return connection


def set_answer_timeout(connection, record, proxy):
    """Let a statement take its time."""
    connection.timeout = ANSWER_TIMEOUT


def set_ping_timeout(connection, record):
    """Let the next use of a connection, which is SQLAlchemy's ping, find out soon that the server is silent."""
    if connection is not None:
        connection.timeout = PING_TIMEOUT
