"""Settings: their sources, their defaults and their validation."""

import os
import re
from datetime import UTC, datetime

import pytest
from flask.cli import FlaskGroup
from limits import parse

import config
from app.database import engine_options
from config import SETTINGS, ConfigError, load_config
from tests.helpers.server import ROOT

SECRET_KEY = "0123456789 abcdef#ghijkl$mnopqrs"
FUTURE = datetime(2999, 1, 1, tzinfo=UTC)
EXAMPLE_LINES = (ROOT / ".env.example").read_text().splitlines()


@pytest.fixture(autouse=True)
def env_file(monkeypatch, tmp_path):
    """Replace the environment by one without settings, and .env by a file that does not exist; return its path."""
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name not in SETTINGS})
    monkeypatch.setattr(config, "ENV_FILE", tmp_path / "project" / ".env")
    config.ENV_FILE.parent.mkdir()
    return config.ENV_FILE


@pytest.fixture
def run_flask(monkeypatch, env_file):
    """Return a function that calls another one as the flask command would, in the project's folder."""

    def run(func):
        monkeypatch.chdir(env_file.parent)
        with FlaskGroup().make_context("flask", ["routes"]):
            return func()

    return run


def get_value(name, value):
    return load_config({name: value})[name]


@pytest.mark.parametrize("name", sorted(SETTINGS.keys() - {"SECRET_KEY", "SESSIONS_VALID_FROM"}))
def test_unset_or_empty_setting_has_the_default_of_the_example(monkeypatch, name):
    [default] = [line.removeprefix(f"{name}=") for line in EXAMPLE_LINES if line.startswith(f"{name}=")]
    expected = get_value(name, default)
    assert load_config()[name] == get_value(name, None) == get_value(name, "") == expected
    monkeypatch.setenv(name, "")
    assert load_config()[name] == expected


def test_unset_secret_key_is_generated_and_unset_sessions_valid_from_is_the_start():
    before = datetime.now(UTC)
    one, other = load_config(), load_config()
    assert len({one["SECRET_KEY"], other["SECRET_KEY"]}) == 2
    assert len(one["SECRET_KEY"]) == 64
    assert before <= one["SESSIONS_VALID_FROM"] <= other["SESSIONS_VALID_FROM"] <= datetime.now(UTC)


