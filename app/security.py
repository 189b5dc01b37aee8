"""Password hashing, rate limits, and the authentication that is subject to both."""

import hmac
import ipaddress
import math
import re
import time
import unicodedata
from functools import cached_property

from flask import current_app, request
from limits.storage import MemoryStorage, storage_from_string
from limits.strategies import MovingWindowRateLimiter
from werkzeug.exceptions import TooManyRequests
from werkzeug.local import LocalProxy
from werkzeug.security import check_password_hash, generate_password_hash

from app.threads import run_in_threadpool

STORAGE_TIMEOUT = 1  # seconds
STORAGE_RETRY_INTERVAL = 5  # seconds
STORAGE_LOG_INTERVAL = 60  # seconds
STORAGE_UNAVAILABLE = "RATE_LIMIT_STORAGE is unavailable (%s): each process counts for itself"
TOO_MANY_ATTEMPTS = "Too many attempts, try again later"
TIME_UNITS = {"day": 86400, "hour": 3600, "minute": 60, "second": 1}


def init_app(app):
    """Set up the rate limits of an application."""
    app.extensions["rate_limiter"] = RateLimiter(app.config["RATE_LIMIT_STORAGE"])


def hash_password(password):
    """Return a hash of a password in NFKC to store: keyboards differ in how they compose accented characters."""
    method = current_app.config["PASSWORD_HASH_METHOD"]
    return run_in_threadpool(generate_password_hash, unicodedata.normalize("NFKC", password), method)


def verify_password(password_hash, password):
    """Return whether a password matches a stored hash: in NFKC, or as it was typed (older hashes are of that).

    For an unknown user (None), hash anyway, so that timing does not reveal it.
    """
    for spelling in dict.fromkeys([unicodedata.normalize("NFKC", password), password]):
        if password_hash is None:
            hash_password(spelling)
        elif run_in_threadpool(matches_hash, password_hash, spelling):
            return True
    return False


def matches_hash(password_hash, password):
    """Return whether a password matches a stored hash; an unreadable hash matches nothing."""
    try:
        return check_password_hash(password_hash, password)
    except (ValueError, TypeError, OverflowError):
        return False


def needs_rehash(password_hash, password):
    """Return whether the hash of a password is of another method or cost than PASSWORD_HASH_METHOD, or not of NFKC."""
    if password_hash.partition("$")[0] != current_app.config["PASSWORD_HASH_METHOD"]:
        return True
    normalized = unicodedata.normalize("NFKC", password)
    return normalized != password and not run_in_threadpool(matches_hash, password_hash, normalized)


def authenticate(username, user, password):
    """Return whether a password is that of a user (None if unknown); abort with 429 after too many attempts.

    LOGIN_RATE_LIMIT limits an address's failures for a username; ten times that, all its attempts.
    """
    failures = current_app.config["LOGIN_RATE_LIMIT"]
    attempts = type(failures)(failures.amount * 10, failures.multiples)
    address = client_address()
    rate_limiter.check(failures, "failed login", address, username)
    rate_limiter.record(attempts, "login", address)
    if verify_password(user and user.password_hash, password):
        # Concurrent guesses may have used up the limit: then this one must not learn that it was right.
        rate_limiter.check(failures, "failed login", address, username)
        return True
    log_failed_login(username, user)
    rate_limiter.record(failures, "failed login", address, username)
    return False


def log_failed_login(username, user):
    """Log the client's address and the user's id, or a hash of an unknown name: people type passwords there."""
    if user:
        name = f"user {user.id}"
    else:
        key = current_app.config["SECRET_KEY"].encode()
        name = f"unknown username {hmac.digest(key, username.encode(), 'sha256').hex()[:16]}"
    current_app.logger.warning("Failed login from %s: %s", client_address(), name)


def client_address():
    """Return the client's address without a port; for IPv6 its /64 network, which one client may use as a whole."""
    address = request.remote_addr or ""
    with_port = re.fullmatch(r"\[(.*)\](?::\d+)?|([\d.]+):\d+", address)  # as some proxies write it
    try:
        ip = ipaddress.ip_address(with_port[1] or with_port[2] if with_port else address)
    except ValueError:
        return address
    if ip.version == 4:
        return str(ip)
    return str(ip.ipv4_mapped or ipaddress.IPv6Network((int(ip), 64), strict=False))


