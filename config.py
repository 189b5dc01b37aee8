"""Every setting of the server: where it comes from, its default, and what it may be."""

import os
import re
import secrets
import socket
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import click
from dotenv import dotenv_values
from limits import parse_many
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError
from werkzeug.security import generate_password_hash

ENV_FILE = Path(__file__).with_name(".env")


class ConfigError(click.ClickException):
    """A setting is wrong. The message is one line that names it; the flask command prints just that."""


def text(value):
    """Take any text as it is."""
    return value


def secret(value):
    """Take a secret as it is; without one, make one that lasts as long as this process."""
    return value or secrets.token_hex(32)


def host(value):
    """Take an address or a name of this machine."""
    try:
        socket.getaddrinfo(value, None)
    except (OSError, UnicodeError):
        raise ValueError("must be an address or a name of this machine") from None
    return value


def integer(low, high):
    """Make a check for a whole number from `low` to `high`."""

    def check(value):
        if not re.fullmatch("[0-9]{1,9}", value) or not low <= int(value) <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return int(value)

    return check


def boolean(value):
    """Take `true` or `false`."""
    if value.lower() not in ("true", "false"):
        raise ValueError("must be true or false")
    return value.lower() == "true"


def same_site(value):
    """Take a value of the cookie attribute SameSite."""
    if value not in ("Lax", "Strict", "None"):
        raise ValueError("must be Lax, Strict or None")
    return value


def moment(value):
    """Take an ISO 8601 time with an offset that is not in the future; without one, take now."""
    now = datetime.now(UTC)
    try:
        parsed = datetime.fromisoformat(value) if value else now
        if parsed.tzinfo is None:
            raise ValueError
        parsed = parsed.astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError("must be a time with an offset, such as 2026-01-31T12:00:00Z") from None
    if parsed > now:
        raise ValueError("must not be in the future")
    return parsed


def database_url(value):
    """Take a SQLite or PostgreSQL URL as people paste them; name the driver that is installed here."""
    try:
        url = make_url(value)
        if url.drivername in ("postgres", "postgresql"):
            url = url.set(drivername="postgresql+psycopg")
        if url.drivername not in ("sqlite", "postgresql+psycopg"):
            raise ValueError
        if url.drivername == "sqlite" and url.database in (None, "", ":memory:"):
            raise ValueError  # each worker would have a database of its own
        url.get_dialect()().create_connect_args(url)
    except (ArgumentError, ValueError):
        raise ValueError("must be the URL of a sqlite:/// file or a postgresql:// server") from None
    return url.render_as_string(hide_password=False)


def origins(value):
    """Take a comma-separated list of origins. No pattern: it would let any page act for a logged-in user."""
    listed = [origin.strip().lower() for origin in value.split(",") if origin.strip()]
    for origin in listed:
        usual = is_url(origin, "http", "https") and re.fullmatch(r"[a-z]+://[a-z0-9.-]+(:[0-9]+)?", origin)
        if not usual or re.search("^http:.*:80$|^https:.*:443$", origin):  # browsers leave these ports out
            raise ValueError(f"must list origins such as https://chat.example.com, not {origin!r}")
    return listed


def http_url(value):
    """Take the URL of a web service."""
    if not is_url(value, "http", "https"):
        raise ValueError("must be an http:// or https:// URL")
    return value


def is_url(value, *schemes):
    """Tell whether this is a URL of one of the schemes, with a host and a good port."""
    try:
        parts = urlsplit(value)
        return parts.scheme in schemes and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def rate_limit(value):
    """Take a limit such as `10 per minute`."""
    try:
        (limit,) = parse_many(value)
        if limit.amount and limit.multiples:
            return limit
    except ValueError:
        pass
    raise ValueError("must be a limit such as 10 per minute")


def rate_limit_storage(value):
    """Take the place where throttles are counted."""
    if value != "memory://" and not is_url(value, "redis", "rediss"):
        raise ValueError("must be memory:// or a redis:// URL")
    return value


def password_hash_method(value):
    """Take a hash method of werkzeug's, tried out and spelled in full, unless it is the default."""
    if value == SETTINGS["PASSWORD_HASH_METHOD"][0]:
        return value
    try:
        return generate_password_hash("", value).split("$")[0]
    except Exception:  # hashlib raises several kinds for a cost that cannot be
        raise ValueError("must be a method of werkzeug's, such as scrypt:32768:8:3") from None


# The name in the environment and in app.config: (default, check). `.env.example` says what each is for.
SETTINGS = {
    "SECRET_KEY": ("", secret),
    "DATABASE_URL": ("sqlite:///chatbot.db", database_url),
    "CORS_ORIGINS": ("http://localhost:3000,http://localhost:5173", origins),
    "HOST": ("127.0.0.1", host),
    "PORT": ("5000", integer(0, 65535)),
    "WEB_CONCURRENCY": ("2", integer(1, 256)),
    "TRUSTED_PROXIES": ("0", integer(0, 16)),
    "SESSIONS_VALID_FROM": ("", moment),
    "SESSION_COOKIE_SECURE": ("false", boolean),
    "SESSION_COOKIE_SAMESITE": ("Lax", same_site),
    # https://cheatsheetseries.owasp.org/cheatsheets/Password_Storage_Cheat_Sheet.html: N=2^15, r=8, p=3
    "PASSWORD_HASH_METHOD": ("scrypt:32768:8:3", password_hash_method),
    "PASSWORD_MIN_LENGTH": ("1", integer(1, 1024)),
    "LOGIN_RATE_LIMIT": ("10 per minute", rate_limit),
    "SIGNUP_RATE_LIMIT": ("120 per minute", rate_limit),
    "RATE_LIMIT_STORAGE": ("memory://", rate_limit_storage),
    "BOT_MODEL": ("", text),
    "BOT_PROMPT": ("", text),
    "BOT_HISTORY": ("20", integer(1, 1000)),
    "BOT_TIMEOUT": ("60", integer(1, 3600)),
    "OPENAI_BASE_URL": ("https://api.openai.com/v1", http_url),
    "OPENAI_API_KEY": ("", text),
}


class Config:
    """Every setting, checked, as attributes for `app.config.from_object`.

    Each comes from `values`, else the environment, else the file `.env`, else its default;
    what is empty counts as unset. Raises ConfigError, which names the first setting that is wrong.
    """

    def __init__(self, values=()):
        given = {**dotenv_values(ENV_FILE), **os.environ, **dict(values)}
        for name, (default, check) in SETTINGS.items():
            try:
                value = given.get(name)
                setattr(self, name, check(default if value in (None, "") else str(value)))
            except ValueError as error:
                raise ConfigError(f"{name} {error}") from None
        if self.SESSION_COOKIE_SAMESITE == "None" and not self.SESSION_COOKIE_SECURE:
            raise ConfigError("SESSION_COOKIE_SAMESITE may be None only with SESSION_COOKIE_SECURE=true")