UNCHANGED = {  # values that are valid as they are
    "SECRET_KEY": [SECRET_KEY],
    "DATABASE_URL": ["sqlite:////srv/chat.db", "postgresql://db/chat?sslmode=require"],
    "CORS_ORIGINS": [["http://localhost:3000"], ["http://localhost:443"], []],
    "HOST": ["::"],
    "SESSION_COOKIE_SECURE": [True, False],
    "SESSION_COOKIE_SAMESITE": ["Strict"],
    "SIGNUP": ["closed"],
    "PASSWORD_HASH_METHOD": ["pbkdf2:sha256:1", "scrypt:16384:8:1"],
    "LOGIN_RATE_LIMIT": [parse("5 per hour")],
    "RATE_LIMIT_STORAGE": [
        *("redis://:word@cache:6379/1", "rediss://cache?socket_timeout=1", "redis+unix:///run/redis.sock"),
        *("redis+sentinel://:word@one:26379,two:26379/service", "redis+cluster://one:7000,[::1]:7001"),
    ],
    "BOT_SYSTEM_PROMPT": ["You are\na pirate. ☠"],
    "BOT_OPTIONS": [{"seed": 1}],
    "OPENAI_BASE_URL": ["http://localhost:11434/v1", "http://[::1]:11434/v1"],
    "LOG_FORMAT": ["json"],
}
VALID = [
    *((name, value, value) for name, values in UNCHANGED.items() for value in values),
    ("DATABASE_URL", "postgres://chat:chat@db/chat", "postgresql://chat:chat@db/chat"),
    ("DATABASE_URL", "postgresql+psycopg://db:5433/chat", "postgresql://db:5433/chat"),
    ("SECRET_KEY_FALLBACKS", f"{'a' * 32}, {'b' * 32}", ["a" * 32, "b" * 32]),
    ("SEND_RATE_LIMIT", "60 per hour; 300 per day", [parse("60 per hour"), parse("300 per day")]),
    ("SIGNUP_RATE_LIMIT", "100 per 2 hours", parse("100 per 2 hours")),
    ("BOT_MODEL", " llama \r\n", "llama"),
    ("PORT", " 5001\r", 5001),
    ("CORS_ORIGINS", "safari-web-extension://a-b,wails://wails", ["safari-web-extension://a-b", "wails://wails"]),
    ("CORS_ORIGINS", "HTTPS://Chat.Example.com,app://B", ["https://chat.example.com", "app://b"]),
    ("CORS_ORIGINS", "tauri://localhost,capacitor://localhost", ["tauri://localhost", "capacitor://localhost"]),
    ("CORS_ORIGINS", "chrome-extension://ab,moz-extension://0a-b", ["chrome-extension://ab", "moz-extension://0a-b"]),
    ("CORS_ORIGINS", " http://a-b.example:8080 , http://10.0.0.1,", ["http://a-b.example:8080", "http://10.0.0.1"]),
    ("CORS_ORIGINS", "http://[::1]:5173,https://[2001:db8::1]", ["http://[::1]:5173", "https://[2001:db8::1]"]),
    ("CORS_ORIGINS", ("http://localhost",), ["http://localhost"]),
    ("CORS_ORIGINS", ",", []),
    ("TRUSTED_HOSTS", "chat.example.com, .example.org", ["chat.example.com", ".example.org"]),
    ("TRUSTED_HOSTS", ["LOCALHOST", "127.0.0.1"], ["localhost", "127.0.0.1"]),
    ("TRUSTED_HOSTS", ",", None),
    ("SESSIONS_VALID_FROM", "2026-01-31T12:00:00Z", datetime(2026, 1, 31, 12, tzinfo=UTC)),
    ("SESSIONS_VALID_FROM", "2026-01-31 12:00:00.5+02:00", datetime(2026, 1, 31, 10, 0, 0, 500000, tzinfo=UTC)),
    ("SESSION_COOKIE_SECURE", "true", True),
    ("SESSION_COOKIE_SECURE", "False", False),
    ("PASSWORD_HASH_METHOD", "scrypt", "scrypt:32768:8:1"),
    ("BOT_OPTIONS", '{"temperature": 0.2, "stop": ["\\n"]}', {"temperature": 0.2, "stop": ["\n"]}),
]
BOUNDS = {  # of whole numbers
    "DATABASE_WAIT": (0, 3600),
    "PORT": (0, 65535),
    "WEB_CONCURRENCY": (1, 256),
    "TRUSTED_PROXIES": (0, 16),
    "PASSWORD_MIN_LENGTH": (1, 1024),
    "BOT_HISTORY_CHARS": (1000, 10_000_000),
    "BOT_TIMEOUT": (1, 3600),
    "BOT_MAX_SECONDS": (1, 86400),
    "MAX_CONCURRENT_REPLIES": (1, 10_000),
}


@pytest.mark.parametrize(("name", "value", "parsed"), VALID)
def test_valid_value_is_parsed_and_what_it_is_parsed_to_is_valid(name, value, parsed):
    assert get_value(name, value) == get_value(name, parsed) == parsed


@pytest.mark.parametrize(("name", "bounds"), BOUNDS.items(), ids=BOUNDS)
def test_whole_number_has_bounds(name, bounds):
    minimum, maximum = bounds
    for value in bounds:
        assert get_value(name, value) == get_value(name, str(value)) == value
    for value in (minimum - 1, str(minimum - 1), maximum + 1, str(maximum + 1), "1.5", "many"):
        with pytest.raises(ConfigError, match=f"^{name} must be a whole number from {minimum} to {maximum}$"):
            get_value(name, value)


