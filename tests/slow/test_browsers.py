"""Pages of allowed and foreign origins in Chromium."""

from contextlib import ExitStack
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.conftest import on_sqlite
from tests.helpers.model_server import running
from tests.helpers.server import TIMEOUT
from tests.slow.conftest import run_server

SCRIPT = """
async function call(method, path, body, options) {
    const init = {method, credentials: "include", ...options};
    if (body !== null) {
        init.headers ??= {"Content-Type": "application/json"};
        init.body = JSON.stringify(body);
    }
    try {
        const response = await fetch(API + path, init);
        const text = await response.text();
        return {
            status: response.status,
            type: response.type,
            json: text ? JSON.parse(text) : null,
            id: response.headers.get("X-Request-ID"),
            retryAfter: response.headers.get("Retry-After"),
        };
    } catch (error) {
        return {rejected: `${error}`};
    }
}
"""
PAGE_WITHOUT_REFERRER = """<!doctype html><meta name="referrer" content="no-referrer">
<form method="post" action="/api/conversations/1/messages/99/stop"><button>Stop</button></form>"""
WRITES = [
    ("POST", "/api/conversations", {"name": "Forged"}),
    ("POST", "/api/signup", {"username": "forged", "password": "forged"}),
    ("POST", "/api/conversations/1/messages", {"text": "Forged"}),
    ("POST", "/api/logout/1", None),
]
CALLS = [
    ("GET", "/api/conversations", None),
    ("PUT", "/api/conversations/1", {"name": "Forged"}),
    ("DELETE", "/api/conversations/1", None),
    *WRITES,
]


@pytest.fixture(scope="module")
def serve_page(tmp_path_factory):
    """A function that serves an empty page on a port of its own and returns the port."""
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path_factory.mktemp("page"))
    with ExitStack() as stack:
        yield lambda: stack.enter_context(running(ThreadingHTTPServer(("127.0.0.1", 0), handler))).server_port


class Page:
    """A page that calls the API at localhost; pages of one context share its cookies."""

    def __init__(self, context, url, server):
        self.server = server
        self.page = context.new_page()
        self.page.set_default_timeout(TIMEOUT * 1000)
        self.page.goto(url)
        self.page.add_script_tag(content=f"const API = 'http://localhost:{server.port}';{SCRIPT}")

    def call(self, method, path, body=None, options=None):
        """Make a request with fetch and return its status, JSON and some headers, or {"rejected": reason}."""
        return self.page.evaluate("request => call(...request)", [method, path, body, options or {}])


@pytest.fixture(scope="module")
def context(browser):
    return browser.new_context()


@on_sqlite
def test_page_of_an_allowed_origin_uses_the_api(serve, serve_page, context):
    origin = f"http://localhost:{serve_page()}"
    server = serve(CORS_ORIGINS=origin, LOGIN_RATE_LIMIT="2 per minute")
    page = Page(context, origin, server)
    ada, bob = ({"username": username, "password": "correct horse"} for username in ("ada", "bob"))
    calls = [
        ("POST", "/api/signup", ada, 201),
        ("POST", "/api/signup", ada, 400),
        ("GET", "/api/current_user", None, 401),
        ("POST", "/api/login", {**ada, "password": "wrong"}, 401),
        *[("POST", "/api/login", bob, status) for status in (401, 401, 429)],
        ("POST", "/api/login", ada, 200),
        ("GET", "/api/current_user", None, 200),
        ("POST", "/api/conversations", {"name": "Conversation"}, 201),
        ("PUT", "/api/conversations/1", {"name": "Renamed"}, 200),
        ("PATCH", "/api/conversations/1", {"name": "Renamed"}, 200),
        ("POST", "/api/conversations/1/messages", {"text": "Hello"}, 201),
        ("GET", "/api/conversations", None, 200),
        ("POST", "/api/conversations/1/messages", {}, 400),
        ("PATCH", "/api/conversations", {}, 405),
        ("DELETE", "/api/conversations/1", None, 204),
        ("DELETE", "/api/conversations/1", None, 404),
        ("POST", "/api/logout/99", None, 403),
        ("POST", "/api/logout/1", None, 200),
        ("GET", "/api/current_user", None, 401),
    ]
    for method, path, body, status in calls:
        response = page.call(method, path, body)
        assert (response.get("status"), response.get("type")) == (status, "cors"), (method, path, response)
        assert response["id"]
        if status >= 400:
            assert list(response["json"]) == ["error"]
        if status == 429:
            assert int(response["retryAfter"]) > 0
    server.wait_for("OPTIONS /api/conversations")  # the preflights were real


