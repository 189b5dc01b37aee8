"""Column types, SQL functions and connection setup for SQLite and PostgreSQL."""

import sqlite3
import time
import traceback
import unicodedata
from contextlib import suppress
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from flask import has_request_context, request
from flask_sqlalchemy.session import Session as FlaskSession
from sqlalchemy import BigInteger, Boolean, DateTime, Integer, MetaData, Text, event, func, literal_column, text
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, registry
from sqlalchemy.sql.functions import FunctionElement

from config import parse_connect_args

MAX_ID = 2**63 - 1
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
SQLITE_LOCK_TIMEOUT = 10  # seconds to wait while another connection writes
CONNECT_TIMEOUTS = {"connect_timeout": 3, "tcp_user_timeout": 11_000}  # seconds for each address, milliseconds


class SQLiteDateTime(sqlite.DATETIME):
    """A timestamp as text in ISO 8601, which sorts by time. C code converts it, ten times as fast as SQLAlchemy's."""

    def bind_processor(self, dialect):
        return lambda value: value and format_timestamp(value)

    def result_processor(self, dialect, coltype):
        return lambda value: value and datetime.fromisoformat(value)


# A timestamp with microseconds, always aware.
Timestamp = DateTime(timezone=True).with_variant(SQLiteDateTime(), "sqlite")


class Base(DeclarativeBase):
    """The models' base: named constraints, 64-bit integers, timestamps in UTC."""

    # An attribute `type_annotation_map` beside the registry, which SQLAlchemy adds to any base, would be rejected when
    # Flask-SQLAlchemy copies the attributes to a base of its own.
    registry = registry(
        metadata=MetaData(
            naming_convention={
                "ix": "ix_%(table_name)s_%(column_0_N_name)s",
                "uq": "uq_%(table_name)s_%(column_0_N_name)s",
                "ck": "ck_%(table_name)s_%(constraint_name)s",
                "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
                "pk": "pk_%(table_name)s",
            }
        ),
        # SQLite generates 64-bit keys only for a column declared INTEGER.
        type_annotation_map={int: BigInteger().with_variant(Integer, "sqlite"), datetime: Timestamp},
    )


class Session(FlaskSession):
    """A session that reads in autocommit mode during a safe request, and uses a transaction otherwise."""

    def get_bind(self, *args, bind=None, **kwargs):
        engine = super().get_bind(*args, bind=bind, **kwargs)
        is_safe = has_request_context() and request.method in SAFE_METHODS
        return autocommit(engine) if is_safe and bind is None else engine


@lru_cache(maxsize=8)  # a session uses one connection for each engine object
def autocommit(engine):
    """Return the engine in autocommit mode, to read: PostgreSQL then needs no BEGIN and ROLLBACK, SQLite no lock.

    Do not write with it: PostgreSQL would commit each statement by itself, but SQLite would roll back what is not
    committed, because its driver begins a transaction for a write. It begins none for a SELECT, and its own AUTOCOMMIT
    level would take a tenth of a request to set and reset.
    """
    if engine.dialect.name == "sqlite":
        return engine.execution_options(begin_immediate=False)
    return engine.execution_options(isolation_level="AUTOCOMMIT")


class json_object(FunctionElement):
    """`json_object(a=x, b=y)` is the text of the JSON object {"a": x, "b": y}, built by the database.

    This is for long lists: a thousand messages take a twentieth of the time that a thousand model objects take.
    """

    type = Text()
    inherit_cache = True

    def __init__(self, **items):
        self.names = tuple(items)
        super().__init__(*(part for name, value in items.items() for part in (literal_column(f"'{name}'"), value)))


@compiles(json_object, "sqlite")
def compile_json_object_for_sqlite(element, compiler, **kw):
    return f"json_object({compiler.process(element.clauses, **kw)})"


@compiles(json_object, "postgresql")
def compile_json_object_for_postgresql(element, compiler, **kw):
    # json_build_object() would take a fifth longer.
    template = ",".join(f'"{name}":%s' for name in element.names)
    values = [func.coalesce(func.to_json(value), literal_column("'null'")) for value in list(element.clauses)[1::2]]
    return compiler.process(func.format(literal_column(f"'{{{template}}}'"), *values), **kw)


def json_array(column):
    """Return the SQL expression of the text of a JSON array of a column of JSON texts, in the order of the rows."""
    return "[" + func.coalesce(func.aggregate_strings(column, ","), "") + "]"


class Template(FunctionElement):
    """An SQL expression of which each database has its own template: `{0}` stands for the first argument.

    SQLAlchemy wants `inherit_cache` in each subclass.
    """


@compiles(Template)
def compile_template(element, compiler, **kw):
    template = getattr(element, compiler.dialect.name)
    return template.format(*(compiler.process(clause, **kw) for clause in element.clauses))


class iso8601(Template):
    """`iso8601(column)` is the text of a timestamp as the API shows it, such as 2026-01-31T12:00:00.000000Z."""

    type = Text()
    inherit_cache = True
    sqlite = "{0}"
    postgresql = """to_char({0} AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')"""


