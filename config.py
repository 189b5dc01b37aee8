"""All settings: their sources, their defaults and their validation."""

import difflib
import logging
import os
import re
import secrets
import socket
import sys
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from io import StringIO
from ipaddress import IPv6Address
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import click
import orjson
from dotenv import dotenv_values, find_dotenv
from dotenv.parser import parse_stream
from flask.cli import NoAppException, ScriptInfo
from limits import RateLimitItem, parse_many
from sqlalchemy import URL
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError
from werkzeug.security import generate_password_hash

ENV_FILE = Path(__file__).with_name(".env")
LOGGED_WARNINGS = "CHATBOT_LOGGED_WARNINGS"  # an environment variable, so that child processes inherit it
MIN_SECRET_KEY_LENGTH = 32
MUST_BE_SHARED = "must be set, because each process of this server would have its own"
DEFAULT_PORTS = {"http": 80, "https": 443}
HOST_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?")
MULTIPLE_HOSTS = re.compile(r"(postgres(?:ql)?(?:\+psycopg)?://(?:[^@/?]*@)?)([^@/?]+,[^@/?]+)([^?]*)(?:\?(.*))?")
HOST_AND_PORT = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]]+))(?::([0-9]+))?")

logger = logging.getLogger(__name__)


class ConfigError(click.ClickException):
    """A setting is invalid. The message names it; the flask command prints the message as one line."""


def parse_str(value):
    """Return a text."""
    try:
        value.encode()
    except (AttributeError, UnicodeEncodeError):
        raise ValueError("must be text in UTF-8") from None
    return value


def parse_secret_key(value):
    """Return a secret key; without a value, generate one for this process."""
    if not value and "SERVER_SOFTWARE" in os.environ:  # set by gunicorn
        raise ValueError(MUST_BE_SHARED)
    if value and len(parse_str(value)) < MIN_SECRET_KEY_LENGTH:
        raise ValueError(f"must have at least {MIN_SECRET_KEY_LENGTH} characters")
    return value or secrets.token_hex(32)


def parse_api_key(value):
    """Return a text that an HTTP header can carry."""
    if not (parse_str(value).isascii() and value.isprintable()):
        raise ValueError("must consist of printable ASCII characters")
    return value


def parse_host(value):
    """Return an address or a host name of this machine."""
    try:
        socket.getaddrinfo(parse_str(value), None)
    except (OSError, ValueError):
        raise ValueError("must be an address or a host name of this machine") from None
    return value


def parse_int(value, minimum, maximum):
    """Return an integer within bounds."""
    if isinstance(value, str) and re.fullmatch("[0-9]{1,9}", value):
        value = int(value)
    if type(value) is not int or not minimum <= value <= maximum:
        raise ValueError(f"must be a whole number from {minimum} to {maximum}")
    return value


def parse_bool(value):
    """Return True or False; without a value, return False."""
    if value == "":
        return False
    if isinstance(value, bool):
        return value
    if value not in ("true", "True", "TRUE", "false", "False", "FALSE"):
        raise ValueError("must be true or false")
    return value.lower() == "true"


def parse_choice(value, choices):
    """Return one of several texts."""
    if value not in choices:
        raise ValueError(f"must be one of {', '.join(choices)}")
    return value


def parse_datetime(value):
    """Return a time that is not in the future, in UTC; without a value, return the current time."""
    now = datetime.now(UTC)
    try:
        parsed = datetime.fromisoformat(value) if isinstance(value, str) and value else value or now
        if parsed.tzinfo is None:
            raise ValueError
        parsed = parsed.astimezone(UTC)
    except (AttributeError, ValueError, OverflowError):
        raise ValueError("must be a time with an offset, such as 2026-01-31T12:00:00Z") from None
    if parsed > now:
        raise ValueError("must not be in the future")
    return parsed


def parse_list(value, parse_item):
    """Return a list from a list or from a comma-separated text, with each item parsed."""
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, (list, tuple, set, frozenset)) or not all(isinstance(item, str) for item in items):
        raise ValueError("must be a comma-separated list")
    return [parse_item(item.strip()) for item in items if item.strip()]


