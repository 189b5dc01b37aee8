"""A page in Chromium, of another origin, that sends messages with fetch and follows replies with EventSource."""

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.conftest import CHEAP_HASH
from tests.helpers.model_server import running
from tests.helpers.server import COOKIE_NAME, TIMEOUT, Server

SCRIPT = """
const API = `http://localhost:${location.hash.slice(1)}`;
const json = {"Content-Type": "application/json"};

async function call(method, path, body, headers = {}) {
    const init = {method, credentials: "include", headers: {...json, ...headers}};
    const response = await fetch(API + path, {...init, body: body && JSON.stringify(body)});
    return {
        status: response.status,
        applied: response.headers.get("Preference-Applied"),
        replayed: response.headers.get("Idempotent-Replayed"),
        json: await response.json(),
    };
}

// Send a message and read the stream until it has so many words; leave the rest unread.
async function sendAndRead(path, text, words) {
    const init = {method: "POST", credentials: "include", headers: {...json, Accept: "text/event-stream"}};
    const response = await fetch(API + path, {...init, body: JSON.stringify({text})});
    const reader = response.body.getReader(), decoder = new TextDecoder();
    let received = "";
    while ((received.match(/event: delta/g) ?? []).length < words) {
        const {done, value} = await reader.read();
        if (done) break;
        received += decoder.decode(value, {stream: true});
    }
    return received;
}

// Follow a reply until the server tells the browser not to connect again.
function follow(path) {
    const source = new EventSource(API + path, {withCredentials: true});
    const result = {text: "", starts: [], dones: [], errors: [], connections: 0};
    window.source = source;
    window.result = result;
    source.onopen = () => result.connections++;
    source.addEventListener("start", event => result.starts.push(JSON.parse(event.data)));
    source.addEventListener("delta", event => result.text += JSON.parse(event.data).text);
    source.addEventListener("done", event => result.dones.push(JSON.parse(event.data)));
    source.addEventListener("error", event => {
        if (event.data) result.errors.push(JSON.parse(event.data));
    });
}
"""


class PageHandler(BaseHTTPRequestHandler):
    """Sends the page."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(f"<!DOCTYPE html><title>Chat</title><script>{SCRIPT}</script>".encode())

    def log_message(self, *args):
        """Log nothing."""


class ChatPage:
    """A page of another origin with the session of ada, and the conversation that it shows."""

    def __init__(self, context, origin, server):
        with server.client() as ada:
            ada.signup("ada")
            assert ada.login("ada").status == 200
            self.conversation_id = ada.create_conversation()
            value = ada.cookie.removeprefix(f"{COOKIE_NAME}=")
        self.path = f"/api/conversations/{self.conversation_id}/messages"
        context.add_cookies([{"name": COOKIE_NAME, "value": value, "url": f"http://localhost:{server.port}"}])
        self.page = context.new_page()
        self.page.set_default_timeout(TIMEOUT * 1000)
        self.errors = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(f"{origin}/#{server.port}")

    def call(self, method, path, body=None, **headers):
        """Make a request with fetch; return its status, JSON and some headers."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.page.evaluate("request => call(...request)", [method, path, body, headers])

    def list_messages(self):
        return self.call("GET", self.path)["json"]

    def follow(self, message_id):
        """Begin to follow a reply with EventSource."""
        self.page.evaluate("follow", f"{self.path}/{message_id}/events")

    def wait_for_word(self, word):
        self.page.wait_for_function("word => result.text.includes(word)", arg=f"{word} ")

    def wait_for_end(self):
        """Return what EventSource received until it stopped connecting."""
        self.page.wait_for_function("source.readyState === EventSource.CLOSED")
        return self.page.evaluate("result")


@pytest.fixture(scope="module")
def origin():
    """The origin of the page."""
    with running(ThreadingHTTPServer(("127.0.0.1", 0), PageHandler)) as page_server:
        yield f"http://localhost:{page_server.server_port}"


@pytest.fixture(scope="module")
def server(tmp_path_factory, origin):
    database = tmp_path_factory.mktemp("event_source") / "chat.db"
    server = Server(DATABASE_URL=f"sqlite:///{database}", PASSWORD_HASH_METHOD=CHEAP_HASH, CORS_ORIGINS=origin)
    yield server
    server.kill()
    assert "Traceback" not in server.output


@pytest.fixture
def chat(browser, origin, server):
    context = browser.new_context()
    chat = ChatPage(context, origin, server)
    yield chat
    context.close()
    assert chat.errors == []


def test_page_reloaded_in_mid_answer_follows_it_to_the_end(chat):
    received = chat.page.evaluate("path => sendAndRead(path, '/slow 6', 2)", chat.path)
    assert received.startswith("event: start\n")
    chat.page.reload()
    question, reply = chat.list_messages()
    assert (question["text"], reply["status"]) == ("/slow 6", "in_progress")
    assert reply["text"].startswith("1 ")
    chat.follow(reply["id"])
    result = chat.wait_for_end()
    assert result["text"] == "1 2 3 4 5 6 "
    assert [[message["id"] for message in exchange] for exchange in result["starts"]] == [[question["id"], reply["id"]]]
    assert result["dones"] == [chat.list_messages()]
    assert "status" not in result["dones"][0][1]
    assert result["errors"] == []
    assert result["connections"] == 1  # the second one got 204


def test_page_stops_reply_that_it_follows(chat):
    sent = chat.call("POST", chat.path, {"text": "/slow 60"}, Prefer="respond-async")
    assert (sent["status"], sent["applied"]) == (202, "respond-async")
    reply = sent["json"][1]
    chat.follow(reply["id"])
    chat.wait_for_word("2")
    stopped = chat.call("POST", f"{chat.path}/{reply['id']}/stop")
    assert (stopped["status"], stopped["json"]["status"]) == (200, "stopped")
    result = chat.wait_for_end()
    assert result["text"].startswith(stopped["json"]["text"])  # another process knows what was saved a second ago
    assert result["dones"] == [[sent["json"][0], stopped["json"]]]
    assert chat.list_messages()[1] == stopped["json"]


def test_page_edits_message(chat):
    question, reply = chat.call("POST", chat.path, {"text": "Hello"})["json"]
    started = chat.call("PUT", f"{chat.path}/{question['id']}", {"text": "/slow 3"}, Prefer="respond-async")["json"]
    assert chat.list_messages()[0] == started[0]
    chat.follow(started[1]["id"])
    result = chat.wait_for_end()
    assert (result["text"], result["dones"]) == ("1 2 3 ", [chat.list_messages()])
    versions = chat.call("GET", f"{chat.path}/{question['id']}/versions")["json"]
    assert versions == [question, started[0]]
    path = f"{chat.path.removesuffix('/messages')}/current"
    assert chat.call("PUT", path, {"message_id": question["id"]})["json"]["messages"] == [question, reply]
    assert chat.list_messages() == [question, reply]


@pytest.mark.parametrize(("text", "status", "words"), [("/drop 3", 201, "1 2 3 "), ("/fail", 502, "")])
def test_page_reads_why_reply_failed(chat, text, status, words):
    sent = chat.call("POST", chat.path, {"text": text})
    question, reply = chat.list_messages()
    assert (sent["status"], question["text"]) == (status, text)
    assert (reply["text"], reply["error"]) == (words, "The bot failed to answer")
    chat.follow(reply["id"])
    result = chat.wait_for_end()
    assert (result["text"], result["dones"]) == (words, [])
    assert result["errors"] == [{"error": "The bot failed to answer"}]
