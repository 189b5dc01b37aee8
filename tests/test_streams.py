"""Replies piece by piece, and whole ones: what is sent, what is stored, whatever happens in between."""

import json
import re
import shutil
import sqlite3
import statistics
import threading
import time
from contextlib import ExitStack, closing, contextmanager, suppress
from http.client import HTTPException
from itertools import islice

import psycopg
import pytest

from app import db
from app.bot import BotError, BotTimeout
from app.models import Message
from tests.conftest import PASSWORD, SERVER_URL, newcomer
from tests.model_server import ModelServer, cut, running, stall
from tests.serving import PATIENCE, Answer, background, crowd, eventually, figure, pairs, timed
from tests.test_browsers import Pages, browsing
from tests.test_server import transactions

STREAM = {"Accept": "text/event-stream"}
SQLITE_ONLY = pytest.mark.parametrize("database", ["sqlite"], indirect=True)  # where the database has no part in it


def scripted(*steps):
    """Return a bot of these steps: pieces that it says, errors that it raises, functions that it calls."""

    def bot(history):
        for step in steps:
            if isinstance(step, Exception):
                raise step
            if callable(step):
                step()
            else:
                yield step

    return bot


def parsed(body):
    """Return a whole stream of events as (name, data), comments as ("", text)."""
    *blocks, rest = body.split("\n\n")
    assert rest == ""
    return [parsed_event(*block.split("\n")) for block in blocks]


def parsed_event(first, second=None):
    if second is None:
        assert first.startswith(": ")
        return "", first[2:]
    assert first.startswith("event: ")
    assert second.startswith("data: ")
    return first[7:], json.loads(second[6:])


def stream(person, talk, text="Hello", **headers):
    """Send a message and return the events of the reply."""
    response = person.send(talk, text, headers={**STREAM, **headers})
    assert response.status_code == 200
    return parsed(response.text)


def talk_of(person, talk):
    """Return the conversation's messages as (sender, text)."""
    response = person.get(f"/api/conversations/{talk}")
    return [(message["sender"], message["text"]) for message in response.json["messages"]]


def stored(app):
    """Return how many messages there are, whoever's."""
    with app.app_context():
        return db.session.scalar(db.select(db.func.count(Message.id)))


@pytest.fixture
def talk(ada):
    return ada.create()


@pytest.fixture
def speak():
    """What a bot waits for in the middle of its reply, until the test sets it."""
    speak = threading.Event()
    yield speak
    speak.set()


@pytest.fixture
def model():
    with running(ModelServer()) as model:
        yield model


def test_a_stream_is_the_pieces_then_the_stored_pair_to_the_letter(app, ada, talk):
    app.extensions["bot"] = scripted("One ", "“two”\n\n", "\r\u2028data: three")
    body = ada.send(talk, "Count", headers=STREAM).data
    messages = ada.get(f"/api/conversations/{talk}/messages").text
    pieces = (r'{"text":"One "}', r'{"text":"“two”\n\n"}', '{"text":"\\r\u2028data: three"}')
    deltas = "".join(f"event: delta\ndata: {piece}\n\n" for piece in pieces)
    assert body.decode() == f"{deltas}event: done\ndata: {messages.strip()}\n\n"
    assert talk_of(ada, talk) == [("user", "Count"), ("bot", "One “two”\n\n\r\u2028data: three")]


def test_a_stream_ends_with_the_same_objects_as_a_whole_answer(ada):
    talks = [ada.create(), ada.create()]
    whole = ada.send(talks[0]).json
    *deltas, (name, pair) = stream(ada, talks[1])
    assert name == "done"
    assert "".join(delta["text"] for _, delta in deltas) == pair[1]["text"]
    assert [(list(message), message["sender"], message["text"]) for message in pair] == [
        (list(message), message["sender"], message["text"]) for message in whole
    ]
    assert pair == ada.get("/api/conversations").json[1]["messages"]


def test_a_stream_is_neither_cached_nor_held_back(ada, talk):
    response = ada.send(talk, headers=STREAM)
    assert response.status_code == 200
    assert response.headers["Content-Type"].partition(";")[0] == "text/event-stream"
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["X-Accel-Buffering"] == "no"
    assert "Content-Length" not in response.headers
    assert response.text