def parse_origin(value):
    """Return an origin in lower case; a pattern is not one, as it would let other sites act for a user."""
    origin = value.lower()
    try:
        parts = urlsplit(origin)
        host = f"[{IPv6Address(parts.hostname)}]" if "[" in origin else parts.hostname
        port = "" if parts.port in (None, 0, DEFAULT_PORTS.get(parts.scheme)) else f":{parts.port}"
    except ValueError:
        host = port = None
    is_host = host and value.isascii() and "%" not in host and ("[" in host or HOST_NAME.fullmatch(host))
    if not is_host or parts.scheme not in DEFAULT_PORTS or origin != f"{parts.scheme}://{host}{port}":
        raise ValueError(f"must list origins as browsers send them, such as https://chat.example.com, not {value!r}")
    return origin


def parse_trusted_host(value):
    """Return a host name in lower case; a leading dot includes its subdomains."""
    host = value.lower()
    if not host.isascii() or not HOST_NAME.fullmatch(host.removeprefix(".")):
        raise ValueError(f"must list host names without a port, such as chat.example.com, not {value!r}")
    return host


def parse_trusted_hosts(value):
    """Return a list of host names, or None for any host."""
    return parse_list(value, parse_trusted_host) or None


def parse_database_url(value):
    """Return the URL of a SQLite file or a PostgreSQL server in SQLAlchemy's form."""
    text = value.render_as_string(hide_password=False) if isinstance(value, URL) else parse_str(value)
    try:
        url = make_url(move_hosts_to_query(text))
        if url.drivername in ("postgres", "postgresql"):
            url = url.set(drivername="postgresql+psycopg")
        # Each worker process would have an in-memory database of its own, and options can turn a file into one.
        is_file = url.drivername == "sqlite" and url.database not in (None, "", ":memory:") and not url.query
        if not is_file and url.drivername != "postgresql+psycopg":
            raise ValueError
        url.get_dialect()().create_connect_args(url)
    except (ArgumentError, ValueError):
        raise ValueError("must be the URL of a sqlite:/// file or of a postgresql:// server") from None
    if url.query:
        parse_connect_args(url)
    return url.render_as_string(hide_password=False)


def move_hosts_to_query(text):
    """Return the URL of several PostgreSQL servers, as libpq has it, in SQLAlchemy's form; any other as it is."""
    if not (match := MULTIPLE_HOSTS.fullmatch(text)):
        return text
    start, hosts, path, query = match.groups()
    hosts = [HOST_AND_PORT.fullmatch(host) for host in hosts.split(",")]
    if not all(hosts):
        raise ValueError
    params = {"host": ",".join(host[1] or host[2] for host in hosts)}
    if any(host[3] for host in hosts):
        params["port"] = ",".join(host[3] or "" for host in hosts)
    return f"{start}{path or '/'}?{urlencode(params)}{f'&{query}' if query else ''}"


def parse_connect_args(url):
    """Return the driver's options in a database URL, in their types and by name.

    Raises ValueError for one that neither libpq, PostgreSQL's client library, nor psycopg has.
    """
    from psycopg.pq import Conninfo  # 0.1 s that SQLite need not spend

    known_options = {"prepare_threshold", *(option.keyword.decode() for option in Conninfo.get_defaults())}
    connect_args = {}
    for name, value in url.query.items():
        if name not in known_options:
            raise ValueError("must have no options but libpq's and prepare_threshold")
        if name in ("host", "port"):
            continue
        try:
            connect_args[name] = CONNECT_ARGS.get(name, parse_str)(value)
        except ValueError as error:
            raise ValueError(f"option {name} {error}") from None
    return connect_args


def parse_prepare_threshold(value):
    """Return after how many uses psycopg prepares a statement, or None for never, as poolers such as PgBouncer need."""
    return None if value == "none" else parse_int(value, 0, 10**9)


def parse_http_url(value):
    """Return the URL of a web service."""
    try:
        parts = urlsplit(parse_str(value))
        is_valid = parts.scheme in DEFAULT_PORTS and parts.hostname and parts.port != 0
    except ValueError:
        is_valid = False
    if not is_valid or not value.isprintable() or " " in value:
        raise ValueError("must be an http:// or https:// URL")
    return value


def parse_rate_limit(value):
    """Return a limit such as `10 per minute`."""
    try:
        (limit,) = (value,) if isinstance(value, RateLimitItem) else parse_many(parse_str(value))
        if limit.amount and limit.multiples:
            return limit
    except ValueError:
        pass
    raise ValueError("must be a limit such as 10 per minute")