def record_send(user_id):
    """Count a reply that a user begins; abort with 429 if a limit of SEND_RATE_LIMIT is used up.

    All limits are tested before one is counted. If concurrent sends use one up in between, the last step refuses what
    exceeds it; such a refusal may count for a longer limit.
    """
    limits = sorted(current_app.config["SEND_RATE_LIMIT"], key=lambda limit: limit.get_expiry(), reverse=True)
    for call in (rate_limiter.check, rate_limiter.record):
        for limit in limits:
            period = f"{limit.multiples} {limit.GRANULARITY.name}s" if limit.multiples > 1 else limit.GRANULARITY.name
            messages = "1 message" if limit.amount == 1 else f"{limit.amount} messages"
            call(limit, "send", str(user_id), message=f"You may send {messages} per {period}: {{retry}}")


def format_retry(seconds):
    """Return when to try again: in days, hours, minutes or seconds, rounded up, whichever gives at least two."""
    unit, length = next(item for item in TIME_UNITS.items() if seconds >= 2 * item[1] or item[1] == 1)
    count = math.ceil(seconds / length)
    return f"try again in {count} {unit}{'s' if count > 1 else ''}"


class RateLimiter:
    """Limits how often something is done. It counts in a storage, or in this process while the storage fails."""

    def __init__(self, url):
        self.url = url
        self.retry_at = 0  # by time.monotonic(); 0 while the storage works
        self.log_at = 0

    def check(self, limit, *key, message=TOO_MANY_ATTEMPTS):
        """Abort with 429 if the limit is used up; in the message, `{retry}` stands for when to try again."""
        self.abort_unless(MovingWindowRateLimiter.test, limit, key, message)

    def record(self, limit, *key, message=TOO_MANY_ATTEMPTS):
        """Count an attempt, or abort with 429 as check() does."""
        self.abort_unless(MovingWindowRateLimiter.hit, limit, key, message)

    def abort_unless(self, is_allowed, limit, key, message):
        """Abort with 429 unless a method of MovingWindowRateLimiter returns True for the limit."""
        if not self.call(is_allowed, limit, *key):
            reset_time = self.call(MovingWindowRateLimiter.get_window_stats, limit, *key).reset_time
            seconds = max(1, math.ceil(reset_time - time.time()))
            raise TooManyRequests(message.format(retry=format_retry(seconds)), retry_after=seconds)

    @cached_property
    def local(self):
        """The limiter that counts in this process. It starts a thread, which would not survive gunicorn's fork."""
        return MovingWindowRateLimiter(MemoryStorage())

    @cached_property
    def shared(self):
        """The limiter that counts in the storage. Redis fails after a second, without retrying."""
        if self.url.startswith("memory:"):
            return self.local
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        options = dict.fromkeys(("socket_connect_timeout", "socket_timeout"), STORAGE_TIMEOUT)
        options["retry"] = Retry(NoBackoff(), 0)
        sentinel_options = {"sentinel_kwargs": options} if self.url.startswith("redis+sentinel:") else {}
        storage = storage_from_string(self.url, wrap_exceptions=True, **options, **sentinel_options)
        return MovingWindowRateLimiter(storage)

    def call(self, method, limit, *key):
        """Call a method of MovingWindowRateLimiter on the limiter that counts at present."""
        now = time.monotonic()
        if now < self.retry_at:
            return method(self.local, limit, *key)
        if self.retry_at:
            self.retry_at = now + STORAGE_RETRY_INTERVAL  # other calls do not wait for this one
        try:
            result = method(self.shared, limit, *key)
            self.retry_at = 0
            return result
        except Exception as error:  # not StorageError alone: a cluster's client raises its own kinds, too
            self.retry_at = time.monotonic() + STORAGE_RETRY_INTERVAL
            if now >= self.log_at:
                self.log_at = now + STORAGE_LOG_INTERVAL
                current_app.logger.warning(STORAGE_UNAVAILABLE, type(error.__cause__ or error).__name__)
            return method(self.local, limit, *key)


rate_limiter = LocalProxy(lambda: current_app.extensions["rate_limiter"])
