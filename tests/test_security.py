"""Password hashing and rate limits."""

import re
import time
from types import SimpleNamespace

import pytest
from flask import Flask
from limits import parse, parse_many
from werkzeug.exceptions import ServiceUnavailable, TooManyRequests
from werkzeug.security import generate_password_hash

from app.security import authenticate, client_address, init_app, record_send, verify_password
from app.threads import MAX_LONG_QUERIES, run_long_query
from tests.helpers.server import run_all, run_concurrently

ADDRESS = "192.0.2.1"
METHOD = "pbkdf2:sha256:1"
UNREADABLE_HASHES = [
    *("", "x", "$", "$$", "plain text", "md5$salt$00", "scrypt:3:8:1$salt$00", f"scrypt:{2**70}:8:1$salt$00"),
    *("pbkdf2:sha256:x$salt$00", "pbkdf2:sha256:0$salt$00", f"pbkdf2:sha256:{2**70}$salt$00"),
    *("pbkdf2:sha256:1$salt$é", "$argon2id$v=19$m=65536,t=3,p=4$c2FsdA$aGFzaA"),
]


def create_app(**settings):
    """Return an app with nothing but the settings of this module, a rate limiter and the log."""
    app = Flask("security")
    limits = {"LOGIN_RATE_LIMIT": parse("3 per minute"), "RATE_LIMIT_STORAGE": "memory://"}
    app.config.update({"SECRET_KEY": "k" * 32, "PASSWORD_HASH_METHOD": METHOD, **limits, **settings})
    init_app(app)
    return app


def create_user(password="right"):
    return SimpleNamespace(id=7, password_hash=generate_password_hash(password, METHOD))


def log_in(app, username="ada", user=None, password="wrong", address=ADDRESS):
    """Return whether a login succeeds, or 429."""
    with app.test_request_context(environ_base={"REMOTE_ADDR": address}):
        try:
            return authenticate(username, user, password)
        except TooManyRequests as error:
            return error.code


@pytest.fixture
def app():
    return create_app()


# Passwords


@pytest.mark.parametrize("password_hash", UNREADABLE_HASHES)
def test_verify_password_with_unreadable_hash_returns_false(app, password_hash):
    with app.app_context():
        assert verify_password(password_hash, "word") is False


# Searches


@pytest.mark.parametrize(("user_ids", "most"), [([1] * 4, 1), ([1, 2, 3, 4, 5], MAX_LONG_QUERIES)])
def test_run_long_query_lets_searches_take_turns(user_ids, most):
    running, counts = [], []

    def search():
        running.append(True)
        counts.append(len(running))
        time.sleep(0.05)
        running.pop()

    run_concurrently(len(user_ids), lambda number: run_long_query(search, user_ids[number]))
    assert max(counts) == most


def test_run_long_query_that_waits_too_long_returns_503_and_leaves_nothing_locked(monkeypatch):
    monkeypatch.setattr("app.threads.MAX_WAIT", 0.05)

    def search_again():
        with pytest.raises(ServiceUnavailable) as caught:
            run_long_query(str, 1)
        return caught.value.retry_after

    assert run_long_query(lambda: run_all(search_again), 1) == [5]
    assert run_long_query(lambda: run_long_query(str, 2), 1) == ""


# Client addresses


@pytest.mark.parametrize(
    ("remote_addr", "expected"),
    [
        *(("192.0.2.1", "192.0.2.1"), ("192.0.2.1:50000", "192.0.2.1"), ("192.0.2.256", "192.0.2.256")),
        *(("2001:db8::1", "2001:db8::/64"), ("2001:DB8:0:0:ffff::2", "2001:db8::/64")),
        *(("2001:db8:0:1::1", "2001:db8:0:1::/64"), ("fe80::1%eth0", "fe80::/64"), ("::1", "::/64")),
        *(("[2001:db8::1]", "2001:db8::/64"), ("[2001:db8::1]:443", "2001:db8::/64")),
        *(("::ffff:192.0.2.1", "192.0.2.1"), ("[::ffff:c000:201]:443", "192.0.2.1")),
        *(("unix:", "unix:"), ("[", "["), ("unknown", "unknown"), ("", ""), (None, "")),
    ],
)
def test_client_address_is_normalised(app, remote_addr, expected):
    with app.test_request_context(environ_base={"REMOTE_ADDR": remote_addr}):
        assert client_address() == expected


