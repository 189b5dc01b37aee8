"""Password hashing and rate limits."""

import re
import time
from types import SimpleNamespace

import pytest
from flask import Flask
from limits import parse, parse_many
from werkzeug.exceptions import ServiceUnavailable, TooManyRequests
from werkzeug.security import generate_password_hash

from app.security import (
    authenticate,
    client_address,
    hash_password,
    log_failed_login,
    needs_rehash,
    rate_limiter,
    record_send,
    verify_password,
)
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
    app.config.update(
        SECRET_KEY="k" * 32,
        PASSWORD_HASH_METHOD=METHOD,
        LOGIN_RATE_LIMIT=parse("3 per minute"),
        RATE_LIMIT_STORAGE="memory://",
    )
    app.config.update(settings)
    rate_limiter.init_app(app)
    return app


def request_from(app, address=ADDRESS):
    """Return the context of a request from an address."""
    return app.test_request_context(environ_base={"REMOTE_ADDR": address})


def create_user(password="right"):
    return SimpleNamespace(id=7, password_hash=generate_password_hash(password, METHOD))


def log_in(app, username="ada", user=None, password="wrong", address=ADDRESS):
    """Return whether a login succeeds, or 429."""
    with request_from(app, address):
        try:
            return authenticate(username, user, password)
        except TooManyRequests as error:
            return error.code


@pytest.fixture
def app():
    return create_app()


# Passwords


def test_hash_password_uses_the_configured_method(app):
    with app.app_context():
        assert hash_password("word").startswith(f"{METHOD}$")
        assert hash_password("word") != hash_password("word")


@pytest.mark.parametrize(
    ("password", "expected"),
    [("wörd", True), ("wo\u0308rd", True), ("word", False), ("wörd ", False), ("", False)],
)
def test_verify_password_accepts_only_the_hashed_password(app, password, expected):
    with app.app_context():
        assert verify_password(hash_password("wörd"), password) is expected


def test_verify_password_without_user_hashes_anyway():
    app = create_app(PASSWORD_HASH_METHOD="unknown")
    with app.app_context(), pytest.raises(ValueError, match="unknown"):
        verify_password(None, "word")


def test_verify_password_without_user_returns_false(app):
    with app.app_context():
        assert verify_password(None, "word") is False


@pytest.mark.parametrize("password_hash", UNREADABLE_HASHES)
def test_verify_password_with_unreadable_hash_returns_false(app, password_hash):
    with app.app_context():
        assert verify_password(password_hash, "word") is False


@pytest.mark.parametrize(
    ("method", "hashed", "expected"),
    [
        *(
            (METHOD, "w\u00f6rd", False),
            ("pbkdf2:sha256:2", "w\u00f6rd", True),
            ("pbkdf2:sha256:10", "w\u00f6rd", True),
        ),
        *(("scrypt:1024:8:1", "wörd", True), (METHOD, "wo\u0308rd", True)),
    ],
)
def test_needs_rehash_after_method_or_cost_changed_or_without_nfkc(app, method, hashed, expected):
    with app.app_context():
        assert needs_rehash(generate_password_hash(hashed, method), "wo\u0308rd") is expected


# Searches


def count_concurrent_searches(user_ids):
    """Search once for each user id, all at once; return the most searches that ran at the same time."""
    running, most = [], []

    def search():
        running.append(True)
        most.append(len(running))
        time.sleep(0.05)
        running.pop()

    run_concurrently(len(user_ids), lambda number: run_long_query(search, user_ids[number]))
    return max(most)