def parse_rate_limit_storage(value):
    """Return the URL of a storage that the package limits knows: this process's memory or Redis."""
    try:
        if value != "memory://":
            check_redis_url(parse_str(value))
    except (TypeError, ValueError):  # redis raises a TypeError for an unknown option
        raise ValueError("must be memory:// or the URL of a Redis server, such as redis://localhost:6379") from None
    return value


def check_redis_url(value):
    """Raise a TypeError or a ValueError if limits or redis could not use a URL."""
    from redis import ConnectionPool  # 0.1 s that the default need not spend

    parts = urlsplit(value)
    locations = [urlsplit(f"//{location}") for location in parts.netloc.rpartition("@")[2].split(",")]
    if parts.scheme in ("redis", "rediss", "redis+unix"):
        is_valid = parts.path if parts.scheme == "redis+unix" else parts.hostname
        ConnectionPool.from_url(value.replace("redis+unix", "unix", 1)).make_connection()
    elif parts.scheme in ("redis+sentinel", "redis+cluster"):
        is_valid = all(location.hostname and location.port for location in locations)
        is_valid = is_valid and (parts.scheme == "redis+cluster" or parts.path.strip("/"))  # the service's name
    else:
        is_valid = False
    if not is_valid:
        raise ValueError


def parse_password_hash_method(value):
    """Return one of Werkzeug's hash methods, spelled in full."""
    if value == DEFAULT_HASH_METHOD:
        return value  # trying it would take 0.1 s
    try:
        return generate_password_hash("", parse_str(value)).split("$")[0]
    except Exception:  # hashlib raises several types for parameters that it cannot use
        raise ValueError("must be a hash method of Werkzeug's, such as scrypt:32768:8:3") from None


def parse_json_object(value, reserved=()):
    """Return a dict from a JSON object that has none of the reserved keys."""
    try:
        parsed = orjson.loads(value if isinstance(value, str) else orjson.dumps(value))
    except (TypeError, ValueError):
        parsed = None
    if not isinstance(parsed, dict):
        raise ValueError('must be a JSON object, such as {"temperature": 0.2}')
    if keys := sorted(parsed.keys() & reserved):
        raise ValueError(f"must not contain {', '.join(keys)}")
    return parsed


# https://cheatsheetseries.owasp.org/cheatsheets/Password_Storage_Cheat_Sheet.html: N=2^15, r=8, p=3
DEFAULT_HASH_METHOD = "scrypt:32768:8:3"
LOCAL_ORIGINS = ",".join(
    f"http://{host}:{port}" for host in ("localhost", "127.0.0.1") for port in (3000, 3001, 4200, 5173, 5174, 8080)
)
BOT_RESERVED_OPTIONS = {"messages", "model", "stream"}
parse_seconds = partial(parse_int, minimum=0, maximum=2**31 - 1)
parse_switch = partial(parse_choice, choices=("0", "1"))

# The driver's options that are checked here, because libpq checks them only when it connects.
CONNECT_ARGS = {
    "channel_binding": partial(parse_choice, choices=("disable", "prefer", "require")),
    "connect_timeout": parse_seconds,
    "gssencmode": partial(parse_choice, choices=("disable", "prefer", "require")),
    "keepalives": parse_switch,
    "keepalives_count": parse_seconds,
    "keepalives_idle": parse_seconds,
    "keepalives_interval": parse_seconds,
    "load_balance_hosts": partial(parse_choice, choices=("disable", "random")),
    "prepare_threshold": parse_prepare_threshold,
    "sslmode": partial(parse_choice, choices=("disable", "allow", "prefer", "require", "verify-ca", "verify-full")),
    "target_session_attrs": partial(
        parse_choice, choices=("any", "read-write", "read-only", "primary", "standby", "prefer-standby")
    ),
    "tcp_user_timeout": parse_seconds,
}

