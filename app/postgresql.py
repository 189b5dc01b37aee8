"""Connections to PostgreSQL. SQLite does not import this: the driver takes 0.1 s."""

import psycopg
from psycopg.pq import TransactionStatus

ANSWER_TIMEOUT = 11  # seconds to wait for an answer: more than the server's own limit for a statement
SETTINGS = "SET client_encoding TO 'UTF8'; SET DateStyle TO 'ISO'; SET TimeZone TO 'UTC'"
TIME_LIMITS = "SET statement_timeout TO '10s'; SET idle_in_transaction_session_timeout TO '60s'"


class Connection(psycopg.Connection):
    """A connection that is closed if the server does not answer in time: it may be stopped, or the network silent."""

    timeout = ANSWER_TIMEOUT  # None: no limit

    def wait(self, gen, **kwargs):
        """Return the result of a generator of psycopg's. Raises OperationalError if the server does not answer."""
        try:
            return super().wait(gen, **{"timeout": self.timeout, **kwargs})
        except psycopg.OperationalError:
            if self.info.transaction_status == TransactionStatus.ACTIVE:  # the statement has not ended
                self.close()
            raise


def connect(dialect, record, args, kwargs):
    """Return a new connection with UTF8, ISO dates, UTC and time limits, whatever the server's or the role's defaults.

    A pooler such as PgBouncer in transaction mode keeps the first three for each client, but would share the limits.
    Raises NotSupportedError if the database cannot hold every character.
    """
    connection = Connection.connect(*args, **kwargs, autocommit=True)
    encoding = connection.info.parameter_status("server_encoding")
    if encoding != "UTF8":
        connection.close()
        raise psycopg.NotSupportedError(f"its encoding must be UTF8, not {encoding}")
    connection.execute(SETTINGS)
    if connection.prepare_threshold is not None:
        connection.execute(TIME_LIMITS)
    connection.autocommit = False
    return connection