@pytest.mark.parametrize(("user_ids", "most"), [([1] * 4, 1), ([1, 2, 3, 4, 5], MAX_LONG_QUERIES)])
def test_run_long_query_lets_searches_take_turns(user_ids, most):
    assert count_concurrent_searches(user_ids) == most


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
        ("192.0.2.1", "192.0.2.1"),
        ("192.0.2.1:50000", "192.0.2.1"),
        ("2001:db8::1", "2001:db8::/64"),
        ("2001:DB8:0:0:ffff::2", "2001:db8::/64"),
        ("2001:db8:0:1::1", "2001:db8:0:1::/64"),
        ("[2001:db8::1]", "2001:db8::/64"),
        ("[2001:db8::1]:443", "2001:db8::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("[::ffff:c000:201]:443", "192.0.2.1"),
        ("unix:", "unix:"),
        ("[", "["),
        ("192.0.2.256", "192.0.2.256"),
        ("unknown", "unknown"),
        ("", ""),
        (None, ""),
    ],
)
def test_client_address_is_normalised(app, remote_addr, expected):
    with request_from(app, remote_addr):
        assert client_address() == expected


# Rate limits


def test_check_and_record_with_used_up_limit_abort_with_429(app):
    limit = parse("2 per minute")
    with request_from(app):
        rate_limiter.record(limit, "key")
        rate_limiter.check(limit, "key")
        rate_limiter.record(limit, "key")
        for call in (rate_limiter.check, rate_limiter.record):
            with pytest.raises(TooManyRequests, match="Too many attempts, try again later") as caught:
                call(limit, "key")
            assert 1 <= caught.value.retry_after <= 60


def test_record_after_retry_after_is_accepted(app):
    limit = parse("1 per second")
    with request_from(app):
        rate_limiter.record(limit, "key")
        with pytest.raises(TooManyRequests) as caught:
            rate_limiter.record(limit, "key")
        time.sleep(caught.value.retry_after)
        rate_limiter.record(limit, "key")


def test_record_counts_each_key_apart(app):
    limit = parse("1 per minute")
    with request_from(app):
        rate_limiter.record(limit, "a", "b")
        rate_limiter.record(limit, "a", "c")
        rate_limiter.record(limit, "b", "b")


def test_record_counts_each_app_apart(app):
    limit = parse("1 per minute")
    for each in (app, create_app()):
        with request_from(each):
            rate_limiter.record(limit, "key")


def test_concurrent_records_never_exceed_the_limit(app):
    def record(number):
        with request_from(app):
            try:
                rate_limiter.record(parse("7 per minute"), "key")
                return True
            except TooManyRequests:
                return False

    assert sum(run_concurrently(30, record)) == 7


# Logins


def test_authenticate_returns_whether_the_password_is_right(app):
    user = create_user()
    assert log_in(app, user=user, password="right") is True
    assert log_in(app, user=user, password="wrong") is False
    assert log_in(app, user=None, password="right") is False


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


def test_record_send_without_limits_refuses_nothing():
    app = create_app(SEND_RATE_LIMIT=[])
    assert all(send(app) is True for _ in range(100))


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


def test_record_send_that_is_refused_counts_for_no_limit():
    app = create_app(SEND_RATE_LIMIT=parse_many("1 per second; 3 per hour"))
    for _ in range(3):
        assert send(app) is True
        message, seconds = send(app)
        time.sleep(1.05)
    assert message.startswith("You may send 3 messages per hour: try again in 60 minutes")
    assert 3590 < seconds <= 3600


def test_concurrent_sends_never_exceed_a_limit():
    app = create_app(SEND_RATE_LIMIT=parse_many("7 per minute; 20 per hour"))
    assert run_concurrently(30, lambda number: send(app)).count(True) == 7


# The log


def test_failed_login_of_a_user_logs_address_and_id(app, caplog):
    assert log_in(app, username="ada", user=create_user()) is False
    [record] = caplog.records
    assert (record.levelname, record.getMessage()) == ("WARNING", "Failed login from 192.0.2.1: user 7")


def test_successful_login_logs_nothing(app, caplog):
    assert log_in(app, user=create_user(), password="right") is True
    assert caplog.records == []


def test_failed_login_with_unknown_username_logs_a_keyed_hash(caplog):
    apps = [create_app(), create_app(), create_app(SECRET_KEY="other" * 8)]
    for app in apps:
        with request_from(app):
            log_failed_login("my secret", None)
    first, same, other = [record.getMessage() for record in caplog.records]
    assert re.fullmatch("Failed login from 192.0.2.1: unknown username [0-9a-f]{16}", first)
    assert first == same != other
