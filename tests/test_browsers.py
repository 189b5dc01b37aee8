"""Pages of this and of other origins, in real Chromium, against the program served for real."""

import json
import os
import queue
import re
import shutil
import signal
import subprocess
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.serving import PATIENCE, figure, timed

NEEDS_CHROMIUM = pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
pytestmark = [pytest.mark.slow, NEEDS_CHROMIUM]
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]

SCRIPT = """
const report = {};

async function call(name, method, path, body, more = {}) {
    const init = {method, credentials: "include", ...more};
    if (body !== undefined) {
        init.headers = {"Content-Type": "application/json"};
        init.body = JSON.stringify(body);
    }
    try {
        const response = await fetch(API + path, init);
        const text = await response.text();
        report[name] = {
            status: response.status,
            type: response.type,
            json: text ? JSON.parse(text) : null,
            id: response.headers.get("X-Request-ID"),
            retry: response.headers.get("Retry-After"),
        };
    } catch (error) {
        report[name] = {rejected: `${error}`};
    }
    return report[name].json;
}

async function tell(next) {
    await fetch("/report", {method: "POST", body: JSON.stringify(report)});
    if (next) location.href = next;
}
"""

USE = """
(async () => {
    const ada = {username: "ada", password: "correct horse"};
    await call("signup", "POST", "/api/signup", ada);
    await call("signup again", "POST", "/api/signup", ada);
    await call("nobody", "GET", "/api/current_user");
    await call("wrong password", "POST", "/api/login", {...ada, password: "wrong"});
    for (const guess of ["first guess", "second guess", "third guess"])
        await call(guess, "POST", "/api/login", {...ada, username: "bob"});
    await call("login", "POST", "/api/login", ada);
    await call("current user", "GET", "/api/current_user");
    const {id} = await call("create", "POST", "/api/conversations", {name: "Talk"});
    await call("rename", "PUT", `/api/conversations/${id}`, {name: "Walk"});
    await call("send", "POST", `/api/conversations/${id}/messages`, {text: "Hello"});
    await call("list", "GET", "/api/conversations");
    await call("send nothing", "POST", `/api/conversations/${id}/messages`, {});
    await call("wrong method", "PATCH", "/api/conversations", {});
    await call("delete", "DELETE", `/api/conversations/${id}`);
    await call("delete again", "DELETE", `/api/conversations/${id}`);
    await call("log another out", "POST", "/api/logout/99");
    await call("status", "GET", "/api/users/status");
    await call("logout", "POST", "/api/logout/1");
    await call("nobody again", "GET", "/api/current_user");
    await tell();
})();
"""

LOG_IN = """
(async () => {
    const ada = {username: "ada", password: "correct horse"};
    await call("signup", "POST", "/api/signup", ada);
    await call("login", "POST", "/api/login", ada);
    await call("create", "POST", "/api/conversations", {name: "Secret"});
    await tell(NEXT);
})();
"""

ATTACK = """
function load(element, source) {
    return new Promise(done => {
        element.onload = () => done("loaded");
        element.onerror = () => done("failed");
        element.src = source;
        document.body.append(element);
    });
}

function post(path, fields, enctype) {
    return new Promise(done => {
        const frame = document.createElement("iframe");
        frame.name = `frame${document.forms.length}`;
        document.body.append(frame);
        const form = document.createElement("form");
        Object.assign(form, {method: "post", action: API + path, target: frame.name, enctype});
        for (const [name, value] of Object.entries(fields))
            form.append(Object.assign(document.createElement("input"), {name, value}));
        document.body.append(form);
        frame.onload = () => {
            let seen = "nothing";
            try { seen = frame.contentWindow.document.body.innerText; } catch (error) {}
            done(seen);
        };
        form.submit();
    });
}

(async () => {
    const plain = {mode: "no-cors", headers: {"Content-Type": "text/plain"}};
    const blind = body => ({...plain, body: JSON.stringify(body)});
    await call("read", "GET", "/api/conversations");
    await call("read status", "GET", "/api/users/status");
    await call("create", "POST", "/api/conversations", {name: "Forged"});
    await call("rename", "PUT", "/api/conversations/1", {name: "Forged"});
    await call("delete", "DELETE", "/api/conversations/1");
    await call("send", "POST", "/api/conversations/1/messages", {text: "Forged"});
    await call("logout", "POST", "/api/logout/1");
    await call("blind read", "GET", "/api/conversations", undefined, plain);
    await call("blind create", "POST", "/api/conversations", undefined, blind({"name": "Forged"}));
    await call("blind signup", "POST", "/api/signup", undefined, blind({"username": "x", "password": "x"}));
    await call("blind send", "POST", "/api/conversations/1/messages", undefined, blind({"text": "Forged"}));
    await call("blind logout", "POST", "/api/logout/1", undefined, plain);
    await call("beacon", "POST", "/api/logout/1", undefined, {mode: "no-cors", keepalive: true});
    report.script = await load(document.createElement("script"), API + "/api/conversations");
    report.image = await load(new Image(), API + "/api/conversations");
    report.form = await post("/api/logout/1", {}, "application/x-www-form-urlencoded");
    report.json = await post("/api/conversations", {'{"name": "Forged", "x': '": ""}'}, "text/plain");
    report.upload = await post("/api/conversations", {name: "Forged"}, "multipart/form-data");
    await tell(NEXT);
})();
"""