@pytest.mark.parametrize(
    ("accept", "streams"),
    [
        (None, False),
        ("*/*", False),
        ("application/json", False),
        ("text/html", False),
        ("text/event-stream", True),
        ("Text/Event-Stream", True),
        ("text/*", True),
        ("application/json, text/event-stream", False),
        ("text/event-stream, application/json;q=0.9, */*;q=0.1", True),
        ("text/event-stream;q=0.5, application/json", False),
        ("text/event-stream;q=0", False),
        ("nonsense", False),
    ],
)
@SQLITE_ONLY
def test_who_prefers_events_gets_events_and_everybody_else_json(ada, talk, accept, streams):
    response = ada.send(talk, headers=accept and {"Accept": accept})
    assert response.mimetype == ("text/event-stream" if streams else "application/json")
    assert response.status_code == (200 if streams else 201)
    assert response.text


def test_a_comment_shows_that_a_silent_stream_is_alive(app, ada, talk, speak, monkeypatch):
    monkeypatch.setattr("app.routes.chat.PAUSE", 0.01)
    app.extensions["bot"] = scripted(speak.wait, "One ", "two")
    response = ada.send(talk, headers=STREAM)
    events = response.iter_encoded()
    assert list(islice(events, 3)) == [b": thinking\n\n"] * 3
    speak.set()
    told = [event for event in parsed(b"".join(events).decode()) if event[0]]
    assert [name for name, _ in told] == ["delta", "delta", "done"]
    assert talk_of(ada, talk)[1] == ("bot", "One two")


def test_a_failure_after_nothing_but_comments_is_an_event(app, ada, talk, speak, monkeypatch):
    monkeypatch.setattr("app.routes.chat.PAUSE", 0.01)
    app.extensions["bot"] = scripted(speak.wait, BotTimeout("silent"))
    response = ada.send(talk, headers=STREAM)
    speak.set()
    assert parsed(response.text)[-1] == ("error", {"error": "The bot took too long to answer"})
    assert stored(app) == 0


REFUSALS = {
    "a body that is no JSON": (400, {"data": "{", "content_type": "application/json"}),
    "no text": (400, {"json": {}}),
    "a body of another type": (415, {"data": "text=Hello", "content_type": "text/plain"}),
    "a bad key": (400, {"json": {"text": "Hello"}, "headers": {**STREAM, "Idempotency-Key": "a b"}}),
    "a bot that fails": (502, {"json": {"text": "/fail"}}),
}


@pytest.mark.parametrize("streams", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize(("status", "request_"), REFUSALS.values(), ids=REFUSALS)
def test_what_is_wrong_before_the_first_piece_is_a_status_and_json(app, ada, talk, status, request_, streams):
    request_ = {"headers": STREAM if streams else {}, **request_}
    response = ada.post(f"/api/conversations/{talk}/messages", **request_)
    assert (response.status_code, response.mimetype, list(response.json)) == (status, "application/json", ["error"])
    assert stored(app) == 0


@pytest.mark.parametrize("headers", [STREAM, {}], ids=["stream", "whole"])
def test_who_is_not_logged_in_or_not_the_owner_hears_nothing(app, client, bob, ada, talk, headers):
    assert client.send(talk, headers=headers).status_code == 401
    assert bob.send(talk, headers=headers).status_code == 404
    assert ada.send(talk + 1, headers=headers).json == {"error": "Conversation not found"}
    assert stored(app) == 0


@pytest.mark.parametrize("headers", [STREAM, {}], ids=["stream", "whole"])
@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (BotError("sk-secret"), 502, "The bot failed to answer"),
        (BotTimeout("sk-secret"), 504, "The bot took too long to answer"),
    ],
)
def test_a_send_to_a_bot_that_fails_at_once_can_be_repeated(app, ada, talk, headers, error, status, sentence, caplog):
    works, app.extensions["bot"] = app.extensions["bot"], scripted(error)
    response = ada.send(talk, headers=headers)
    assert (response.status_code, response.json) == (status, {"error": sentence})
    assert stored(app) == 0
    assert "The bot failed: sk-secret" in caplog.text  # the reason is for the log alone
    app.extensions["bot"] = works
    assert ada.send(talk).status_code == 201
    assert stored(app) == 2


