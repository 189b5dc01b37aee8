"""Slow work in native threads, which leave gevent's event loop to other clients: hashing and long queries."""

import os
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from functools import cache
from threading import BoundedSemaphore, Lock
from weakref import WeakValueDictionary

from werkzeug.exceptions import ServiceUnavailable

try:
    from gevent import monkey
    from gevent.threadpool import ThreadPool
except ImportError:  # installed only where gunicorn runs
    monkey = None

HASHING_THREADS = os.cpu_count() or 1
MAX_LONG_QUERIES = 2  # of all users, at once in a process: each may read all messages of its user
MAX_WAIT = 10  # seconds that one waits for others
RETRY_AFTER = 5  # seconds

hashing_slots = BoundedSemaphore(HASHING_THREADS)
query_slots = BoundedSemaphore(MAX_LONG_QUERIES)
query_locks = WeakValueDictionary()  # by user


def run_in_threadpool(func, *args):
    """Call a function that hashes a password, and return its result. Raises ServiceUnavailable after MAX_WAIT."""
    with acquire(hashing_slots):
        return call_in_thread(func, *args)


def run_long_query(func, user_id, connect=None):
    """Call a function that reads many messages, one at a time for each user, and return its result.

    With `connect`, that is called before, and the function in a native thread. Raises what run_in_threadpool() does.
    """
    with acquire(query_locks.setdefault(user_id, Lock()), query_slots):
        if connect is None:
            return func()
        connect()
        return call_in_thread(func)


def call_in_thread(func, *args):
    """Call a function, under gevent in a native thread, and return its result."""
    if monkey is None or not monkey.is_module_patched("threading"):  # threads are threads
        return func(*args)
    result, error = get_threadpool(os.getpid()).apply(catch_error, (copy_context(), func, *args))
    if error:
        raise error
    return result


@contextmanager
def acquire(*locks):
    """Hold locks during the block. Raises ServiceUnavailable after MAX_WAIT for one of them."""
    with ExitStack() as stack:
        for lock in locks:
            if not lock.acquire(timeout=MAX_WAIT):
                raise ServiceUnavailable("The server is busy, try again later", retry_after=RETRY_AFTER)
            stack.callback(lock.release)
        yield


def catch_error(context, func, *args):
    """Return what a function returns, and the exception that it raises, which gevent would print."""
    try:
        return context.run(func, *args), None
    except Exception as error:
        return None, error


@cache
def get_threadpool(process_id):
    """Return the pool of a process: threads do not survive a fork. It is not the hub's, which looks up host names."""
    return ThreadPool(HASHING_THREADS + MAX_LONG_QUERIES)