INVALID = {
    "SECRET_KEY": ["s3cret", "s3cret".ljust(31), b"s3cret".ljust(32), "\udcff" * 32, 5],
    "DATABASE_URL": [
        *("chat.db", "sqlite", "sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite://host/chat.db", 5),
        *("sqlite+aiosqlite:///a", "sqlite:///chat.db?timeout=s3cret", "sqlite:///chat\r.db"),
        *("sqlite:///file:chat?mode=memory&uri=true", "mysql://chat:s3cret@db/chat", "http://db/", "postgresql//db"),
        *("postgresql+psycopg2://db/chat", "postgresql://db/chat?unknown=s3cret", "postgresql://db/chat?autocommit=1"),
        *("postgresql://db/chat?prepare_threshold=-1", "postgresql://db/chat?prepare_threshold=never"),
    ],
    "CORS_ORIGINS": [
        *("*", "http://*", "https://*.example.com", r"http://.*\.example", "null", "localhost:3000", "//localhost"),
        *("ftp://localhost", "app://", "app://*", "chrome-extension://*", "tauri://localhost/x", "http://"),
        *("javascript://localhost", "http://localhost/", "http://localhost/app", "http://localhost?"),
        *("http://localhost#", "http://localhost:", "http://localhost:0", "http://localhost:80", "http://localhost:x"),
        *("https://localhost:443", "http://localhost:05173", "http://ada@localhost", "http://localhost,*"),
        *("http://a b", "http://a\nb", "http://bücher.example", "http://a..b", "http://[::1", "http://[::1]]"),
        *("http://::1", "http://[0:0::1]:5173", "http://[localhost]", "http://[fe80::1%eth0]", ["http://*"], [5], 5),
        {"http://localhost": 1},
    ],
    "HOST": ["no host", "999.0.0.1", "nowhere.invalid", "a\0b", 5],
    "PORT": ["http", "5000.0", "5e3", "0x10", "9" * 5000, 80.0, True, []],
    "TRUSTED_HOSTS": ["*", "*.example.com", "localhost:5000", "http://localhost", "[::1]", ".", "bücher.example", 5],
    "SESSIONS_VALID_FROM": [
        *("now", "1700000000", "2026-01-31", "2026-01-31T12:00:00", "2026-02-30T12:00:00Z"),
        *("0001-01-01T00:00:00+23:00", "9999-12-31T23:59:59-23:00", FUTURE.isoformat()),
        *(FUTURE, datetime(2026, 1, 31), 1700000000),
    ],
    "SESSION_COOKIE_SECURE": ["wrong", "2", []],
    "SECRET_KEY_FALLBACKS": ["s3cret", f"{'a' * 32},s3cret", 5],
    "SESSION_COOKIE_PARTITIONED": ["wrong", True],
    "SIGNUP": ["invite", "Open", True],
    "SEND_RATE_LIMIT": ["10", "60 per hour;; x", "0 per day", 5],
    "SESSION_COOKIE_SAMESITE": ["lax", "none", "Loose", "None", True],
    "PASSWORD_HASH_METHOD": ["md5", "plain", "scrypt:3:8:1", "scrypt:1", "pbkdf2:sha256:0", 5],
    "LOGIN_RATE_LIMIT": ["10", "ten per minute", "-1 per minute", "10 per fortnight", "0 per minute", 10],
    "SIGNUP_RATE_LIMIT": ["unlimited", "0 per minute", "10 per minute; 50 per hour"],
    "RATE_LIMIT_STORAGE": [
        *("redis", "redis://", "memcached://cache", "redis://cache:port", "redis://cache:99999", "memory://x", 5),
        *("redis+unix://", "unix:///run/redis.sock", "redis+sentinel://one:26379", "redis+sentinel://one/service"),
        *("redis+cluster://one", "redis+cluster://", "redis+cluster://one:7000,two", "redis+cluster://one:port"),
    ],
    "BOT_MODEL": [5, "\udcff", "a\rb", "a\0b", "a\nb"],
    "BOT_SYSTEM_PROMPT": ["a\rb", "a\x1bb"],
    "BOT_OPTIONS": [
        *("temperature=1", "[]", "1", "{", '{"n": NaN}', "[" * 5000, '{"model": "x"}', '{"messages": []}'),
        *({"stream": False}, {1: 2}, {"seed": object()}, 5),
    ],
    "OPENAI_BASE_URL": [
        *("api.openai.com", "ftp://api", "http://", "http:///v1", "http://[", "http://a\nb", "http://a b"),
    ],
    "OPENAI_API_KEY": ["s3c\nret", "s3crét"],
    "LOG_FORMAT": ["JSON", "xml"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in INVALID.items() for value in values])
def test_invalid_value_raises_config_error_in_one_line_that_names_the_setting(name, value):
    with pytest.raises(ConfigError) as raised:
        load_config({name: value})
    assert re.fullmatch(rf"{name} (option [a-z_]+ )?(must|may) .+", raised.value.message)
    assert "s3cret" not in raised.value.message


def test_overrides_win_over_environment_over_file_over_default_and_the_winner_must_be_valid(monkeypatch, env_file):
    assert load_config()["PORT"] == 5000
    env_file.write_text("PORT=1\n")
    assert load_config()["PORT"] == 1
    monkeypatch.setenv("PORT", "2")
    assert load_config()["PORT"] == 2
    assert load_config({"PORT": "3", "TESTING": True}).items() >= {"PORT": 3, "TESTING": True}.items()
    monkeypatch.setenv("PORT", "")
    assert load_config()["PORT"] == 5000
    monkeypatch.delenv("PORT")
    env_file.write_text("PORT=wrong\n")
    with pytest.raises(ConfigError, match=r"^PORT must be"):
        load_config()
    monkeypatch.setenv("PORT", "4")
    assert load_config()["PORT"] == 4


