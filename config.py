"""All settings: their defaults and their checks. They come from the environment, the file .env, or create_app()."""

import os
import re
import secrets
import socket
from datetime import UTC, datetime, timedelta
from functools import partial
from ipaddress import IPv6Address
from pathlib import Path
from urllib.parse import urlsplit

import click
import orjson
from dotenv import dotenv_values, find_dotenv
from flask.cli import NoAppException, ScriptInfo
from limits import RateLimitItem, parse_many
from sqlalchemy import URL
from werkzeug.security import generate_password_hash

ENV_FILE = Path(__file__).with_name(".env")
MIN_SECRET_KEY_LENGTH = 32
DEFAULT_PORTS = {"http": 80, "https": 443}
QUOTED = re.compile(r"""\A(["'])((?:(?!\1).)*)\1\Z""", re.DOTALL)  # as `docker --env-file` passes values on
HOST_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?")
APP_SCHEMES = (  # of pages within apps
    *("app", "capacitor", "capacitor-electron", "chrome-extension", "electron", "ionic", "moz-extension"),
    *("safari-web-extension", "tauri", "vscode-webview", "wails"),
)


class ConfigError(NoAppException):
    """A setting is invalid. The message names it; the flask command prints it as one line."""

    show = click.ClickException.show


def parse_str(value, is_multiline=False):
    """Return a text without control characters."""
    if not isinstance(value, str) or value != value.encode(errors="ignore").decode():
        raise ValueError("must be text in UTF-8")
    if re.search(r"[\0-\x08\x0b-\x1f\x7f-\x9f]" if is_multiline else r"[\0-\x1f\x7f-\x9f]", value):
        raise ValueError("must not contain control characters")
    return value


def parse_secret_key(value):
    """Return a secret key; without a value, generate one for this process."""
    if value and len(parse_str(value)) < MIN_SECRET_KEY_LENGTH:
        raise ValueError(f"must have at least {MIN_SECRET_KEY_LENGTH} characters")
    return value or secrets.token_hex(32)


def parse_api_key(value):
    """Return a text that an HTTP header can carry."""
    value = parse_str(value)
    if not (value.isascii() and value.isprintable()):
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
    """Return True or False; None without a value."""
    values = {"": None, "true": True, "false": False}
    if isinstance(value, str) and value.lower() in values:
        return values[value.lower()]
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


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
        parsed = parsed.astimezone(UTC) if parsed.tzinfo else None
    except (AttributeError, ValueError, OverflowError):
        parsed = None
    if parsed is None:
        raise ValueError("must be a time with an offset, such as 2026-01-31T12:00:00Z")
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
    if not is_host or parts.scheme not in (*DEFAULT_PORTS, *APP_SCHEMES) or origin != f"{parts.scheme}://{host}{port}":
        raise ValueError(f"must list origins as browsers send them, such as https://chat.example.com, not {value!r}")
    return origin


def parse_trusted_host(value):
    """Return a host name in lower case; a leading dot includes its subdomains."""
    host = value.lower()
    if not host.isascii() or not HOST_NAME.fullmatch(host.removeprefix(".")):
        raise ValueError(f"must list host names without a port, such as chat.example.com, not {value!r}")
    return host


def parse_database_url(value):
    """Return the URL of a SQLite file or of a PostgreSQL server, which parse_connect_args() reads."""
    url = value.render_as_string(hide_password=False) if isinstance(value, URL) else parse_str(value)
    scheme, separator, rest = url.partition("://")
    if scheme in ("postgres", "postgresql", "postgresql+psycopg") and separator:
        url = f"postgresql://{rest}"
        parse_connect_args(url)
    elif scheme != "sqlite" or not re.fullmatch("/(?!:memory:)[^?\0]+", rest):
        # Each worker process would have an in-memory database of its own, and options can turn a file into one.
        raise ValueError("must be the URL of a sqlite:/// file or of a postgresql:// server")
    return url


def parse_connect_args(url):
    """Return the arguments of psycopg.connect() for a postgresql:// URL: libpq's options, and prepare_threshold.

    Raises ValueError if libpq, PostgreSQL's client library, cannot read it.
    """
    from psycopg import ProgrammingError  # the driver takes 0.1 s that SQLite need not spend
    from psycopg.conninfo import conninfo_to_dict

    threshold = re.search(r"(?<=[?&])prepare_threshold=([^&]*)&?", url)
    try:
        connect_args = conninfo_to_dict(url.replace(threshold[0], "").rstrip("&") if threshold else url)
    except ProgrammingError:
        raise ValueError("must be the URL of a postgresql:// server, with libpq's options") from None
    if threshold:
        connect_args["prepare_threshold"] = None if threshold[1] == "none" else parse_int(threshold[1], 0, 10**9)
    return connect_args