@pytest.mark.parametrize(
    ("error", "sentence"),
    [(BotError("cut"), "The bot failed to answer"), (BotTimeout("stalled"), "The bot took too long to answer")],
)
def test_what_a_bot_said_before_it_broke_off_is_stored(app, ada, talk, error, sentence):
    app.extensions["bot"] = scripted("One ", "two", error)
    assert stream(ada, talk) == [
        ("delta", {"text": "One "}),
        ("delta", {"text": "two"}),
        ("error", {"error": sentence}),
    ]
    assert talk_of(ada, talk) == [("user", "Hello"), ("bot", "One two")]


def test_a_whole_answer_of_a_bot_that_breaks_off_is_refused_and_not_stored(app, ada, talk):
    assert ada.send(talk, "/drop 3").status_code == 502
    assert stored(app) == 0


@pytest.mark.parametrize("headers", [STREAM, {}], ids=["stream", "whole"])
def test_nothing_is_no_reply(app, ada, talk, headers):
    app.extensions["bot"] = scripted()
    response = ada.send(talk, headers=headers)
    assert (response.status_code, response.json) == (502, {"error": "The bot failed to answer"})
    assert stored(app) == 0


def test_blanks_are_no_reply(app, ada, talk):
    app.extensions["bot"] = scripted(" ", "\n")
    assert ada.send(talk).json == {"error": "The bot failed to answer"}
    assert stream(ada, talk)[-1] == ("error", {"error": "The bot failed to answer"})
    assert stored(app) == 0


def test_what_was_said_to_a_client_that_goes_away_is_stored(app, ada, talk, speak):
    app.extensions["bot"] = scripted("One ", "two ", speak.wait, "three")
    response = ada.send(talk, headers=STREAM)
    assert [parsed(event.decode()) for event in islice(response.iter_encoded(), 2)] == [
        [("delta", {"text": "One "})],
        [("delta", {"text": "two "})],
    ]
    response.close()
    assert talk_of(ada, talk) == [("user", "Hello"), ("bot", "One two ")]
    speak.set()
    assert stored(app) == 2


def test_a_client_that_goes_away_leaves_no_thread_behind(app, ada, talk, speak):
    threads = threading.active_count()
    app.extensions["bot"] = scripted("One ", speak.wait, *["word "] * 1000, speak.wait)
    for _ in range(5):
        with ada.send(talk, headers=STREAM) as response:
            assert next(response.iter_encoded())
    speak.set()
    eventually(lambda: threading.active_count() <= threads)
    assert stored(app) == 10


def delete_talk(person, talk):
    return person.delete(f"/api/conversations/{talk}")


def delete_account(person, talk):
    return person.delete("/api/account", json={"password": PASSWORD})


def log_out(person, talk):
    return person.logout()


