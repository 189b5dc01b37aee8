"""Every setting: where it comes from, what it may be, and how the program refuses what it may not be."""

import os
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from limits import parse

import config
from app import create_app
from config import SETTINGS, Config, ConfigError
from tests.serving import PATIENCE, ROOT

AHEAD = (datetime.now(UTC) + timedelta(days=1)).isoformat()
LINES = (ROOT / ".env.example").read_text().splitlines()


@pytest.fixture(autouse=True)
def env_file(monkeypatch, tmp_path):
    """The .env file, which is not there yet; nor is any setting in the environment."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(config, "ENV_FILE", tmp_path / ".env")
    return tmp_path / ".env"


def value_of(name, given):
    return getattr(Config({name: given}), name)


DEFAULTS = [
    ("DATABASE_URL", "sqlite:///chatbot.db"),
    ("CORS_ORIGINS", ["http://localhost:3000", "http://localhost:5173"]),
    ("HOST", "127.0.0.1"),
    ("PORT", 5000),
    ("WEB_CONCURRENCY", 2),
    ("TRUSTED_PROXIES", 0),
    ("SESSION_COOKIE_SECURE", False),
    ("SESSION_COOKIE_SAMESITE", "Lax"),
    ("PASSWORD_HASH_METHOD", "scrypt:32768:8:3"),
    ("PASSWORD_MIN_LENGTH", 1),
    ("LOGIN_RATE_LIMIT", parse("10 per minute")),
    ("SIGNUP_RATE_LIMIT", parse("120 per minute")),
    ("RATE_LIMIT_STORAGE", "memory://"),
    ("BOT_MODEL", ""),
    ("BOT_PROMPT", ""),
    ("BOT_HISTORY", 20),
    ("BOT_TIMEOUT", 60),
    ("OPENAI_BASE_URL", "https://api.openai.com/v1"),
    ("OPENAI_API_KEY", ""),
]


@pytest.mark.parametrize(("name", "default"), DEFAULTS, ids=[name for name, _ in DEFAULTS])
def test_a_setting_has_its_default_when_it_is_unset_or_empty(monkeypatch, name, default):
    assert getattr(Config(), name) == default
    monkeypatch.setenv(name, "")
    assert getattr(Config(), name) == default


def test_the_defaults_of_all_other_settings_are_made_at_the_start():
    assert SETTINGS.keys() - dict(DEFAULTS).keys() == {"SECRET_KEY", "SESSIONS_VALID_FROM"}


def test_a_secret_key_is_made_for_each_process():
    key, other = Config().SECRET_KEY, Config().SECRET_KEY
    assert key != other
    assert len(key) == len(other) == 64


def test_sessions_are_valid_from_the_start():
    before = datetime.now(UTC)
    assert before <= Config().SESSIONS_VALID_FROM <= datetime.now(UTC)


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("SECRET_KEY", "a b#c$d", "a b#c$d"),
        ("DATABASE_URL", "sqlite:////srv/chat.db", "sqlite:////srv/chat.db"),
        ("DATABASE_URL", "postgres://chat:chat@db/chat", "postgresql+psycopg://chat:chat@db/chat"),
        ("DATABASE_URL", "postgresql://chat:chat@db:5433/chat", "postgresql+psycopg://chat:chat@db:5433/chat"),
        ("DATABASE_URL", "postgresql://db/chat?sslmode=require", "postgresql+psycopg://db/chat?sslmode=require"),
        ("CORS_ORIGINS", "https://chat.example.com", ["https://chat.example.com"]),
        ("CORS_ORIGINS", " http://a-b.example:8080 , http://10.0.0.1,", ["http://a-b.example:8080", "http://10.0.0.1"]),
        ("CORS_ORIGINS", ",", []),
        ("HOST", "::", "::"),
        ("PORT", "0", 0),
        ("PORT", 0, 0),
        ("PORT", 65535, 65535),
        ("WEB_CONCURRENCY", "256", 256),
        ("TRUSTED_PROXIES", "16", 16),
        ("SESSIONS_VALID_FROM", "2026-01-31T12:00:00Z", datetime(2026, 1, 31, 12, tzinfo=UTC)),
        ("SESSIONS_VALID_FROM", "2026-01-31 12:00:00.5+02:00", datetime(2026, 1, 31, 10, 0, 0, 500000, tzinfo=UTC)),
        ("SESSIONS_VALID_FROM", datetime(2026, 1, 31, tzinfo=UTC), datetime(2026, 1, 31, tzinfo=UTC)),
        ("SESSION_COOKIE_SECURE", "true", True),
        ("SESSION_COOKIE_SECURE", "TRUE", True),
        ("SESSION_COOKIE_SECURE", True, True),
        ("SESSION_COOKIE_SECURE", "False", False),
        ("SESSION_COOKIE_SECURE", False, False),
        ("SESSION_COOKIE_SAMESITE", "Strict", "Strict"),
        ("PASSWORD_HASH_METHOD", "pbkdf2:sha256:1", "pbkdf2:sha256:1"),
        ("PASSWORD_HASH_METHOD", "scrypt:16384:8:1", "scrypt:16384:8:1"),
        ("PASSWORD_HASH_METHOD", "scrypt", "scrypt:32768:8:1"),
        ("PASSWORD_MIN_LENGTH", "1024", 1024),
        ("LOGIN_RATE_LIMIT", "5/hour", parse("5 per hour")),
        ("SIGNUP_RATE_LIMIT", "100 per 2 hours", parse("100 per 2 hours")),
        ("RATE_LIMIT_STORAGE", "redis://:word@cache:6379/1", "redis://:word@cache:6379/1"),
        ("RATE_LIMIT_STORAGE", "rediss://cache", "rediss://cache"),
        ("BOT_MODEL", "llama3:8b", "llama3:8b"),
        ("BOT_PROMPT", "You are a pirate.", "You are a pirate."),
        ("BOT_HISTORY", "1000", 1000),
        ("BOT_TIMEOUT", "3600", 3600),
        ("OPENAI_BASE_URL", "http://localhost:11434/v1", "http://localhost:11434/v1"),
        ("OPENAI_API_KEY", "any text", "any text"),
    ],
)
def test_a_setting_takes(name, given, value):
    assert value_of(name, given) == value


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *(
            ("DATABASE_URL", wrong)
            for wrong in ("chat.db", "mysql://chat:s3cret@db/chat", "postgresql+psycopg2://db/chat")
        ),
        *(
            ("DATABASE_URL", wrong)
            for wrong in ("postgresql://chat:s3cret@db:port/chat", "postgresql//db", "http://db/")
        ),
        *(("DATABASE_URL", wrong) for wrong in ("sqlite:///chat.db?timeout=s3cret", "sqlite", "sqlite+aiosqlite:///a")),
        *(
            ("CORS_ORIGINS", wrong)
            for wrong in ("*", "http://*", "https://*.example.com", r"http://.*\.example", "null")
        ),
        *(("CORS_ORIGINS", wrong) for wrong in ("localhost:3000", "//localhost", "ftp://localhost", "http://")),
        *(
            ("CORS_ORIGINS", wrong)
            for wrong in ("http://localhost/", "http://localhost/app", "http://localhost?", "http://a b")
        ),
        *(
            ("CORS_ORIGINS", wrong)
            for wrong in ("http://localhost:", "http://ada@localhost", "http://localhost,*", "http://a\nb")
        ),
        *(
            ("PORT", wrong)
            for wrong in ("-1", "65536", "http", "5000.0", "5e3", "0x10", "1_000", " 5000", "9" * 5000, "٣")
        ),
        *(("WEB_CONCURRENCY", wrong) for wrong in ("0", "257", "many")),
        *(("TRUSTED_PROXIES", wrong) for wrong in ("-1", "17", "yes")),
        *(("SESSIONS_VALID_FROM", wrong) for wrong in (AHEAD, "9999-12-31T23:59:59-23:00")),
        *(("SESSIONS_VALID_FROM", wrong) for wrong in ("now", "1700000000", "2026-01-31", "2026-01-31T12:00:00")),
        *(("SESSIONS_VALID_FROM", wrong) for wrong in ("2026-02-30T12:00:00Z", "0001-01-01T00:00:00+23:00")),
        *(("SESSION_COOKIE_SECURE", wrong) for wrong in ("1", "yes", "on", "wrong")),
        *(("SESSION_COOKIE_SAMESITE", wrong) for wrong in ("lax", "none", "Loose")),
        ("SESSION_COOKIE_SAMESITE", "None"),
        *(("PASSWORD_HASH_METHOD", wrong) for wrong in ("md5", "plain", "scrypt:3:8:1", "scrypt:1", "pbkdf2:sha256:0")),
        *(("PASSWORD_MIN_LENGTH", wrong) for wrong in ("0", "1025")),
        *(("LOGIN_RATE_LIMIT", wrong) for wrong in ("10", "ten per minute", "-1 per minute", "10 per fortnight")),
        *(("LOGIN_RATE_LIMIT", wrong) for wrong in ("0 per minute", "10 per minute; 50 per hour")),
        *(("SIGNUP_RATE_LIMIT", wrong) for wrong in ("unlimited", "0 per minute")),
        *(("RATE_LIMIT_STORAGE", wrong) for wrong in ("redis", "redis://", "memcached://cache", "redis://cache:port")),
        *(("BOT_HISTORY", wrong) for wrong in ("0", "1001", "all")),
        *(("BOT_TIMEOUT", wrong) for wrong in ("0", "3601", "1.5")),
        *(("OPENAI_BASE_URL", wrong) for wrong in ("api.openai.com", "ftp://api", "http://", "http:///v1", "http://[")),
    ],
)
def test_a_wrong_value_is_refused_in_one_line_that_begins_with_its_name(name, wrong):
    with pytest.raises(ConfigError) as refusal:
        Config({name: wrong})
    assert re.fullmatch(rf"{name} (must|may) .+", refusal.value.message)
    assert "s3cret" not in refusal.value.message


def test_same_site_none_is_for_secure_cookies():
    values = Config({"SESSION_COOKIE_SAMESITE": "None", "SESSION_COOKIE_SECURE": "true"})
    assert values.SESSION_COOKIE_SAMESITE == "None"


@pytest.mark.parametrize("scheme", ["postgres", "postgresql"])
def test_a_password_may_have_special_characters(scheme):
    app = create_app({"DATABASE_URL": f"{scheme}://chat:%40%2F%3A%25%23%3F%5B%20+$@db/chat"})
    with app.app_context():
        assert app.extensions["sqlalchemy"].engine.url.password == "@/:%#?[ +$"


OVERLAYS = {
    "a mapping": dict,
    "an object": lambda **values: SimpleNamespace(**values),
    "a class": lambda **values: type("Settings", (), values),
}


@pytest.mark.parametrize("overlay", OVERLAYS.values(), ids=OVERLAYS)
def test_what_is_passed_wins_over_the_environment_over_the_file_over_the_default(monkeypatch, env_file, overlay):
    assert create_app().config["PORT"] == 5000
    env_file.write_text("PORT=1\n")
    assert create_app().config["PORT"] == 1
    monkeypatch.setenv("PORT", "2")
    assert create_app().config["PORT"] == 2
    assert create_app(overlay(PORT="3")).config["PORT"] == 3


@pytest.mark.parametrize("overlay", OVERLAYS.values(), ids=OVERLAYS)
def test_what_is_passed_and_is_no_setting_of_ours_is_one_of_flasks(overlay):
    app = create_app(overlay(TESTING=True, MAX_CONTENT_LENGTH=9))
    assert app.testing
    assert app.config["MAX_CONTENT_LENGTH"] == 9


@pytest.mark.parametrize("overlay", OVERLAYS.values(), ids=OVERLAYS)
def test_what_is_passed_is_checked_too(overlay):
    with pytest.raises(ConfigError, match=r"^PORT must be"):
        create_app(overlay(PORT=70000))


def test_what_is_not_in_upper_case_is_no_setting():
    assert create_app(SimpleNamespace(port=1)).config["PORT"] == 5000


def test_a_wrong_value_in_the_file_is_refused_unless_something_else_wins(monkeypatch, env_file):
    env_file.write_text("PORT=wrong\n")
    with pytest.raises(ConfigError, match=r"^PORT must be"):
        Config()
    monkeypatch.setenv("PORT", "1")
    assert Config().PORT == 1


def test_an_empty_variable_hides_the_file(monkeypatch, env_file):
    env_file.write_text("PORT=1\n")
    monkeypatch.setenv("PORT", "")
    assert Config().PORT == 5000


def test_the_file_may_quote_comment_and_leave_out(env_file):
    env_file.write_text('# a comment\nHOST="::1"  # another\nPORT\nLOGIN_RATE_LIMIT=5 per hour\n')
    values = Config()
    assert (values.HOST, values.PORT) == ("::1", 5000)
    assert values.LOGIN_RATE_LIMIT.amount == 5


def test_the_example_names_every_setting_with_its_default_in_their_order():
    assert [line for line in LINES if re.match("[A-Z]", line)] == [f"{name}={SETTINGS[name][0]}" for name in SETTINGS]


def test_in_the_example_each_setting_follows_its_comment():
    for comment, setting in zip(LINES[-2 * len(SETTINGS) :: 2], LINES[-2 * len(SETTINGS) + 1 :: 2], strict=True):
        assert comment.startswith("# ")
        assert re.match("[A-Z_]+=", setting)


def test_the_example_changes_nothing(monkeypatch):
    made = {"SECRET_KEY": "made", "SESSIONS_VALID_FROM": "2026-01-31T12:00:00Z"}
    without = vars(Config(made))
    monkeypatch.setattr(config, "ENV_FILE", ROOT / ".env.example")
    assert vars(Config(made)) == without


@pytest.mark.parametrize("command", ["run.py", "-m flask run", "-m flask db upgrade"])
def test_a_wrong_setting_stops_the_program_with_one_line(command):
    run = subprocess.run(
        [sys.executable, *command.split()],
        cwd=ROOT,
        env={**os.environ, **dict.fromkeys(SETTINGS, ""), "CORS_ORIGINS": "http://a\n*"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert run.returncode != 0
    assert re.fullmatch(r"Error: CORS_ORIGINS must .+\n", run.stderr)
    assert run.stdout == ""