# name: (default, parser). The names are those of the environment variables; .env.example describes them.
SETTINGS = {
    "SECRET_KEY": ("", parse_secret_key),
    "DATABASE_URL": ("sqlite:///chatbot.db", parse_database_url),
    "DATABASE_WAIT": ("30", partial(parse_int, minimum=0, maximum=3600)),
    "CORS_ORIGINS": (LOCAL_ORIGINS, partial(parse_list, parse_item=parse_origin)),
    "HOST": ("127.0.0.1", parse_host),
    "PORT": ("5000", partial(parse_int, minimum=0, maximum=65535)),
    "WEB_CONCURRENCY": ("2", partial(parse_int, minimum=1, maximum=256)),
    "TRUSTED_PROXIES": ("0", partial(parse_int, minimum=0, maximum=16)),
    "TRUSTED_HOSTS": ("", parse_trusted_hosts),
    "SESSIONS_VALID_FROM": ("", parse_datetime),
    "SESSION_COOKIE_SECURE": ("", parse_bool),
    "SESSION_COOKIE_SAMESITE": ("Lax", partial(parse_choice, choices=("Lax", "Strict", "None"))),
    "PASSWORD_HASH_METHOD": (DEFAULT_HASH_METHOD, parse_password_hash_method),
    "PASSWORD_MIN_LENGTH": ("1", partial(parse_int, minimum=1, maximum=1024)),
    "LOGIN_RATE_LIMIT": ("10 per minute", parse_rate_limit),
    "SIGNUP": ("open", partial(parse_choice, choices=("open", "closed"))),
    "SEND_RATE_LIMIT": ("", lambda value: parse_many(value) if isinstance(value, str) and value else list(value)),
    "SIGNUP_RATE_LIMIT": ("120 per minute", parse_rate_limit),
    "RATE_LIMIT_STORAGE": ("memory://", parse_rate_limit_storage),
    "BOT_MODEL": ("", parse_str),
    "BOT_SYSTEM_PROMPT": ("", parse_str),
    "BOT_HISTORY_CHARS": ("32000", partial(parse_int, minimum=1000, maximum=10_000_000)),
    "BOT_TIMEOUT": ("60", partial(parse_int, minimum=1, maximum=3600)),
    "BOT_MAX_SECONDS": ("600", partial(parse_int, minimum=1, maximum=86400)),
    "BOT_OPTIONS": ("{}", partial(parse_json_object, reserved=BOT_RESERVED_OPTIONS)),
    "MAX_CONCURRENT_REPLIES": ("20", partial(parse_int, minimum=1, maximum=10_000)),
    "OPENAI_BASE_URL": ("https://api.openai.com/v1", parse_http_url),
    "OPENAI_API_KEY": ("", parse_api_key),
    "LOG_FORMAT": ("text", partial(parse_choice, choices=("text", "json"))),
}


class Config:
    """All settings as attributes, for `app.config.from_object`.

    A setting is taken from `overrides`, a dict or an object with upper-case attributes, else from the environment,
    else from the file .env, else it has its default. An empty one counts as unset. Raises ConfigError for the first
    invalid one. Other names in `overrides`, such as TESTING, are Flask's or an extension's.
    """

    CORS_ALLOW_HEADERS = [
        "Accept",
        "Content-Type",
        "Idempotency-Key",
        "If-None-Match",
        "Last-Event-ID",
        "Prefer",
        "X-Request-ID",
    ]
    CORS_ALWAYS_SEND = False  # only in responses to requests with an Origin
    CORS_EXPOSE_HEADERS = [
        "ETag",
        "Idempotent-Replayed",
        "Link",
        "Location",
        "Preference-Applied",
        "Retry-After",
        "X-Request-ID",
    ]
    CORS_INTERCEPT_EXCEPTIONS = False  # the error handlers' responses have the headers anyway
    CORS_MAX_AGE = 600  # seconds
    CORS_SUPPORTS_CREDENTIALS = True
    CORS_VARY_HEADER = False  # app/hooks.py sets Vary for every response
    MAX_CONTENT_LENGTH = 2**20
    PERMANENT_SESSION_LIFETIME = timedelta(days=400)  # browsers keep no cookie longer; the server ends sessions itself
    SESSION_COOKIE_HTTPONLY = True
    SESSION_COOKIE_NAME = "chatbot_session"  # not Flask's default, which other apps on the host use
    SESSION_COOKIE_PATH = "/"
    SESSION_PROTECTION = None  # a new address or browser version ends no session
    SESSION_REFRESH_EACH_REQUEST = False

    def __init__(self, overrides=None):
        try:
            self.set_values(overrides or {})
        except ConfigError as error:
            if is_flask_help():
                raise NoAppException(error.message) from None  # which `flask --help` reports above the help
            raise

    def set_values(self, overrides):
        """Set all attributes."""
        if not isinstance(overrides, Mapping):
            overrides = {name: getattr(overrides, name) for name in dir(overrides) if name.isupper()}
        values = load_values() | dict(overrides)
        for name, (default, parse) in SETTINGS.items():
            value = values.get(name)
            try:
                setattr(self, name, parse(default if value is None or value == "" else value))
            except ValueError as error:
                raise ConfigError(f"{name} {error}") from None
        self.set_derived_values()
        for name in values.keys() - SETTINGS.keys():
            setattr(self, name, values[name])

    def set_derived_values(self):
        """Set what Flask and its extensions derive from the settings."""
        if self.SESSION_COOKIE_SECURE:
            self.SESSION_COOKIE_NAME = f"__Host-{self.SESSION_COOKIE_NAME}"
        elif self.SESSION_COOKIE_SAMESITE == "None":
            raise ConfigError("SESSION_COOKIE_SAMESITE may be None only with SESSION_COOKIE_SECURE=true")
        # Flask-CORS would take the brackets of an IPv6 address for a pattern's.
        literals = [re.compile(re.escape(origin) + r"\Z") for origin in self.CORS_ORIGINS]
        self.CORS_RESOURCES = {"/*": {"origins": literals}}
        url = make_url(self.DATABASE_URL)
        # A URL holds texts only, and psycopg compares these.
        connect_args = parse_connect_args(url) if url.query else {}
        self.DATABASE_CONNECT_ARGS = {name: arg for name, arg in connect_args.items() if not isinstance(arg, str)}
        url = url.difference_update_query(self.DATABASE_CONNECT_ARGS)
        self.SQLALCHEMY_DATABASE_URI = url.render_as_string(hide_password=False)


