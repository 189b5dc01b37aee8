"""The program under gevent, whose patches of Python's modules need a process of their own."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack

from sqlalchemy.engine import make_url

from tests.conftest import CHEAP_HASH, on_sqlite
from tests.helpers.model_server import SILENCES, ModelServer, running
from tests.helpers.server import ROOT, TIMEOUT

PATCHES = """
from gevent import monkey
monkey.patch_all()
"""
APP = f"""
import os
import threading
import gevent
from flask import Flask
from werkzeug.exceptions import ServiceUnavailable
from werkzeug.security import generate_password_hash
from app import threads
from app.security import hash_password, verify_password
from app.threads import run_in_threadpool, run_long_query

app = Flask("security")
app.config["PASSWORD_HASH_METHOD"] = {CHEAP_HASH!r}
app.app_context().push()
lock = monkey.get_original("_thread", "allocate_lock")()
lock.acquire()
started = []

def block():
    started.append(True)
    with lock:
        pass
"""


def run_gevent(script, *arguments, **environ):
    """Run a script after PATCHES in a process of its own, without a proxy; return the completed process."""
    command = [sys.executable, "-c", PATCHES + script, *arguments]
    environ = {**os.environ, "NO_PROXY": "*", "no_proxy": "*", **environ}
    process = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=2 * TIMEOUT)
    assert process.returncode == 0, process.stderr
    return process


def run_in_app(script):
    """Run a script after APP, which must not print errors; return the lines that it prints."""
    process = run_gevent(APP + script)
    assert process.stderr == ""
    return process.stdout.splitlines()


# Hashing and long queries


def test_hashing_does_not_stop_the_event_loop():
    lines = run_in_app("""
switches = []

def count():
    while True:
        switches.append(True)
        gevent.sleep(0.001)

app.config["PASSWORD_HASH_METHOD"] = "pbkdf2:sha256:300000"
password_hash = generate_password_hash("word", "pbkdf2:sha256:300000")
gevent.spawn(count)
for call, *arguments in ((hash_password,), (verify_password, password_hash), (verify_password, None)):
    switches.clear()
    print(bool(call(*arguments, "word")), len(switches) > 10)
""")
    assert lines == ["True True", "True True", "False True"]


def test_run_in_threadpool_leaves_the_threads_of_name_lookups_alone_and_refuses_who_waits_too_long():
    assert run_in_app("""
threads.MAX_WAIT = 1

def call():
    try:
        return run_in_threadpool(block) or "called"
    except ServiceUnavailable as error:
        return f"{error.code} {error.description} {error.retry_after}"

calls = [gevent.spawn(call) for _ in range(20 * os.cpu_count())]
gevent.sleep(0.2)
print(gevent.get_hub().threadpool.apply(str, ("found",)), any(call.ready() for call in calls))
print({call.get() for call in calls[os.cpu_count():]})
lock.release()
print({call.get() for call in calls[:os.cpu_count()]})
""") == ["found False", "{'503 The server is busy, try again later 5'}", "{'called'}"]


def test_call_in_a_thread_raises_the_error_without_a_traceback():
    assert run_in_app("""
for call in (lambda: run_in_threadpool(lambda: 1 / 0), lambda: run_long_query(lambda: 1 / 0, 1, connect=list)):
    try:
        call()
    except ZeroDivisionError:
        print("raised")
""") == ["raised", "raised"]


# Locks of SQLite

WAIT_IN_A_GREENLET = """
import json, sqlite3, sys
from gevent import sleep, spawn
from app import create_app

app = create_app()
with sqlite3.connect(sys.argv[1], isolation_level=None) as other:
    other.execute("BEGIN IMMEDIATE")
    body = {"username": "ada", "password": "correct horse"}
    writer = spawn(app.test_client().post, "/api/signup", json=body)
    reads = []
    for _ in range(20):
        reads.append(app.test_client().get("/api/users/status").status_code)
        sleep(0.02)
    is_waiting = not writer.ready()
    other.execute("COMMIT")
    writer.join(60)
print(json.dumps([reads, is_waiting, writer.value.status_code]))
"""


@on_sqlite
def test_waiting_for_another_program_lets_other_greenlets_run(database):
    process = run_gevent(WAIT_IN_A_GREENLET, make_url(database).database, DATABASE_URL=database)
    assert json.loads(process.stdout) == [[200] * 20, True, 201]


# Replies of a model

ASK_IN_GREENLETS = """
import json, sys
import gevent
from app.bot import create_bot
from tests.helpers.bots import collect

def ask(config):
    reply = create_bot(config)([("user", "Hello")])
    reader = gevent.spawn(collect, reply)
    if config["CANCEL"]:
        while not reply.sock:
            gevent.sleep(0.01)
        gevent.sleep(0.3)  # until the request is sent
        reply.cancel()
    text, error = reader.get(timeout=60)
    return text, error and type(error).__name__

replies = [gevent.spawn(ask, config) for config in json.loads(sys.argv[1])]
print(json.dumps([reply.get() for reply in replies]))
"""
CASES = {  # script, settings, error
    "complete": (["word "] * 1000, {}, None),
    "cancelled before the head": (SILENCES["before the head"], {"CANCEL": True}, None),
    "cancelled after text": (SILENCES["after text"], {"CANCEL": True}, None),
    "dripping head": (SILENCES["dripping head"], {"BOT_TIMEOUT": 1}, "BotTimeout"),
    "empty chunks": (SILENCES["empty chunks"], {"BOT_TIMEOUT": 1}, "BotTimeout"),
}


def test_replies_with_gevent_end_as_with_threads():
    scripts, settings, errors = zip(*CASES.values(), strict=True)
    defaults = {"BOT_MODEL": "tiny", "OPENAI_API_KEY": "", "BOT_OPTIONS": {}, "BOT_SYSTEM_PROMPT": ""}
    defaults |= {"BOT_HISTORY_CHARS": 1000, "BOT_TIMEOUT": TIMEOUT, "CANCEL": False}
    with ExitStack() as stack:
        models = [stack.enter_context(running(ModelServer())) for _ in CASES]
        for model, script in zip(models, scripts, strict=True):
            model.script = script
        configs = [
            {**defaults, "OPENAI_BASE_URL": model.url, **own} for model, own in zip(models, settings, strict=True)
        ]
        results = json.loads(run_gevent(ASK_IN_GREENLETS, json.dumps(configs)).stdout)
        assert dict(zip(CASES, (error for _, error in results), strict=True)) == dict(zip(CASES, errors, strict=True))
        assert results[0][0] == "word " * 1000
        assert all(model.wait_for_hang_up() for model in models[1:])
