"""What SQLite and PostgreSQL say differently, said once, so that nothing else in the program asks which it is."""

import sqlite3
import time
from datetime import UTC, datetime

from sqlalchemy import BigInteger, DateTime, Integer, MetaData, Text, event, func, literal_column, text
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, registry
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator

MAX_ID = 2**63 - 1
BUSY = 10  # seconds to wait while others write to SQLite
IDLE = 1  # seconds after which a pooled connection is tried out before it is used


class UTCDateTime(TypeDecorator):
    """A moment, always aware and in UTC; to the microsecond.

    SQLite has no type for it: there it is the text of the wire format, which sorts as time does.
    """

    impl = DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect):
        if dialect.name != "sqlite":
            return self.impl
        return sqlite.DATETIME(
            storage_format="%(year)04d-%(month)02d-%(day)02dT%(hour)02d:%(minute)02d:%(second)02d.%(microsecond)06dZ",
            regexp=r"(\d+)-(\d+)-(\d+)T(\d+):(\d+):(\d+)\.(\d+)Z",
        )

    def process_bind_param(self, value, dialect):
        return value and value.astimezone(UTC)

    def process_result_value(self, value, dialect):
        if value is None or value.tzinfo:
            return value and value.astimezone(UTC)
        return value.replace(tzinfo=UTC)


class Base(DeclarativeBase):
    """The models' base: named constraints, 64-bit integers, times in UTC."""

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
        # SQLite's own 64-bit key has to be spelled INTEGER.
        type_annotation_map={int: BigInteger().with_variant(Integer, "sqlite"), datetime: UTCDateTime},
    )


class json_object(FunctionElement):
    """`json_object(a=x, b=y)` is the text of {"a": x, "b": y}, built by the database."""

    type = Text()
    inherit_cache = True

    def __init__(self, **pairs):
        super().__init__(*(part for name, value in pairs.items() for part in (literal_column(f"'{name}'"), value)))


@compiles(json_object, "sqlite")
def _(element, compiler, **kw):
    return f"json_object({compiler.process(element.clauses, **kw)})"


@compiles(json_object, "postgresql")
def _(element, compiler, **kw):
    return f"CAST(json_build_object({compiler.process(element.clauses, **kw)}) AS TEXT)"


def json_array(texts):
    """Return the text of the array of a column of JSON texts, in the order of the rows, built by the database."""
    return "[" + func.coalesce(func.aggregate_strings(texts, ","), "") + "]"


class utc_text(FunctionElement):
    """`utc_text(moment)` is the moment in the wire format, such as 2026-01-31T12:00:00.000000Z."""

    type = Text()
    inherit_cache = True


@compiles(utc_text, "sqlite")
def _(element, compiler, **kw):
    return compiler.process(element.clauses, **kw)


@compiles(utc_text, "postgresql")
def _(element, compiler, **kw):
    moment = compiler.process(element.clauses, **kw)
    return f"""to_char({moment} AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')"""


def where(condition):
    """Return what makes an Index partial: it covers the rows of that condition only."""
    return {"sqlite_where": text(condition), "postgresql_where": text(condition)}


def engine_options(url):
    """Return how to connect to a database of that URL; times are in seconds."""
    if url.startswith("sqlite"):
        return {"connect_args": {"isolation_level": "IMMEDIATE", "timeout": BUSY}}
    return {"connect_args": {"connect_timeout": 5, "autocommit": True}, "pool_timeout": 10}


def begin(connection):
    """Begin a transaction that may write, unless one has begun, on a connection of the driver."""
    if hasattr(connection, "in_transaction"):  # sqlite3
        if not connection.in_transaction:
            connection.execute("BEGIN IMMEDIATE")
    elif not connection.info.transaction_status:  # psycopg: IDLE is 0
        connection.execute("BEGIN")


def prepare(engine):
    """Make an engine's connections read without a transaction, lock as they begin to write, and SQLite's durable.

    A statement with the execution option `alone` is the whole of its transaction: it needs no BEGIN. Run it under
    engine.begin() all the same, because sqlite3 begins by itself where it sees an INSERT at the start.
    """

    @event.listens_for(engine, "before_cursor_execute")
    def begin_to_write(connection, cursor, statement, parameters, context, executemany):
        # A SELECT ... FOR UPDATE locks on both: SQLite ignores the words, but not the transaction.
        select = context.compiled and context.compiled.statement
        locks = getattr(select, "_for_update_arg", None) is not None
        writes = locks or context.isinsert or context.isupdate or context.isdelete
        if writes and not context.execution_options.get("alone"):
            begin(cursor.connection)

    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", set_up_sqlite)
        event.listen(engine, "handle_error", forget_read_only)
    else:
        event.listen(engine, "checkin", note_use)
        event.listen(engine, "checkout", make_sure)


def set_up_sqlite(connection, record):
    """Make a connection to SQLite durable, strict about foreign keys, and know the letters that Python knows."""
    began = time.monotonic()
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            break
        except sqlite3.OperationalError as error:  # for this one SQLite does not wait its turn by itself
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() - began > BUSY:
                raise
            time.sleep(0.01)
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")
    connection.create_function("lower", 1, str.lower, deterministic=True)


def forget_read_only(context):
    """Drop the connections to a file that was read-only when they were made: they stay so, new ones need not."""
    if "readonly" in str(context.original_exception):
        context.is_disconnect = True


def note_use(connection, record):
    """Remember when a connection to PostgreSQL was last known to be good."""
    record.info["used"] = time.monotonic()


def make_sure(connection, record, proxy):
    """Try out a connection that has lain idle: the server may be another by now."""
    if time.monotonic() - record.info.get("used", time.monotonic()) > IDLE:
        try:
            connection.execute("SELECT 1")
        except Exception as error:
            raise DisconnectionError from error


def lacks_schema(error):
    """Tell whether a database error comes of tables or columns that are not there."""
    if getattr(error.orig, "sqlstate", None) in ("42P01", "42703"):  # PostgreSQL's undefined_table, undefined_column
        return True
    return str(error.orig).startswith(("no such table", "no such column"))
