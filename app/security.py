"""Password hashing and rate limits."""

import hmac
import ipaddress
import math
import re
import time
from functools import cached_property

from flask import current_app, request
from limits.storage import MemoryStorage, storage_from_string
from limits.strategies import MovingWindowRateLimiter
from werkzeug.exceptions import TooManyRequests
from werkzeug.security import check_password_hash, generate_password_hash

from app.threads import hash_in_thread

STORAGE_TIMEOUT = 1  # seconds
STORAGE_RETRY_INTERVAL = 5  # seconds
STORAGE_LOG_INTERVAL = 60  # seconds


def hash_password(password):
    """Return a hash of a password to store."""
    return hash_in_thread(generate_password_hash, password, current_app.config["PASSWORD_HASH_METHOD"])


def verify_password(password_hash, password):
    """Return whether a password matches a stored hash.

    For an unknown user (None), hash anyway, so that timing does not reveal it.
    """
    if password_hash is None:
        hash_password(password)
        return False
    return hash_in_thread(matches_hash, password_hash, password)


def matches_hash(password_hash, password):
    """Return whether a password matches a stored hash; an unreadable hash matches nothing."""
    try:
        return check_password_hash(password_hash, password)
    except (ValueError, TypeError, OverflowError):
        return False


def needs_rehash(password_hash):
    """Return whether a hash was made by another method or cost than PASSWORD_HASH_METHOD."""
    return password_hash.partition("$")[0] != current_app.config["PASSWORD_HASH_METHOD"]


def client_address():
    """Return the client's address without a port; for IPv6 its /64 network, which one client may use as a whole."""
    address = request.remote_addr or ""
    if address.startswith("["):
        host = address[1:].partition("]")[0]
    else:
        host = address.partition(":")[0] if address.count(":") == 1 else address
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return address
    if ip.version == 4:
        return str(ip)
    return str(ip.ipv4_mapped or ipaddress.IPv6Network((int(ip), 64), strict=False))


class RateLimiter:
    """An extension that limits how often something is done. Each app counts in its own RATE_LIMIT_STORAGE."""

    def init_app(self, app):
        """Set up the counting of an app."""
        app.extensions["rate_limiter"] = FallbackLimiter(app.config["RATE_LIMIT_STORAGE"])

    def check(self, limit, *key):
        """Abort with 429 if the limit is used up."""
        self._enforce(MovingWindowRateLimiter.test, limit, *key)

    def record(self, limit, *key):
        """Count an attempt, or abort with 429 if the limit is used up."""
        self._enforce(MovingWindowRateLimiter.hit, limit, *key)

    def _enforce(self, method, limit, *key):
        limiter = current_app.extensions["rate_limiter"]
        if not limiter.call(method, limit, *key):
            reset_time = limiter.call(MovingWindowRateLimiter.get_window_stats, limit, *key).reset_time
            wait = math.ceil(reset_time - time.time())
            raise TooManyRequests("Too many attempts, try again later", retry_after=max(1, wait))


rate_limiter = RateLimiter()


class FallbackLimiter:
    """A limiter that counts in a storage, or in this process while the storage fails."""

    def __init__(self, url):
        self.url = url
        self.shared = None  # until the first call
        self.retry_at = None  # by time.monotonic(); None while the storage works
        self.logged_at = -math.inf

    @cached_property
    def local(self):
        """The limiter that counts in this process. It starts a thread, which would not survive gunicorn's fork."""
        return MovingWindowRateLimiter(MemoryStorage())

    def call(self, method, limit, *key):
        """Call a method of MovingWindowRateLimiter on the limiter that counts at present."""
        if self.retry_at and time.monotonic() < self.retry_at:
            return method(self.local, limit, *key)
        try:
            if self.retry_at:
                self.postpone_retry()  # other calls do not wait for this one
            self.shared = self.shared or self.create_shared()
            result = method(self.shared, limit, *key)
            self.retry_at = None
            return result
        except Exception as error:  # not StorageError alone: a cluster's client raises its own kinds, too
            self.postpone_retry()
            self.log_failure(error.__cause__ or error)
            return method(self.local, limit, *key)

    def create_shared(self):
        """Return the limiter that counts in the storage."""
        return self.local if self.url.startswith("memory:") else create_limiter(self.url)

    def postpone_retry(self):
        """Count in this process for some seconds."""
        self.retry_at = time.monotonic() + STORAGE_RETRY_INTERVAL

    def log_failure(self, error):
        """Log that the storage failed, at most once a minute."""
        if time.monotonic() - self.logged_at >= STORAGE_LOG_INTERVAL:
            self.logged_at = time.monotonic()
            kind = type(error).__name__
            current_app.logger.warning("RATE_LIMIT_STORAGE is unavailable (%s): each process counts for itself", kind)


def create_limiter(url):
    """Return a limiter on a Redis server, Sentinel or cluster that fails after a second, without retrying."""
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    options = {
        "socket_connect_timeout": STORAGE_TIMEOUT,
        "socket_timeout": STORAGE_TIMEOUT,
        "retry": Retry(NoBackoff(), 0),
    }
    sentinel_options = {"sentinel_kwargs": options} if url.startswith("redis+sentinel:") else {}
    return MovingWindowRateLimiter(storage_from_string(url, wrap_exceptions=True, **options, **sentinel_options))


def verify_login(username, user, password):
    """Return whether a password is the user's (None if unknown), or abort with 429 after too many attempts.

    LOGIN_RATE_LIMIT limits an address's failures for a username; ten times that, all its attempts.
    """
    failures = current_app.config["LOGIN_RATE_LIMIT"]
    attempts = type(failures)(failures.amount * 10, failures.multiples)
    address = client_address()
    rate_limiter.check(failures, "failed login", address, username)
    rate_limiter.record(attempts, "login", address)
    if verify_password(user.password_hash if user else None, password):
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


COMMON_PASSWORD = re.compile(
    r"""(
        01234567 | 12345678 | 87654321 | 98765432 | 10203040 | 11223344 | 147258369 | 1q2w3e | 1q2w3e4r | 1q2w3e4r5t
        | 1qaz2wsx | 123qwe | 123qweasd | 123abc | a1b2c3 | a1b2c3d4 | q1w2e3r4 | qazwsx | qazwsxedc | zaq12wsx
        | qwer | qwert | qwerty | qwertyui | qwertyuiop | qwertz | qwertzui | azerty | azertyui | asdf | asdfgh
        | asdfghjk | asdfghjkl | zxcvbn | zxcvbnm | abc | abcd | abcde | abcdef | abcdefg | abcdefgh | admin
        | administrator | baseball | changeme | chocolate | computer | dragon | football | guest | hello | iloveyou
        | internet | letmein | login | master | monkey | p[a@4][s5$]{2} | p[a@4][s5$]{2}w[o0]r[dt] | princess
        | qwaszx | secret | starwars | summer | sunshine | superman | test | trustno | user | welcome | whatever
        | winter
    )[\d\W_]* | (?P<part>.{1,4})(?P=part)+""",
    re.IGNORECASE | re.VERBOSE,
)


def is_common_password(password):
    """Return whether a password is a common word followed by digits and punctuation, or one part repeated."""
    return COMMON_PASSWORD.fullmatch(password) is not None