class database_now(Template):
    """`database_now(seconds)` is the time so many seconds from now by the database's clock, which all servers share."""

    type = Timestamp
    inherit_cache = True
    sqlite = "strftime('%Y-%m-%dT%H:%M:%f000Z', 'now', {0} || ' seconds')"
    postgresql = "clock_timestamp() + make_interval(secs => {0})"

    def __init__(self, seconds=0):
        super().__init__(literal_column(str(seconds)))


class contains(Template):
    """`contains(column, fold_case(text))` is true if a column has a text, in any case. It takes linear time."""

    type = Boolean()
    inherit_cache = True
    sqlite = "(instr(fold_case({0}), {1}) > 0)"
    postgresql = """(strpos(translate(lower(upper(normalize({0}, NFC) COLLATE "und-x-icu")), 'ς', 'σ'), {1}) > 0)"""


class json_each(Template):
    """`json_each(text).table_valued("key", "value")` is a table of the names and texts of a JSON object."""

    inherit_cache = True
    sqlite = "json_each({0})"
    postgresql = "json_each_text(CAST({0} AS json))"


def fold_case(value):
    """Return a text as searches compare it, in NFC and without differences of case: what contains() does in SQL."""
    if value.isascii():
        return value.lower()
    return unicodedata.normalize("NFC", value).upper().lower().replace("ς", "σ")


def format_timestamp(timestamp):
    """Return an aware datetime as iso8601() does."""
    return timestamp.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def partial_index(condition):
    """Return the arguments that make an Index cover only the rows of a condition."""
    return {"sqlite_where": text(condition), "postgresql_where": text(condition)}


def engine_options(url):
    """Return what Flask-SQLAlchemy is to be told for a DATABASE_URL; times are in seconds."""
    if url.startswith("sqlite"):
        # begin_immediate() waits for the lock instead of SQLite. A request that waits must not use up the pool.
        options = {"connect_args": {"timeout": 0}, "max_overflow": -1, "hide_parameters": True}
        return {"SQLALCHEMY_DATABASE_URI": url, "SQLALCHEMY_ENGINE_OPTIONS": options}
    options = {
        "connect_args": CONNECT_TIMEOUTS | parse_connect_args(url),
        "isolation_level": "READ COMMITTED",  # whatever the server's or the role's default is
        "pool_size": 15,
        "max_overflow": 0,  # overflow connections are closed after each use: to open one takes as long as a request
        "pool_timeout": 8,
        "pool_pre_ping": True,
        "hide_parameters": True,
    }
    return {"SQLALCHEMY_DATABASE_URI": "postgresql+psycopg://", "SQLALCHEMY_ENGINE_OPTIONS": options}


def configure_engine(engine):
    """Set up each connection of an engine, and let transactions on SQLite take the write lock as they begin."""
    if engine.dialect.name == "sqlite":
        event.listen(engine, "do_connect", create_private_file)
        event.listen(engine, "connect", configure_sqlite)
        event.listen(engine, "begin", begin_immediate)
    else:
        from app.postgresql import connect

        event.listen(engine, "do_connect", connect)


def create_private_file(dialect, record, args, kwargs):
    """Create the file of a SQLite database for this user only, before SQLite creates it for whom the umask allows."""
    with suppress(OSError):
        Path(args[0]).touch(0o600)


def configure_sqlite(connection, record):
    """Make a connection to SQLite durable and strict about foreign keys."""
    retry_while_locked(lambda: connection.execute("PRAGMA journal_mode=WAL"), sqlite3.OperationalError)
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")
    connection.create_function("fold_case", 1, fold_case, deterministic=True)


def begin_immediate(connection):
    """Begin a transaction on SQLite with the write lock, so that it cannot fail halfway because of another one."""
    if connection.get_execution_options().get("begin_immediate", True):
        retry_while_locked(lambda: connection.exec_driver_sql("BEGIN IMMEDIATE"), OperationalError)


def retry_while_locked(func, exception):
    """Call a function again while SQLite is locked, for SQLITE_LOCK_TIMEOUT; return its result.

    SQLite's own waiting would stop all greenlets of a worker; this sleep lets them go on.
    """
    deadline = time.monotonic() + SQLITE_LOCK_TIMEOUT
    delay = 0.001
    while True:
        try:
            return func()
        except exception as error:
            code = getattr(getattr(error, "orig", error), "sqlite_errorcode", 0)
            if code & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(delay)
        delay = min(delay * 2, 0.02)


def is_missing_table(error):
    """Return whether a DBAPIError says that a table or a column is missing."""
    if getattr(error.orig, "sqlstate", None) in ("42P01", "42703"):  # undefined_table, undefined_column
        return True
    return str(error.orig).startswith(("no such table", "no such column"))


def format_traceback(error):
    """Return the kind of a database error and where it was raised, for the log: its text may quote a message."""
    kind = type(getattr(error, "orig", None) or error).__name__
    return f"{kind}\nTraceback (most recent call last):\n{''.join(traceback.format_tb(error.__traceback__))}".rstrip()
