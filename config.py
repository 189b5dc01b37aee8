"""All settings: their sources, their defaults and their checks."""

import os
import re
import secrets
import socket
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from ipaddress import IPv6Address
from pathlib import Path
from urllib.parse import urlsplit

import click
import orjson
from dotenv import dotenv_values, find_dotenv
from environs import Env, EnvError
from flask.cli import ScriptInfo
from limits import RateLimitItem, parse_many
from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError
from werkzeug.security import generate_password_hash

ENV_FILE = Path(__file__).with_name(".env")
MIN_SECRET_KEY_LENGTH = 32
WEB_PORTS = {"http": 80, "https": 443}
HOST_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?")
APP_ORIGIN = re.compile(
    r"(app|capacitor|chrome-extension|ionic|moz-extension|safari-web-extension|tauri)://[a-z0-9._-]+"
)
LOCAL_ORIGINS = ",".join(
    f"http://{host}:{port}" for host in ("localhost", "127.0.0.1") for port in (3000, 3001, 4200, 5173, 5174, 8080)
)
# https://cheatsheetseries.owasp.org/cheatsheets/Password_Storage_Cheat_Sheet.html: N=2^15, r=8, p=3
DEFAULT_HASH_METHOD = "scrypt:32768:8:3"
CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
UNSENDABLE = re.compile(r"(?![\t\n])[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
JSON_RULE = 'must be a JSON object, such as {"temperature": 0.2}'
READER_RULES = {  # what a value must be that environs cannot read
    "int": "must be a whole number",
    "bool": "must be true or false",
    "datetime": "must be a time with an offset, such as 2026-01-31T12:00:00Z",
}


class ConfigError(click.ClickException):
    """A setting is invalid. The message names it; the flask command prints the message as one line."""


def require(condition, rule):
    """Raise ValueError with a rule, such as "must be ...", unless the condition holds."""
    if not condition:
        raise ValueError(rule)


def check_text(value, is_multiline=False):
    """Return a text, which UTF-8 can encode, without control characters."""
    is_text = isinstance(value, str) and not (UNSENDABLE if is_multiline else CONTROL_CHARACTER).search(value)
    require(is_text, "must be text without control characters")
    return value


def check_secret_key(value):
    """Return a secret key; without a value, generate one for this process."""
    is_long = value == "" or len(check_text(value)) >= MIN_SECRET_KEY_LENGTH
    require(is_long, f"must have at least {MIN_SECRET_KEY_LENGTH} characters")
    return value or secrets.token_hex(32)


def check_api_key(value):
    """Return a text that an HTTP header can carry."""
    require(isinstance(value, str) and value.isascii() and value.isprintable(), "must be printable ASCII characters")
    return value


def check_host(value):
    """Return an address or a host name of this machine."""
    try:
        socket.getaddrinfo(check_text(value), None)
    except (OSError, ValueError):
        raise ValueError("must be an address or a host name of this machine") from None
    return value


def check_int(value, minimum, maximum):
    """Return an integer within bounds."""
    is_valid = type(value) is int and minimum <= value <= maximum
    require(is_valid, f"must be a whole number from {minimum} to {maximum}")
    return value


def check_bool(value):
    """Return True, False, or None for neither."""
    require(value in (True, False, None), READER_RULES["bool"])
    return value


def check_choice(value, choices):
    """Return one of several texts."""
    require(value in choices, f"must be one of {', '.join(choices)}")
    return value


def check_datetime(value):
    """Return a time in UTC that is not in the future; without a value, the current time."""
    now = datetime.now(UTC)
    require(not value or (isinstance(value, datetime) and value.tzinfo), READER_RULES["datetime"])
    try:
        value = (value or now).astimezone(UTC)
    except OverflowError:
        raise ValueError(READER_RULES["datetime"]) from None
    require(value <= now, "must not be in the future")
    return value


def check_list(value, check_item):
    """Return a list with each item checked."""
    is_list = isinstance(value, (list, tuple, set)) and all(isinstance(item, str) for item in value)
    require(is_list, "must be a comma-separated list")
    return [check_item(item.strip()) for item in value if item.strip()]


def check_origin(value):
    """Return an origin in lower case; a pattern is not one, as it would let other sites act for a user."""
    origin = value.lower()
    rule = f"must list origins as browsers send them, such as https://chat.example.com, not {value!r}"
    if APP_ORIGIN.fullmatch(origin):
        return origin
    try:
        parts = urlsplit(origin)
        host = f"[{IPv6Address(parts.hostname)}]" if "[" in origin else parts.hostname or ""
        port = "" if parts.port in (None, 0, WEB_PORTS.get(parts.scheme)) else f":{parts.port}"
    except ValueError:
        raise ValueError(rule) from None
    is_host = "%" not in host and ("[" in host or HOST_NAME.fullmatch(host))
    require(is_host and parts.scheme in WEB_PORTS and origin == f"{parts.scheme}://{host}{port}", rule)
    return origin


def check_trusted_host(value):
    """Return a host name in lower case; a leading dot includes its subdomains."""
    rule = f"must list host names without a port, such as chat.example.com, not {value!r}"
    require(HOST_NAME.fullmatch(value.lower().removeprefix(".")), rule)
    return value.lower()


def check_database_url(value):
    """Return the URL of a SQLite file, or of PostgreSQL servers as libpq, PostgreSQL's client library, reads it."""
    rule = "must be the URL of a sqlite:/// file or of a postgresql:// server"
    scheme, _, rest = check_text(value).partition("://")
    if scheme in ("postgres", "postgresql", "postgresql+psycopg"):
        value = f"postgresql://{rest}"
        parse_postgresql_url(value)
        return value
    try:
        url = make_url(value)
    except ArgumentError:
        raise ValueError(rule) from None
    # Each worker process would have an in-memory database of its own, and options can turn a file into one.
    is_file = url.database not in (None, "", ":memory:") and not url.host and not url.query
    require(url.drivername == "sqlite" and is_file, rule)
    return value


def parse_postgresql_url(value):
    """Return psycopg's arguments for a URL of libpq's; prepare_threshold, psycopg's own, is allowed in it, too."""
    match = re.search(r"[?&]prepare_threshold=(\w*)(?=&|$)", value)
    if match:
        value = value[: match.start()] + value[match.end() :].replace("&", "?" if match[0][0] == "?" else "&", 1)
        require(re.fullmatch("none|[0-9]{1,9}", match[1]), "option prepare_threshold must be none or a whole number")
    try:
        args = conninfo_to_dict(value)
    except ProgrammingError:
        raise ValueError("must be a URL with no options but libpq's and prepare_threshold") from None
    threshold = {"prepare_threshold": None if match[1] == "none" else int(match[1])} if match else {}
    return args | threshold


def check_http_url(value):
    """Return the URL of a web service."""
    rule = "must be an http:// or https:// URL"
    try:
        parts = urlsplit(check_text(value))
        require(parts.scheme in WEB_PORTS and parts.hostname and parts.port != 0 and " " not in value, rule)
    except ValueError:
        raise ValueError(rule) from None
    return value


def check_rate_limits(value):
    """Return a list of limits such as `60 per hour; 300 per day`, empty without any."""
    try:
        limits = parse_many(value) if value and isinstance(value, str) else list(value)
    except (TypeError, ValueError):
        limits = [None]
    is_valid = all(isinstance(limit, RateLimitItem) and limit.amount and limit.multiples for limit in limits)
    require(is_valid, "must be limits such as 10 per minute")
    return limits


def check_rate_limit(value):
    """Return a limit such as `10 per minute`."""
    limits = check_rate_limits([value] if isinstance(value, RateLimitItem) else value)
    require(len(limits) == 1, "must be a limit such as 10 per minute")
    return limits[0]


def check_rate_limit_storage(value):
    """Return the URL of a storage that the package limits knows: this process's memory or Redis."""
    rule = "must be memory:// or the URL of a Redis server, such as redis://localhost:6379"
    if value == "memory://":
        return value
    try:
        parts = urlsplit(check_text(value))
        places = [urlsplit(f"//{place}") for place in parts.netloc.rpartition("@")[2].split(",")]
        if parts.scheme in ("redis", "rediss"):
            is_valid = parts.hostname and parts.port != 0
        elif parts.scheme in ("redis+sentinel", "redis+cluster"):
            is_named = parts.scheme == "redis+cluster" or parts.path.strip("/")
            is_valid = is_named and all(place.hostname and place.port for place in places)
        else:
            is_valid = parts.scheme == "redis+unix" and parts.path
    except ValueError:
        raise ValueError(rule) from None
    require(is_valid, rule)
    return value


def check_password_hash_method(value):
    """Return one of Werkzeug's hash methods, spelled in full."""
    if value == DEFAULT_HASH_METHOD:
        return value  # trying it would take 0.1 s
    try:
        return generate_password_hash("", value).split("$")[0]
    except Exception:  # hashlib raises several types for parameters that it cannot use
        raise ValueError("must be a hash method of Werkzeug's, such as scrypt:32768:8:3") from None


def check_json_object(value, reserved):
    """Return a dict that has none of the reserved keys."""
    try:
        value = orjson.loads(value if isinstance(value, str) else orjson.dumps(value))
    except (TypeError, ValueError):
        raise ValueError(JSON_RULE) from None
    require(isinstance(value, dict), JSON_RULE)
    require(not value.keys() & reserved, f"must not contain {', '.join(sorted(reserved))}")
    return value


# name: (the method of environs that reads a text, default, check). .env.example describes the settings.
SETTINGS = {
    "SECRET_KEY": ("str", "", check_secret_key),
    "SECRET_KEY_FALLBACKS": ("list", (), partial(check_list, check_item=check_secret_key)),
    "DATABASE_URL": ("str", "sqlite:///chatbot.db", check_database_url),
    "DATABASE_WAIT": ("int", "30", partial(check_int, minimum=0, maximum=3600)),
    "CORS_ORIGINS": ("list", LOCAL_ORIGINS, partial(check_list, check_item=check_origin)),
    "HOST": ("str", "127.0.0.1", check_host),
    "PORT": ("int", "5000", partial(check_int, minimum=0, maximum=65535)),
    "WEB_CONCURRENCY": ("int", "2", partial(check_int, minimum=1, maximum=256)),
    "TRUSTED_PROXIES": ("int", "0", partial(check_int, minimum=0, maximum=16)),
    "TRUSTED_HOSTS": ("list", (), partial(check_list, check_item=check_trusted_host)),
    "SESSIONS_VALID_FROM": ("datetime", None, check_datetime),
    "SESSION_COOKIE_SECURE": ("bool", None, check_bool),
    "SESSION_COOKIE_SAMESITE": ("str", "Lax", partial(check_choice, choices=("Lax", "Strict", "None"))),
    "SESSION_COOKIE_PARTITIONED": ("bool", "false", check_bool),
    "SIGNUP": ("str", "open", partial(check_choice, choices=("open", "closed"))),
    "PASSWORD_HASH_METHOD": ("str", DEFAULT_HASH_METHOD, check_password_hash_method),
    "PASSWORD_MIN_LENGTH": ("int", "1", partial(check_int, minimum=1, maximum=1024)),
    "LOGIN_RATE_LIMIT": ("str", "10 per minute", check_rate_limit),
    "SIGNUP_RATE_LIMIT": ("str", "120 per minute", check_rate_limit),
    "SEND_RATE_LIMIT": ("str", (), check_rate_limits),
    "RATE_LIMIT_STORAGE": ("str", "memory://", check_rate_limit_storage),
    "BOT_MODEL": ("str", "", check_text),
    "BOT_SYSTEM_PROMPT": ("str", "", partial(check_text, is_multiline=True)),
    "BOT_HISTORY_CHARS": ("int", "32000", partial(check_int, minimum=1000, maximum=10_000_000)),
    "BOT_TIMEOUT": ("int", "60", partial(check_int, minimum=1, maximum=3600)),
    "BOT_MAX_SECONDS": ("int", "600", partial(check_int, minimum=1, maximum=86400)),
    "BOT_OPTIONS": ("str", "{}", partial(check_json_object, reserved={"messages", "model", "stream"})),
    "MAX_CONCURRENT_REPLIES": ("int", "20", partial(check_int, minimum=1, maximum=10_000)),
    "OPENAI_BASE_URL": ("str", "https://api.openai.com/v1", check_http_url),
    "OPENAI_API_KEY": ("str", "", check_api_key),
    "LOG_FORMAT": ("str", "text", partial(check_choice, choices=("text", "json"))),
}

# What Flask and its extensions need beside the settings.
FLASK_CONFIG = {
    "CORS_ALLOW_HEADERS": (
        ["Accept", "Content-Type", "Idempotency-Key", "If-None-Match", "Last-Event-ID", "Prefer", "X-Request-ID"]
    ),
    "CORS_ALWAYS_SEND": False,  # only in responses to requests with an Origin
    "CORS_EXPOSE_HEADERS": (
        ["ETag", "Idempotent-Replayed", "Link", "Location", "Preference-Applied", "Retry-After", "X-Request-ID"]
    ),
    "CORS_INTERCEPT_EXCEPTIONS": False,  # the error handlers' responses have the headers anyway
    "CORS_MAX_AGE": 600,  # seconds
    "CORS_SUPPORTS_CREDENTIALS": True,
    "CORS_VARY_HEADER": False,  # app/hooks.py sets Vary for every response
    "MAX_CONTENT_LENGTH": 2 * 2**20,  # 100,000 emoji, escaped as \ud83d\ude00, take 1.2 MB
    "PERMANENT_SESSION_LIFETIME": timedelta(days=400),  # browsers keep no cookie longer; the server ends sessions
    "SESSION_COOKIE_HTTPONLY": True,
    "SESSION_COOKIE_NAME": "chatbot_session",  # not Flask's default, which other apps on the host use
    "SESSION_COOKIE_PATH": "/",
    "SESSION_PROTECTION": None,  # a new address or browser version ends no session
    "SESSION_REFRESH_EACH_REQUEST": False,
}


def read_values():
    """Return the texts that the environment and the file .env have for settings, by name.

    The flask command adds the nearest .env files of the working directory and its parents to the environment, with
    ${...} expanded. These values are left out, so that all programs use the same settings.
    """
    context = click.get_current_context(silent=True)
    script_info = context and context.find_object(ScriptInfo)
    added = {}
    if script_info and script_info.load_dotenv_defaults:
        for path in filter(None, (find_dotenv(name, usecwd=True) for name in (".flaskenv", ".env"))):
            added |= dotenv_values(path)
    environ = {name: value for name, value in os.environ.items() if name in SETTINGS and added.get(name) != value}
    return read_env_file() | environ


def read_env_file():
    """Return the values of the file .env as they are written, by name; none if there is no file."""
    if ENV_FILE.exists() and not ENV_FILE.is_file():  # to read a pipe or a device may never end
        raise ConfigError(f"{ENV_FILE} must be a regular file")
    try:
        values = dotenv_values(ENV_FILE, interpolate=False, encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{ENV_FILE} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{ENV_FILE} must be a text file in UTF-8") from None
    return {name: value for name, value in values.items() if name in SETTINGS}


def read_value(name, reader, value):
    """Return a setting's value, which environs reads if it is a text. Raises ValueError."""
    if not isinstance(value, str) or not value:
        return value
    value = check_text(value.strip(), is_multiline=True)
    with set_variable(name, value):
        try:
            return getattr(Env(), reader)(name)
        except EnvError:
            raise ValueError(READER_RULES[reader]) from None


@contextmanager
def set_variable(name, value):
    """Set an environment variable during the block, because environs reads from the environment only."""
    previous = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if previous is not None:
            os.environ[name] = previous


def load_config(overrides=None):
    """Return all settings, and what Flask needs beside them, as a dict for `app.config`.

    A setting is taken from `overrides`, else from the environment, else from the file .env, else it has its default; an
    empty one counts as unset. Other names in `overrides` are Flask's or an extension's. Raises ConfigError.
    """
    overrides = dict(overrides or {})
    values = read_values() | overrides
    config = dict(FLASK_CONFIG)
    for name, (reader, default, check) in SETTINGS.items():
        value = values.get(name)
        try:
            config[name] = check(read_value(name, reader, default if value is None or value == "" else value))
        except ValueError as error:
            raise ConfigError(f"{name} {error}") from None
    if config["SESSION_COOKIE_SECURE"]:
        config["SESSION_COOKIE_NAME"] = "__Host-chatbot_session"
    for name, value in (("SESSION_COOKIE_SAMESITE", "None"), ("SESSION_COOKIE_PARTITIONED", True)):
        if config[name] == value and not config["SESSION_COOKIE_SECURE"]:
            raise ConfigError(f"{name} may be {value} only with SESSION_COOKIE_SECURE=true")
    config["TRUSTED_HOSTS"] = config["TRUSTED_HOSTS"] or None
    # Flask-CORS would take the brackets of an IPv6 address for a pattern's.
    literals = [re.compile(re.escape(origin) + r"\Z") for origin in config["CORS_ORIGINS"]]
    config["CORS_RESOURCES"] = {"/*": {"origins": literals}}
    return config | {name: value for name, value in overrides.items() if name not in SETTINGS}


def require_shared_settings():
    """Raise ConfigError if another server than run.py or the flask command lacks what its processes must share."""
    if click.get_current_context(silent=True):
        return
    values = read_values()
    for name in ("SECRET_KEY", "SESSIONS_VALID_FROM"):
        if not values.get(name):
            raise ConfigError(f"{name} must be set, because each process of this server would have its own")
