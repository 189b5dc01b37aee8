"""What SQLite and PostgreSQL say differently, said once, so that nothing else in the program asks which it is."""

from datetime import UTC, datetime

from sqlalchemy import BigInteger, DateTime, Integer, MetaData, Text, event, text
from sqlalchemy.dialects import sqlite
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, registry
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator

MAX_ID = 2**63 - 1


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
    """`json_object("a", x, "b", y)` is the text of {"a": x, "b": y}, built by the database."""

    type = Text()
    inherit_cache = True


@compiles(json_object, "sqlite")
def _(element, compiler, **kw):
    return f"json_object({compiler.process(element.clauses, **kw)})"


@compiles(json_object, "postgresql")
def _(element, compiler, **kw):
    return f"CAST(json_build_object({compiler.process(element.clauses, **kw)}) AS TEXT)"


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
    """Return how to connect to a database of that URL."""
    if url.startswith("sqlite"):
        # Transactions that write take the lock as they begin; for as many seconds they wait for it.
        return {"connect_args": {"isolation_level": "IMMEDIATE", "timeout": 10}}
    return {
        "connect_args": {"connect_timeout": 5},  # seconds, like the next
        "pool_timeout": 10,
        "pool_pre_ping": True,
    }


def prepare(engine):
    """Make every connection of a SQLite engine durable, strict about foreign keys and able to lock."""
    if engine.dialect.name != "sqlite":
        return

    @event.listens_for(engine, "connect")
    def set_pragmas(connection, record):
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")
        connection.create_function("lower", 1, str.lower, deterministic=True)  # its own knows only ASCII

    @event.listens_for(engine, "handle_error")
    def forget_read_only(context):
        # A connection to a file that was read-only stays read-only: the pool must make new ones.
        if "readonly" in str(context.original_exception):
            context.is_disconnect = True

    @event.listens_for(engine, "before_cursor_execute")
    def lock_for_update(connection, cursor, statement, parameters, context, executemany):
        # SQLite has no SELECT ... FOR UPDATE, and its driver begins no transaction for a SELECT.
        select = context.compiled and context.compiled.statement
        if getattr(select, "_for_update_arg", None) is not None and not cursor.connection.in_transaction:
            cursor.execute("BEGIN IMMEDIATE")


def lacks_schema(error):
    """Tell whether a database error comes of tables or columns that are not there."""
    if getattr(error.orig, "sqlstate", None) in ("42P01", "42703"):  # PostgreSQL's undefined_table, undefined_column
        return True
    return str(error.orig).startswith(("no such table", "no such column"))
