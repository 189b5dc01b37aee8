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
MAX_LONG_QUERIES = 2  # A process runs at most 2 searches and 2 lists at once: each may read all messages of its user.
MAX_WAIT = 10  # seconds for a turn
RETRY_AFTER = 5  # seconds
NICENESS = 10  # The event loop takes precedence: a slow event loop delays all clients, a slow hash delays one.

slots = {purpose: threading.BoundedSemaphore(MAX_LONG_QUERIES) for purpose in ("search", "list")}
slots["hash"] = threading.BoundedSemaphore(THREADS)
user_locks = WeakValueDictionary()  # by user and purpose


def run_in_threadpool(func, *args):
    """Return what a function returns that hashes a password. Abort with 503 if it has no turn within MAX_WAIT.

    Under gevent, the function runs in a native thread, because it would block the event loop.
    """
    with wait_for([slots["hash"]] if is_gevent_used() else []):
        return call_in_thread("hash", func, *args)


def run_long_query(func, user_id, purpose, in_thread):
    """Return what a function returns that reads many messages, one at a time for each user.

    `purpose`: "search" or "list". With `in_thread` it runs in a native thread under gevent. Abort with 503 after
    MAX_WAIT for the user's others, or as long for those of other users.
    """
    user_lock = user_locks.setdefault((user_id, purpose), threading.Lock())
    with wait_for([user_lock, slots[purpose]]):
        return call_in_thread(purpose, func) if in_thread else func()


def wait_for(locks):
    """Return a context manager that holds locks; abort with 503 if one is not to be had within MAX_WAIT."""
    with ExitStack() as stack:
        for lock in locks:
            if not lock.acquire(timeout=MAX_WAIT):
                raise ServiceUnavailable("The server is busy, try again later", retry_after=RETRY_AFTER)
            stack.callback(lock.release)
        return stack.pop_all()


def is_gevent_used():
    """Return whether threads are gevent's greenlets."""
    return monkey is not None and monkey.is_module_patched("threading")


def call_in_thread(purpose, func, *args):
    """Return what a function returns, under gevent from a native thread."""
    if not is_gevent_used():
        return func(*args)
    result, error = get_threadpool(os.getpid(), purpose).apply(copy_context().run, (catch_error, func, *args))
    if error:
        raise error
    return result


def catch_error(func, *args):
    """Return what a function returns, and the exception that it raises, which gevent would print.

    The thread leaves the processor to others; only on Linux threads have priorities.
    """
    if sys.platform == "linux":
        niceness = min(os.getpriority(os.PRIO_PROCESS, os.getpid()) + NICENESS, 19)
        with suppress(PermissionError):  # the priority of the process has risen since
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
    try:
        return func(*args), None
    except Exception as error:
        return None, error


@cache
def get_threadpool(process_id, purpose):
    """Return the pool of a process for hashing, searches or lists: threads do not survive a fork.

    It is not the hub's own, which looks up host names: these must not wait for hashes.
    """
    return ThreadPool(THREADS)