@pytest.mark.parametrize(
    ("value", "model"), [('"llama"', "llama"), (" 'llama'\r", "llama"), ('"a" or "b"', '"a" or "b"')]
)
def test_quotes_around_an_environment_variable_do_not_count(monkeypatch, value, model):
    monkeypatch.setenv("BOT_MODEL", value)
    assert load_config()["BOT_MODEL"] == model


def test_file_may_have_quotes_comments_and_bare_names(env_file):
    env_file.write_text('\ufeff# a comment\nHOST="::1"  # another\nPORT\nexport LOGIN_RATE_LIMIT=5 per hour\n')
    values = load_config()
    assert ("::1", 5000, parse("5 per hour")) == (values["HOST"], values["PORT"], values["LOGIN_RATE_LIMIT"])


@pytest.mark.parametrize("line", ["BOT_MODEL=${HOME}/$HOME", 'BOT_MODEL="${HOME}/$HOME"'])
def test_file_is_not_expanded(monkeypatch, env_file, run_flask, line):
    env_file.write_text(f"{line}\n")
    assert load_config()["BOT_MODEL"] == "${HOME}/$HOME"
    assert run_flask(lambda: load_config()["BOT_MODEL"]) == "${HOME}/$HOME"


@pytest.mark.parametrize(
    ("create", "kind"),
    [(lambda path: path.write_bytes(b"BOT_MODEL=\xe9"), "text file in UTF-8"), (os.mkfifo, "regular file")],
    ids=["Latin-1", "pipe"],
)
def test_file_that_is_not_a_regular_one_in_utf8_raises_config_error(env_file, create, kind):
    create(env_file)
    with pytest.raises(ConfigError, match=f"^{re.escape(str(env_file))} must be a {kind}$"):
        load_config()


@pytest.mark.parametrize(
    ("parent_file", "project_file", "environment", "port"),
    [
        (".env", "", {}, 5000),
        (".flaskenv", "PORT=2", {}, 2),
        (".env", "PORT=2", {"PORT": "3"}, 3),
        (".env", "", {"PORT": "1", "FLASK_SKIP_DOTENV": "1"}, 1),
    ],
)
def test_flask_command_reads_the_environment_and_the_project_s_file_but_no_file_of_a_parent_folder(
    monkeypatch, env_file, run_flask, parent_file, project_file, environment, port
):
    (env_file.parents[1] / parent_file).write_text("PORT=1\n")
    env_file.write_text(project_file)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert run_flask(lambda: load_config()["PORT"]) == port


def test_example_describes_every_setting_in_the_line_before_and_has_its_default():
    lines = EXAMPLE_LINES[-2 * len(SETTINGS) :]
    assert all(comment.startswith("# ") for comment in lines[::2])
    assert lines[1::2] == [f"{name}={default or ''}" for name, (default, _) in SETTINGS.items()]
    assert not [line for line in EXAMPLE_LINES[: -len(lines)] if re.match("[A-Z]", line)]


@pytest.mark.parametrize(
    ("url", "connect_args"),
    [
        ("postgres://chat:%40%2F%3A%25%23%3F%20+$@db", {"user": "chat", "password": "@/:%#? +$", "host": "db"}),
        ("postgresql://[::1],two:5433/chat", {"host": "::1,two", "port": ",5433", "dbname": "chat"}),
        ("postgresql://a:b@%2Frun:5433/chat", {"user": "a", "password": "b", "host": "/run", "port": "5433"}),
        ("postgresql://db?prepare_threshold=0&sslmode=require", {"prepare_threshold": 0, "sslmode": "require"}),
        ("postgresql://db?sslmode=require&prepare_threshold=none", {"prepare_threshold": None, "sslmode": "require"}),
        ("postgresql://db?options=-c%20geqo%3Doff", {"options": "-c geqo=off"}),
    ],
)
def test_database_url_is_read_as_libpq_reads_it(url, connect_args):
    options = engine_options(get_value("DATABASE_URL", url))["SQLALCHEMY_ENGINE_OPTIONS"]
    assert options["connect_args"].items() >= connect_args.items()


@pytest.mark.parametrize(("name", "value"), [("SESSION_COOKIE_SAMESITE", "None"), ("SESSION_COOKIE_PARTITIONED", True)])
def test_cookie_for_other_sites_is_valid_if_secure(name, value):
    assert load_config({name: value, "SESSION_COOKIE_SECURE": True})[name] == value
