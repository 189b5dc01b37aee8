"""Slow work in native threads, which leave gevent's event loop to other clients: hashing and long queries."""

import os
import sys
import threading
from contextlib import ExitStack, suppress
from contextvars import copy_context
from functools import cache
from weakref import WeakValueDictionary

from werkzeug.exceptions import ServiceUnavailable

try:
    from gevent import monkey
    from gevent.threadpool import ThreadPool
except ImportError:  # installed only where gunicorn runs
    monkey = None

THREADS = os.cpu_count() or 1
# A hash of the default cost takes about half a second, so the last in the queue waits for about five.
MAX_QUEUED_PER_THREAD = 10
QUEUE_RETRY_AFTER = 5  # seconds
NICENESS = 10  # The event loop takes precedence: a slow event loop delays all clients, a slow hash delays one.
MAX_LONG_QUERIES = 2  # A process runs at most 2 searches and 2 lists at once: each may read all messages of its user.
LONG_QUERY_WAIT = 10  # A query waits 10 s for others of the same user, and then another 10 s for those of other users.

long_query_slots = {purpose: threading.BoundedSemaphore(MAX_LONG_QUERIES) for purpose in ("search", "list")}
long_query_locks = WeakValueDictionary()  # by user and purpose
hash_slots = threading.BoundedSemaphore(THREADS * (1 + MAX_QUEUED_PER_THREAD))


def run_in_threadpool(func, *args):
    """Call a function that hashes a password, and return its result. Abort with 503 if too many calls are waiting.

    Under gevent, the function runs in a native thread, because it would block the event loop.
    """
    if not is_gevent_used():
        return func(*args)
    if not hash_slots.acquire(blocking=False):
        raise ServiceUnavailable("The server is busy, try again later", retry_after=QUEUE_RETRY_AFTER)
    try:
        return get_threadpool(os.getpid(), "hashing").apply(call_with_low_priority, (func, *args))
    finally:
        hash_slots.release()


def run_long_query(func, user_id, purpose, in_thread):
    """Call a function that reads many messages, one at a time for each user, and return its result.

    `purpose`: "search" or "list". With `in_thread` it runs in a native thread under gevent. Abort with 503 after
    LONG_QUERY_WAIT for the user's others, or as long for those of other users.
    """
    with ExitStack() as stack:
        user_lock = long_query_locks.setdefault((user_id, purpose), threading.Lock())
        for lock in (user_lock, long_query_slots[purpose]):
            if not lock.acquire(timeout=LONG_QUERY_WAIT):
                raise ServiceUnavailable("The server is busy, try again later", retry_after=QUEUE_RETRY_AFTER)
            stack.callback(lock.release)
        if not (in_thread and is_gevent_used()):
            return func()
        threadpool = get_threadpool(os.getpid(), purpose)
        result, error = threadpool.apply(call_with_low_priority, (catch_error, copy_context().run, func))
    if error:
        raise error
    return result


def catch_error(func, *args):
    """Return what a function returns, and the exception that it raises, which gevent would print."""
    try:
        return func(*args), None
    except Exception as error:
        return None, error


def is_gevent_used():
    """Return whether threads are gevent's greenlets."""
    return monkey is not None and monkey.is_module_patched("threading")


def call_with_low_priority(func, *args):
    """Call a function in a thread that leaves the processor to others; only on Linux threads have priorities."""
    if sys.platform == "linux":
        niceness = min(os.getpriority(os.PRIO_PROCESS, os.getpid()) + NICENESS, 19)
        with suppress(PermissionError):  # the priority of the process has risen since
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
    return func(*args)


@cache
def get_threadpool(process_id, purpose):
    """Return the pool of a process for hashing, searches or lists: threads do not survive a fork.

    It is not the hub's own, which looks up host names: these must not wait for hashes.
    """
    return ThreadPool(THREADS)