@pytest.fixture(scope="module")
def ada_page(serve_page, context, tmp_path_factory):
    """A page of an allowed origin that has logged in and created a conversation."""
    origin, database = f"http://localhost:{serve_page()}", tmp_path_factory.mktemp("browsers") / "chat.db"
    with run_server(f"sqlite:///{database}", CORS_ORIGINS=origin) as server:
        page = Page(context, origin, server)
        ada = {"username": "ada", "password": "correct horse"}
        for path, body in (("signup", ada), ("login", ada), ("conversations", {"name": "Secret"})):
            assert page.call("POST", f"/api/{path}", body)["status"] < 300
        yield page


@pytest.fixture(params=["localhost", "127.0.0.1"])
def foreign_page(request, ada_page, serve_page, context):
    """A page of an origin that is not allowed, in the browser that has the session.

    Another port of localhost is the same site, so that the browser sends the session cookie. After the test, nothing
    may have changed.
    """
    yield Page(context, f"http://{request.param}:{serve_page()}", ada_page.server)
    [conversation] = ada_page.call("GET", "/api/conversations")["json"]
    assert (conversation["name"], conversation["messages"]) == ("Secret", [])
    [user] = ada_page.call("GET", "/api/users/status")["json"]["users"]
    assert (user["username"], user["status"]) == ("ada", "Online")


def test_fetch_by_a_page_of_a_foreign_origin_is_rejected(foreign_page):
    for method, path, body in CALLS:
        assert "Failed to fetch" in foreign_page.call(method, path, body).get("rejected", ""), path


def test_opaque_fetch_by_a_page_of_a_foreign_origin_reads_and_changes_nothing(foreign_page):
    for method, path, body in [CALLS[0], *WRITES]:  # those need no preflight
        for options in ({}, {"keepalive": True}, {"referrerPolicy": "no-referrer"}):
            options = {"mode": "no-cors", "headers": {"Content-Type": "text/plain"}, **options}
            response = foreign_page.call(method, path, body, options)
            assert "rejected" in response or (response["type"], response["json"]) == ("opaque", None), path
    for method, path, _ in WRITES:  # the browser did send them: it was the server that refused them
        foreign_page.server.wait_for(f"{method} {path} 403")


@pytest.mark.parametrize(
    ("path", "field", "enctype"),
    [
        ("/api/logout/1", "", "application/x-www-form-urlencoded"),
        ("/api/conversations", """name='{"name": "Forged", "x' value='": ""}'""", "text/plain"),
        ("/api/conversations", "name='name' value='Forged'", "multipart/form-data"),
    ],
)
def test_form_of_a_page_of_a_foreign_origin_changes_nothing(foreign_page, path, field, enctype):
    action = f"http://localhost:{foreign_page.server.port}{path}"
    form = f"<form method='post' action='{action}' enctype='{enctype}'><input {field}></form>"
    with foreign_page.page.expect_response(action) as response:
        foreign_page.page.evaluate("form => { document.body.innerHTML = form; document.forms[0].submit(); }", form)
    assert response.value.status == 403


def test_page_of_its_own_origin_that_sends_no_referrer_uses_the_api(ada_page, context):
    page = context.new_page()
    page.route("**/page", lambda route: route.fulfill(body=PAGE_WITHOUT_REFERRER, content_type="text/html"))
    page.goto(f"http://localhost:{ada_page.server.port}/page")
    with page.expect_response("**/stop") as response:
        page.click("button")
    assert response.value.request.all_headers()["origin"] == "null"
    assert (response.value.status, response.value.json()) == (404, {"error": "Message not found"})