def parse_http_url(value):
    """Return the URL of a web service."""
    value = parse_str(value)
    try:
        parts = urlsplit(value)
        is_valid = parts.scheme in DEFAULT_PORTS and parts.hostname and parts.port != 0
    except ValueError:
        is_valid = False
    if not is_valid or not value.isprintable() or " " in value:
        raise ValueError("must be an http:// or https:// URL")
    return value


def parse_rate_limits(value):
    """Return a list of limits, none without a value, from a text such as `60 per hour; 300 per day`."""
    try:
        limits = parse_many(parse_str(value)) if isinstance(value, str) and value else list(value)
    except (TypeError, ValueError):
        limits = [None]
    if not all(isinstance(limit, RateLimitItem) and limit.amount and limit.multiples for limit in limits):
        raise ValueError("must be a limit such as 10 per minute")
    return limits


def parse_rate_limit(value):
    """Return one limit such as `10 per minute`."""
    limits = parse_rate_limits([value] if isinstance(value, RateLimitItem) else value)
    if len(limits) != 1:
        raise ValueError("must be one limit such as 10 per minute")
    return limits[0]


def parse_rate_limit_storage(value):
    """Return the URL of a storage that the package limits knows: this process's memory or Redis."""
    parts = urlsplit(parse_str(value))
    try:
        servers = [urlsplit(f"//{server}") for server in parts.netloc.rpartition("@")[2].split(",")]
        is_complete = all(server.hostname and server.port for server in servers)
        is_valid = {
            "redis": parts.netloc and servers[0].port != 0,
            "rediss": parts.netloc and servers[0].port != 0,
            "redis+unix": parts.path,
            "redis+sentinel": is_complete and parts.path.strip("/"),
            "redis+cluster": is_complete,
        }.get(parts.scheme, value == "memory://")
    except ValueError:
        is_valid = False
    if not is_valid:
        raise ValueError("must be memory:// or the URL of a Redis server, such as redis://localhost:6379")
    return value


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

# name: (default, check). The names are those of the environment variables; .env.example describes them.
SETTINGS = {
    "SECRET_KEY": ("", parse_secret_key),
    "SECRET_KEY_FALLBACKS": ("", partial(parse_list, parse_item=parse_secret_key)),
    "DATABASE_URL": ("sqlite:///chatbot.db", parse_database_url),
    "DATABASE_WAIT": ("30", partial(parse_int, minimum=0, maximum=3600)),
    "CORS_ORIGINS": (LOCAL_ORIGINS, partial(parse_list, parse_item=parse_origin)),
    "HOST": ("127.0.0.1", parse_host),
    "PORT": ("5000", partial(parse_int, minimum=0, maximum=65535)),
    "WEB_CONCURRENCY": ("2", partial(parse_int, minimum=1, maximum=256)),
    "TRUSTED_PROXIES": ("0", partial(parse_int, minimum=0, maximum=16)),
    "TRUSTED_HOSTS": ("", partial(parse_list, parse_item=parse_trusted_host)),
    "SESSIONS_VALID_FROM": ("", parse_datetime),
    "SESSION_COOKIE_SECURE": ("", parse_bool),
    "SESSION_COOKIE_SAMESITE": ("Lax", partial(parse_choice, choices=("Lax", "Strict", "None"))),
    "SESSION_COOKIE_PARTITIONED": ("false", parse_bool),
    "SIGNUP": ("open", partial(parse_choice, choices=("open", "closed"))),
    "PASSWORD_HASH_METHOD": (DEFAULT_HASH_METHOD, parse_password_hash_method),
    "PASSWORD_MIN_LENGTH": ("1", partial(parse_int, minimum=1, maximum=1024)),
    "LOGIN_RATE_LIMIT": ("10 per minute", parse_rate_limit),
    "SIGNUP_RATE_LIMIT": ("120 per minute", parse_rate_limit),
    "SEND_RATE_LIMIT": ("", parse_rate_limits),
    "RATE_LIMIT_STORAGE": ("memory://", parse_rate_limit_storage),
    "BOT_MODEL": ("", parse_str),
    "BOT_SYSTEM_PROMPT": ("", partial(parse_str, is_multiline=True)),
    "BOT_HISTORY_CHARS": ("32000", partial(parse_int, minimum=1000, maximum=10_000_000)),
    "BOT_TIMEOUT": ("60", partial(parse_int, minimum=1, maximum=3600)),
    "BOT_MAX_SECONDS": ("600", partial(parse_int, minimum=1, maximum=86400)),
    "BOT_OPTIONS": ("{}", partial(parse_json_object, reserved={"messages", "model", "stream"})),
    "MAX_CONCURRENT_REPLIES": ("20", partial(parse_int, minimum=1, maximum=10_000)),
    "OPENAI_BASE_URL": ("https://api.openai.com/v1", parse_http_url),
    "OPENAI_API_KEY": ("", parse_api_key),
    "LOG_FORMAT": ("text", partial(parse_choice, choices=("text", "json"))),
}