# Logins


@pytest.mark.parametrize("user", [None, create_user()])
def test_authenticate_after_too_many_failures_returns_429_for_the_right_password(app, user):
    assert [log_in(app, user=user) for _ in range(4)] == [False, False, False, 429]
    assert log_in(app, user=create_user(), password="right") == 429


def test_authenticate_after_failures_elsewhere_succeeds(app):
    for _ in range(4):
        log_in(app, address="192.0.2.2")
        log_in(app, username="bob")
    assert log_in(app, user=create_user(), password="right") is True


def test_authenticate_counts_an_ipv6_network_as_one_address(app):
    assert [log_in(app, address=f"2001:db8::{number}") for number in range(4)] == [False, False, False, 429]


def test_authenticate_does_not_count_successes_as_failures(app):
    user = create_user()
    passwords = ["right", "wrong", "right", "right", "wrong", "right", "right", "wrong", "right"]
    results = [log_in(app, user=user, password=password) for password in passwords]
    assert results == [True, False, True, True, False, True, True, False, 429]


def test_authenticate_limits_all_attempts_of_an_address(app):
    user = create_user()
    for number in range(15):
        assert log_in(app, user=user, password="right") is True
        assert log_in(app, username=f"name {number}") is False
    assert log_in(app, user=user, password="right") == 429
    assert log_in(app, username="bob") == 429
    assert log_in(app, user=user, password="right", address="192.0.2.2") is True


def test_concurrent_wrong_guesses_are_answered_up_to_the_limit(app):
    user = create_user()
    results = run_concurrently(24, lambda number: log_in(app, user=user, password=f"guess {number}"))
    assert sorted(results) == [False] * 3 + [429] * 21


# Sends


def send(app, user_id=1):
    """Return True, or the sentence and the seconds of a refusal."""
    with app.app_context():
        try:
            record_send(user_id)
            return True
        except TooManyRequests as error:
            return error.description, error.retry_after


@pytest.mark.parametrize(
    ("limits", "seconds", "message"),
    [
        ("1 per hour", 3600, "You may send 1 message per hour: try again in 60 minutes"),
        ("1 per 30 seconds", 30, "You may send 1 message per 30 seconds: try again in 30 seconds"),
        ("1 per 2 days; 1 per hour", 172800, "You may send 1 message per 2 days: try again in 2 days"),
        ("1 per hour; 1 per day", 86400, "You may send 1 message per day: try again in 24 hours"),
        ("1 per 90 minutes", 5400, "You may send 1 message per 90 minutes: try again in 90 minutes"),
    ],
)
def test_record_send_after_the_last_one_says_when_to_try_again(limits, seconds, message):
    app = create_app(SEND_RATE_LIMIT=parse_many(limits))
    assert send(app) is True
    assert send(app) == (message, seconds)
    assert send(app, user_id=2) is True


def test_record_send_after_retry_after_is_accepted_and_a_refused_one_counts_for_no_limit():
    app = create_app(SEND_RATE_LIMIT=parse_many("1 per second; 2 per hour"))
    assert send(app) is True
    _, seconds = send(app)
    assert seconds == 1
    time.sleep(seconds)
    assert send(app) is True
    message, seconds = send(app)
    assert message == "You may send 2 messages per hour: try again in 60 minutes"
    assert 3590 < seconds <= 3600


def test_concurrent_sends_never_exceed_a_limit():
    app = create_app(SEND_RATE_LIMIT=parse_many("7 per minute; 20 per hour"))
    assert run_concurrently(30, lambda number: send(app)).count(True) == 7


# The log


def test_failed_login_logs_the_address_and_the_id_of_the_user_or_a_keyed_hash_of_an_unknown_username(caplog):
    apps = [create_app(), create_app(), create_app(SECRET_KEY="other" * 8)]
    log_in(apps[0], user=create_user())
    for app in apps:
        log_in(app, username="my secret")
    known, first, same, other = [record.getMessage() for record in caplog.records]
    assert known == "Failed login from 192.0.2.1: user 7"
    assert re.fullmatch("Failed login from 192.0.2.1: unknown username [0-9a-f]{16}", first)
    assert first == same != other