def load_values():
    """Return the settings that the environment or the file .env sets, as texts by name.

    The flask command adds the nearest .env files of the working directory and its parents to the environment, with
    ${...} expanded. These values are left out, so that all programs use the same settings.
    """
    file_values = read_env_file(ENV_FILE)
    added = {name: value for name, value in read_flask_env_files().items() if os.environ.get(name) == value}
    ignored = [name for name in SETTINGS if name in added.keys() - file_values]
    warnings = [f"{name} is ignored, because it is in another file than {ENV_FILE}" for name in ignored]
    log_warnings(warnings + find_misspelled_names(file_values))
    values = file_values | {name: value for name, value in os.environ.items() if name not in added}
    return {name: values[name] for name in SETTINGS if values.get(name)}


def read_env_file(path):
    """Return the values of a .env file as they are written, by name; none if there is no file."""
    try:
        if path.exists() and not path.is_file():  # to read a pipe or a device may never end
            raise ConfigError(f"{path} must be a regular file")
        text = path.read_text("utf-8") if os.path.lexists(path) else ""  # a link that leads nowhere is an error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # which is what UTF-16 looks like
        raise ConfigError(f"{path} must be a text file in UTF-8")
    values = {}
    for binding in parse_stream(StringIO(text)):
        if binding.error:
            blank_lines = re.match(r"\s*", binding.original.string)[0].count("\n")
            line = binding.original.line + blank_lines
            raise ConfigError(f"{path} line {line} must be NAME=VALUE, with its quotes closed")
        if binding.key:
            values[binding.key] = binding.value
    return values


def read_flask_env_files():
    """Return the values of the .env files that the flask command has read, by name; none in other programs."""
    script_info = get_script_info()
    if script_info is None or not script_info.load_dotenv_defaults:
        return {}
    values = {}
    for name in (".flaskenv", ".env"):
        if path := find_dotenv(name, usecwd=True):
            values.update(dotenv_values(path))
    return values


def get_script_info():
    """Return what the flask command knows of the application, or None in other programs."""
    context = click.get_current_context(silent=True)
    return context and context.find_object(ScriptInfo)


def is_flask_help():
    """Return whether the flask command lists its commands."""
    return get_script_info() is not None and (len(sys.argv) == 1 or "--help" in sys.argv)


def find_misspelled_names(names):
    """Return a warning for each name that is not a setting's but resembles one."""
    warnings = []
    for name in names:
        matches = difflib.get_close_matches(name.upper(), SETTINGS, n=1, cutoff=0.7)
        if matches and name not in SETTINGS:
            warnings.append(f"{name} in {ENV_FILE} is unknown: did you mean {matches[0]}?")
    return warnings


def log_warnings(warnings):
    """Log warnings, unless this process or its parent has logged the same ones."""
    text = "\n".join(warnings)
    if warnings and os.environ.get(LOGGED_WARNINGS) != text:
        logger.warning(text)
        os.environ[LOGGED_WARNINGS] = text