# What Flask and its extensions are told that is no setting of this program.
FIXED = {
    "CORS_ALLOW_HEADERS": [
        *("Accept", "Content-Type", "Idempotency-Key", "If-None-Match", "Last-Event-ID", "Prefer", "X-Request-ID")
    ],
    "CORS_ALWAYS_SEND": False,  # only in responses to requests with an Origin
    "CORS_EXPOSE_HEADERS": [
        *("ETag", "Idempotent-Replayed", "Link", "Location", "Preference-Applied", "Retry-After", "X-Request-ID")
    ],
    "CORS_INTERCEPT_EXCEPTIONS": False,  # the error handlers' responses have the headers anyway
    "CORS_MAX_AGE": 600,  # seconds
    "CORS_SUPPORTS_CREDENTIALS": True,
    "CORS_VARY_HEADER": False,  # app/hooks.py sets Vary for every response
    "MAX_CONTENT_LENGTH": 2**21,  # a message of 100,000 emoji takes 1.2 MB if each is written as two escapes
    "PERMANENT_SESSION_LIFETIME": timedelta(days=400),  # browsers keep no cookie longer; the database ends sessions
    "REMEMBER_COOKIE_NAME": None,  # no cookie has this name: Flask-Login's other one is not read
    "SESSION_COOKIE_HTTPONLY": True,
    "SESSION_COOKIE_NAME": "chatbot_session",  # not Flask's default, which other apps on the host use
    "SESSION_COOKIE_PATH": "/",
    "SESSION_PROTECTION": None,  # a new address or browser version ends no session
    "SESSION_REFRESH_EACH_REQUEST": False,
}


def load_config(overrides=None):
    """Return all settings as a dict for `app.config`.

    A setting is taken from `overrides`, a mapping, else from the environment, else from the file .env, else it has its
    default. An empty one counts as unset. Other names in `overrides`, such as TESTING, are Flask's or an extension's.
    Raises ConfigError for the first invalid setting.
    """
    overrides = dict(overrides or {})
    values = load_values() | overrides
    config = FIXED | {name: value for name, value in overrides.items() if name not in SETTINGS}
    for name, (default, check) in SETTINGS.items():
        value = values.get(name)
        value = value.strip() if isinstance(value, str) else value
        try:
            config[name] = check(default if value is None or value == "" else value)
        except ValueError as error:
            raise ConfigError(f"{name} {error}") from None
    config["TRUSTED_HOSTS"] = config["TRUSTED_HOSTS"] or None
    # Flask-CORS would take the brackets of an IPv6 address for a pattern's.
    literals = [re.compile(re.escape(origin) + r"\Z") for origin in config["CORS_ORIGINS"]]
    config["CORS_RESOURCES"] = {"/*": {"origins": literals}}
    if config["SESSION_COOKIE_SECURE"]:
        secure_cookies(config)
    for name, value in (("SESSION_COOKIE_SAMESITE", "None"), ("SESSION_COOKIE_PARTITIONED", True)):
        if config[name] == value and not config["SESSION_COOKIE_SECURE"]:
            raise ConfigError(f"{name} may be {value} only with SESSION_COOKIE_SECURE=true")
    return config


def secure_cookies(config):
    """Let browsers send the session cookie over HTTPS only, unless SESSION_COOKIE_SECURE=false."""
    if config["SESSION_COOKIE_SECURE"] is not False:
        config.update(SESSION_COOKIE_SECURE=True, SESSION_COOKIE_NAME="__Host-chatbot_session")


def require_shared_settings():
    """Raise ConfigError if a setting is missing that all processes of a server must have in common."""
    for name in ("SECRET_KEY", "SESSIONS_VALID_FROM"):
        if name not in load_values():
            raise ConfigError(f"{name} must be set, because each process of this server would have its own")


def read_env_file():
    """Return the values of the file .env as they are written, by name; none if there is no file."""
    if ENV_FILE.exists() and not ENV_FILE.is_file():  # to read a pipe or a device may never end
        raise ConfigError(f"{ENV_FILE} must be a regular file")
    try:
        return dotenv_values(ENV_FILE, interpolate=False, encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{ENV_FILE} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{ENV_FILE} must be a text file in UTF-8") from None


def load_values():
    """Return the settings that the environment or the file .env sets, as texts by name.

    The flask command adds the .env files of parent folders to the environment; what it has added is left out.
    """
    added = {}
    context = click.get_current_context(silent=True)
    if context and (info := context.find_object(ScriptInfo)) and info.load_dotenv_defaults:
        paths = [find_dotenv(name, usecwd=True) for name in (".flaskenv", ".env")]
        added = {name: value for path in paths if path for name, value in dotenv_values(path).items()}
    environ = {name: value for name, value in os.environ.items() if name not in added or added[name] != value}
    environ = {name: QUOTED.sub(r"\2", value.strip()) for name, value in environ.items()}
    values = read_env_file() | environ
    return {name: values[name] for name in SETTINGS if values.get(name)}