LOOK = """
(async () => {
    await call("current user", "GET", "/api/current_user");
    await call("list", "GET", "/api/conversations");
    await call("status", "GET", "/api/users/status");
    await tell();
})();
"""


class Pages(ThreadingHTTPServer):
    """Serves pages, each a script, by name; `reports` is what they post to /report."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), PageHandler)
        self.scripts = {}
        self.reports = queue.Queue()

    @property
    def origin(self):
        return f"http://localhost:{self.server_port}"

    def add(self, name, api, script, following=None):
        constants = f"const API = {json.dumps(api)}, NEXT = {json.dumps(following)};"
        self.scripts[f"/{name}"] = f"<!doctype html><body><script>{constants}{SCRIPT}{script}</script>"
        return f"{self.origin}/{name}"


class PageHandler(BaseHTTPRequestHandler):
    def do_GET(self):
        script = self.server.scripts.get(self.path)
        self.answer(404 if script is None else 200, (script or "").encode())

    def do_POST(self):
        self.server.reports.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.answer(204, b"")

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def serve_pages():
    """A function that starts a server of pages at an origin of its own."""
    servers = []

    def start():
        servers.append(Pages())
        threading.Thread(target=servers[-1].serve_forever, args=(0.05,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@contextmanager
def browsing(url, folder):
    """Show a page in Chromium, which reaches no other machine, while the block lasts."""
    nowhere = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1"
    command = ["chromium", *FLAGS, f"--user-data-dir={folder}", nowhere]
    process = subprocess.Popen(
        [*command, url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_page_of_an_allowed_origin_does_everything(serve, serve_pages, tmp_path):
    pages = serve_pages()
    server = serve(CORS_ORIGINS=pages.origin, LOGIN_RATE_LIMIT="2 per minute")
    url = pages.add("use", f"http://localhost:{server.port}", USE)
    with browsing(url, tmp_path / "chromium"):
        seconds, report = timed(pages.reports.get, timeout=2 * PATIENCE)
    figure("seconds until the report", seconds)

    assert {name: answer.get("status", answer) for name, answer in report.items()} == {
        **{"signup": 201, "signup again": 400, "nobody": 401, "wrong password": 401},
        **{"first guess": 401, "second guess": 401, "third guess": 429},
        **{"login": 200, "current user": 200, "create": 201, "rename": 200, "send": 201, "list": 200},
        **{"send nothing": 400, "wrong method": 405, "delete": 204, "delete again": 404, "log another out": 403},
        **{"status": 200, "logout": 200, "nobody again": 401},
    }
    for name, answer in report.items():
        assert answer["type"] == "cors"
        assert answer["id"]
        if answer["status"] >= 400:
            assert list(answer["json"]) == ["error"], name
    assert report["signup again"]["json"] == {"error": "Username already exists"}
    assert int(report["third guess"]["retry"]) > 0
    assert report["current user"]["json"]["user"]["username"] == "ada"
    assert [message["sender"] for message in report["send"]["json"]] == ["user", "bot"]
    [talk] = report["list"]["json"]
    assert (talk["name"], len(talk["messages"])) == ("Walk", 2)
    assert report["delete"]["json"] is None
    assert report["status"]["json"]["users"][0]["status"] == "Online"
    assert "OPTIONS /api/conversations" in server.output  # the preflights were real


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_page_of_another_origin_can_neither_read_nor_act(serve, serve_pages, tmp_path, host):
    pages, foreign_pages = serve_pages(), serve_pages()
    server = serve(CORS_ORIGINS=pages.origin)
    api = f"http://localhost:{server.port}"
    look = pages.add("look", api, LOOK)
    foreign_pages.add("attack", api, ATTACK, look)
    url = pages.add("log-in", api, LOG_IN, f"http://{host}:{foreign_pages.server_port}/attack")
    with browsing(url, tmp_path / "chromium"):
        before = pages.reports.get(timeout=2 * PATIENCE)
        attack = foreign_pages.reports.get(timeout=2 * PATIENCE)
        after = pages.reports.get(timeout=2 * PATIENCE)

    assert [before[name]["status"] for name in ("signup", "login", "create")] == [201, 200, 201]
    for name in ("read", "read status", "create", "rename", "delete", "send", "logout"):
        assert "Failed to fetch" in attack[name]["rejected"], name
    for name, answer in attack.items():
        if name.startswith("blind") or name == "beacon":
            # Opaque, whatever it was; the browser may refuse to hand even that on.
            assert "rejected" in answer or (answer["type"], answer["json"]) == ("opaque", None), name
    assert attack["image"] == "failed"
    assert "Secret" not in json.dumps(attack)

    # The browser did send the session along from the other port, so it was the server that refused.
    user = "1" if host == "localhost" else "-"
    assert f"user={user}" in server.wait_for(r"GET /api/conversations (200|401) .* user=(\S+)").string
    forged = [line for line in server.lines if re.search("INFO (POST|PUT|DELETE) .* 403 ", line)]
    assert len(forged) >= 9
    assert after["current user"]["status"] == 200
    assert [(talk["name"], talk["messages"]) for talk in after["list"]["json"]] == [("Secret", [])]
    assert [(user["username"], user["status"]) for user in after["status"]["json"]["users"]] == [("ada", "Online")]