@pytest.mark.parametrize("streams", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize(
    ("act", "status", "sentence"),
    [
        (log_out, 401, "Login required"),
        (delete_talk, 404, "Conversation not found"),
        (delete_account, 401, "Login required"),
    ],
)
def test_who_leaves_while_the_bot_thinks_is_told_and_nothing_is_stored(app, ada, talk, act, status, sentence, streams):
    elsewhere = app.test_client()
    elsewhere.login("ada")
    done = []
    app.extensions["bot"] = scripted("One ", lambda: done.append(act(elsewhere, talk).status_code), "two")
    if streams:
        assert stream(ada, talk)[-1] == ("error", {"error": sentence})
    else:
        response = ada.send(talk)
        assert (response.status_code, response.json) == (status, {"error": sentence})
    assert done in ([200], [204])
    assert stored(app) == 0


def test_a_client_that_logs_out_and_goes_away_leaves_nothing(app, ada, talk, speak):
    app.extensions["bot"] = scripted("One ", speak.wait)
    with ada.send(talk, headers=STREAM) as response:
        assert next(response.iter_encoded())
        assert ada.logout().status_code == 200
    assert stored(app) == 0


def test_the_new_message_stays_next_to_its_reply_however_many_are_sent_meanwhile(app, ada, talk, speak):
    works, app.extensions["bot"] = app.extensions["bot"], scripted("One ", speak.wait, "two")
    response = ada.send(talk, "Count", headers=STREAM)
    app.extensions["bot"] = works
    assert ada.send(talk, "Hello").status_code == 201
    speak.set()
    assert parsed(response.text)[-1][0] == "done"
    texts = [text for _, text in talk_of(ada, talk)]
    assert (texts[0], texts[2:]) == ("Hello", ["Count", "One two"])


@contextmanager
def away(database):
    """Keep everybody else from a database while the block lasts."""
    if database.startswith("sqlite"):
        with closing(sqlite3.connect(database.removeprefix("sqlite:///"), isolation_level=None)) as connection:
            connection.execute("BEGIN EXCLUSIVE")
            yield
    else:
        name = database.rpartition("/")[2]
        with psycopg.connect(SERVER_URL.replace("postgres://", "postgresql://"), autocommit=True) as connection:
            connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
            try:
                connection.execute(
                    """SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity
                       WHERE datname = %s AND usename = current_user""",
                    [name],
                )
                yield
            finally:
                connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")


def test_a_database_that_is_away_at_the_end_of_a_stream_is_an_event(make_app, database, speak):
    hasty = {"connect_args": {"isolation_level": "IMMEDIATE", "timeout": 0.1}} if "sqlite" in database else None
    app = make_app(**{"SQLALCHEMY_ENGINE_OPTIONS": hasty} if hasty else {})
    ada = newcomer(app, "ada")
    talk = ada.create()
    app.extensions["bot"] = scripted("One ", speak.wait, "two")
    response = ada.send(talk, headers=STREAM)
    with away(database):
        speak.set()
        *deltas, last = parsed(response.text)
    assert [delta["text"] for _, delta in deltas] == ["One ", "two"]
    assert last == ("error", {"error": "The database is unavailable, try again"})
    assert stored(app) == 0
    assert stream(ada, talk)[-1][0] == "done"


def test_no_connection_is_held_while_the_bot_thinks(app, ada, talk, speak):
    with app.app_context():
        pool = db.engine.pool
    held = []
    app.extensions["bot"] = scripted(lambda: held.append(pool.checkedout()), "One ", speak.wait, "two")
    response = ada.send(talk, headers=STREAM)
    events = response.iter_encoded()
    assert next(events)
    held.append(pool.checkedout())
    speak.set()
    assert ada.send(talk).status_code == 201
    assert list(events)
    assert held == [0] * 3
    assert pool.checkedout() == 0


def test_a_real_model_is_heard_piece_by_piece(make_app, model):
    ada = newcomer(make_app(**model.settings(BOT_PROMPT="Be kind.")), "ada")
    talk = ada.create()
    assert [message["text"] for message in ada.send(talk).json] == ["Hello", "Hello there."]
    *deltas, (name, pair) = stream(ada, talk, "Hello again")
    assert [delta["text"] for _, delta in deltas] == ["Hello", " there."]
    assert (name, pair[1]["text"]) == ("done", "Hello there.")
    assert [message["role"] for message in model.asked[-1]["messages"]] == ["system", "user", "assistant", "user"]


@SQLITE_ONLY
def test_a_real_model_that_fails_is_told_of_as_it_fails(make_app, model, caplog):
    app = make_app(BOT_TIMEOUT=1, **model.settings())
    ada = newcomer(app, "ada")
    talk = ada.create()
    model.script = [stall]
    assert ada.send(talk).status_code == 504
    assert ada.send(talk, headers=STREAM).status_code == 504
    model.script = [cut]
    assert ada.send(talk).status_code == 502
    assert ada.send(talk, headers=STREAM).status_code == 502
    assert stored(app) == 0
    model.script = ["Hello", cut]
    assert stream(ada, talk) == [("delta", {"text": "Hello"}), ("error", {"error": "The bot failed to answer"})]
    assert talk_of(ada, talk) == [("user", "Hello"), ("bot", "Hello")]


@SQLITE_ONLY
def test_the_key_of_a_model_is_in_no_answer_and_not_in_the_log(make_app, model, caplog):
    ada = newcomer(make_app(**model.settings()), "ada")
    talk = ada.create()
    model.status = 401  # it tells the key that it refuses
    answers = [ada.send(talk), ada.send(talk, headers=STREAM)]
    assert [answer.json for answer in answers] == [{"error": "The bot failed to answer"}] * 2
    assert caplog.text.count("The bot failed: ") == 2
    assert "sk-secret" not in caplog.text
    assert all("\n" not in record.getMessage() for record in caplog.records)


class Listener:
    """Somebody who sent a message to the program served for real and reads the events as they come."""

    def __init__(self, server, person, talk, text, **headers):
        self.client = server.spare_client(person)
        headers = {"Content-Type": "application/json", "Cookie": person.cookie, **STREAM, **headers}
        path = f"/api/conversations/{talk}/messages"
        self.asked = time.monotonic()
        self.client.connection.request("POST", path, json.dumps({"text": text}), headers)
        self.response = self.client.connection.getresponse()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.response.close()
        self.client.close()

    def __iter__(self):
        """Hand on the events until the end."""
        assert self.response.status == 200, Answer(self.response).body
        while line := self.response.readline():
            lines = [line.decode().rstrip("\n")]
            while more := self.response.readline().decode().rstrip("\n"):
                lines.append(more)
            yield parsed_event(*lines)


def test_a_client_that_hangs_up_keeps_what_it_read_and_leaves_nothing_behind(serve, model):
    model.script = [step for _ in range(600) for step in ("word ", lambda handler: time.sleep(0.1))]
    server = serve(**model.settings(), WEB_CONCURRENCY=1)
    with server.newcomer("ada") as ada:
        talk = ada.create()
        with Listener(server, ada, talk, "Hello") as listener:
            read = list(islice(listener, 5))
        seconds, saw = timed(model.saw_hang_up)
        assert saw
        figure("seconds until the model is hung up on", seconds)
        user, bot = eventually(lambda: ada.messages(talk))
        assert (user["text"], set(bot["text"].split())) == ("Hello", {"word"})
        assert bot["text"].startswith("".join(delta["text"] for _, delta in read))
        assert len(bot["text"].split()) < 300
        model.script = ["Hello", " there."]
        assert ada.send(talk, "Hello again").status == 201
        assert len(server.workers()) == 1
    assert "Traceback" not in server.output


@pytest.mark.slow
def test_sigterm_breaks_long_streams_off_in_time_and_stores_what_was_said(serve):
    shared = {"SECRET_KEY": "shared", "SESSIONS_VALID_FROM": "2026-01-01T00:00:00Z"}
    server = serve(**shared)
    with server.newcomer("ada") as ada:
        talks, opened = [ada.create() for _ in range(6)], []

        def listen(number):
            read = []
            text = "/slow 4" if number < 3 else "/slow 60"
            with Listener(server, ada, talks[number], text) as listener, suppress(OSError, HTTPException):
                for event in listener:
                    read.append(event)
                    opened.append(number)
            return read

        with background(lambda: crowd(len(talks), listen)) as [listening]:
            eventually(lambda: set(opened) == set(range(6)))
            seconds, status = timed(server.terminate)
        heard = listening.result()
        cookie = ada.cookie
    figure("seconds from SIGTERM to the end", seconds)
    assert status == 0
    assert seconds < 15
    server = serve(**shared)
    with server.client() as ada:
        ada.cookie = cookie
        for number, talk, read in zip(range(len(talks)), talks, heard, strict=True):
            user, bot = ada.messages(talk)
            words = "".join(data["text"] for name, data in read if name == "delta")
            assert words
            assert bot["text"].startswith(words)
            assert (read[-1] == ("done", [user, bot])) == (number < 3)
    assert "Traceback" not in server.output


READ = """
(async () => {
    const more = {method: "POST", credentials: "include"};
    const json = {"Content-Type": "application/json"};
    const ada = {username: "ada", password: "correct horse"};
    await call("signup", "POST", "/api/signup", ada);
    await call("login", "POST", "/api/login", ada);
    const {id} = await call("create", "POST", "/api/conversations", {name: "Talk"});
    const response = await fetch(`${API}/api/conversations/${id}/messages`, {
        ...more, headers: {...json, Accept: "text/event-stream"}, body: JSON.stringify({text: "/slow 3"}),
    });
    report.head = {status: response.status, type: response.headers.get("Content-Type")};
    report.parts = [];
    const reader = response.body.getReader(), decoder = new TextDecoder();
    for (let part; !(part = await reader.read()).done;)
        report.parts.push({at: performance.now(), text: decoder.decode(part.value, {stream: true})});
    await call("list", "GET", "/api/conversations");
    await tell();
})();
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
def test_a_page_in_chromium_reads_a_stream_piece_by_piece(serve, tmp_path):
    with running(Pages()) as pages:
        server = serve(CORS_ORIGINS=pages.origin)
        url = pages.add("read", f"http://localhost:{server.port}", READ)
        with browsing(url, tmp_path / "chromium"):
            report = pages.reports.get(timeout=2 * PATIENCE)
    assert report["head"]["status"] == 200
    assert report["head"]["type"].startswith("text/event-stream")
    *deltas, (name, pair) = parsed("".join(part["text"] for part in report["parts"]))
    assert deltas == [("delta", {"text": f"{number} "}) for number in (1, 2, 3)]
    assert (name, pair) == ("done", report["list"]["json"][0]["messages"])
    first, *_, last = [part["at"] for part in report["parts"]]
    assert last - first > 1000  # milliseconds: it did not come all at once


@pytest.mark.slow
def test_five_hundred_open_streams_are_all_right_and_slow_nobody_down(serve, database):
    server = serve()
    with ExitStack() as stack:
        bob, *people = [stack.enter_context(server.newcomer(f"user {number}")) for number in range(51)]
        talks, opened = [person.create() for person in people], []
        calls = {"test": "/api/test", "current_user": "/api/current_user"}

        def medians():
            times = {name: [] for name in calls}
            for _ in range(30):
                for name, path in calls.items():
                    seconds, answer = timed(bob.get, path)
                    assert answer.status == 200
                    times[name].append(seconds)
                time.sleep(0.05)
            return {name: statistics.median(values) for name, values in times.items()}

        def listen(number):
            with Listener(server, people[number % 50], talks[number % 50], "/slow 30") as listener:
                events = iter(listener)
                first = next(events)
                opened.append(time.monotonic() - listener.asked)
                return [first, *events]

        with Listener(server, bob, bob.create(), "Hello") as listener:
            assert next(iter(listener))[0] == "delta"
            figure("ms to the first piece of a bot that does not hesitate", (time.monotonic() - listener.asked) * 1000)
        before = medians()
        with background(lambda: crowd(500, listen)) as [listening]:
            eventually(lambda: len(opened) == 500 or listening.done())
            held = transactions(database)
            meanwhile = medians()
            assert not listening.done()
        assert held == []
        assert re.findall(r".* ERROR .*", server.output) == []
        figure("seconds to the first piece, due after 1: median", statistics.median(opened))
        figure("seconds to the first piece, due after 1: most", max(opened))
        for events in listening.result():
            assert events[:-1] == [("delta", {"text": f"{number} "}) for number in range(1, 31)]
            assert events[-1][0] == "done"
        for person, talk in zip(people, talks, strict=True):
            assert pairs(person.messages(talk)) == ["/slow 30"] * 10
    for name in calls:
        figure(f"{name}: median ms before", before[name] * 1000)
        figure(f"{name}: median ms meanwhile", meanwhile[name] * 1000)
        assert meanwhile[name] < 5 * before[name] + 0.1
    assert "Traceback" not in server.output
