"""A page in Chromium, of another origin, that sends messages with fetch and follows replies with EventSource."""

from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.helpers.model_server import running
from tests.helpers.server import TIMEOUT, find_listed_port

PAGE = """<!DOCTYPE html><title>Chat</title><script>
const API = `http://localhost:${location.hash.slice(1)}`;
const json = {"Content-Type": "application/json"};

async function call(method, path, body, headers = {}) {
    const init = {method, credentials: "include", headers: {...json, ...headers}};
    const response = await fetch(API + path, {...init, body: body && JSON.stringify(body)});
    return [response.status, await response.json(), response.headers.get("Preference-Applied")];
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
    const source = window.source = new EventSource(API + path, {withCredentials: true});
    const result = window.result = {text: "", starts: [], dones: [], errors: [], connections: 0};
    source.onopen = () => result.connections++;
    source.addEventListener("start", event => result.starts.push(JSON.parse(event.data)));
    source.addEventListener("delta", event => result.text += JSON.parse(event.data).text);
    source.addEventListener("done", event => result.dones.push(JSON.parse(event.data)));
    source.addEventListener("error", event => {
        if (event.data) result.errors.push(JSON.parse(event.data));
    });
}
</script>"""


class ChatPage:
    """A page of another origin with the session of ada, and the conversation that it shows."""

    def __init__(self, context, origin, server):
        with server.client() as ada:
            ada.signup("ada")
            assert ada.login("ada").status == 200
            self.path = f"/api/conversations/{ada.create_conversation()}/messages"
        name, _, value = ada.cookie.partition("=")
        context.add_cookies([{"name": name, "value": value, "url": f"http://localhost:{server.port}"}])
        self.page = context.new_page()
        self.page.set_default_timeout(TIMEOUT * 1000)
        self.errors = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(f"{origin}/#{server.port}")

    def call(self, method, path, body=None, **headers):
        """Make a request with fetch; return its status, its JSON and the preference that was applied."""
        return self.page.evaluate("request => call(...request)", [method, path, body, headers])

    def list_messages(self):
        return self.call("GET", self.path)[1]

    def follow(self, message_id):
        """Begin to follow a reply with EventSource."""
        self.page.evaluate("follow", f"{self.path}/{message_id}/events")

    def wait_for_end(self):
        """Return what EventSource received until it stopped connecting."""
        self.page.wait_for_function("source.readyState === EventSource.CLOSED")
        return self.page.evaluate("result")


@pytest.fixture
def origin(tmp_path):
    """The origin of the page, which CORS_ORIGINS lists by default."""
    (tmp_path / "index.html").write_text(PAGE)
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with running(ThreadingHTTPServer(("127.0.0.1", find_listed_port()), handler)) as page_server:
        yield f"http://localhost:{page_server.server_port}"


@pytest.fixture
def chat(browser, origin, server):
    context = browser.new_context()
    chat = ChatPage(context, origin, server)
    yield chat
    context.close()
    assert chat.errors == []
    assert "Traceback" not in server.output


def test_page_reloaded_in_mid_answer_follows_it_to_the_end(chat):
    received = chat.page.evaluate("path => sendAndRead(path, '/slow 6', 2)", chat.path)
    assert received.startswith("event: start\n")
    chat.page.reload()
    question, reply = chat.list_messages()
    assert (question["text"], reply["status"], reply["text"][:2]) == ("/slow 6", "in_progress", "1 ")
    chat.follow(reply["id"])
    result = chat.wait_for_end()
    assert result == {
        "text": "1 2 3 4 5 6 ",
        "starts": [[question, {**reply, "text": ""}]],
        "dones": [chat.list_messages()],
        "errors": [],
        "connections": 1,  # the second one got 204
    }
    assert "status" not in result["dones"][0][1]


def test_page_stops_reply_that_it_follows(chat):
    status, (question, reply), applied = chat.call("POST", chat.path, {"text": "/slow 60"}, Prefer="respond-async")
    assert (status, applied) == (202, "respond-async")
    chat.follow(reply["id"])
    chat.page.wait_for_function("result.text.includes('2 ')")
    status, stopped, _ = chat.call("POST", f"{chat.path}/{reply['id']}/stop")
    assert (status, stopped["status"]) == (200, "stopped")
    result = chat.wait_for_end()
    assert result["text"].startswith(stopped["text"])  # another process knows what was saved a second ago
    assert result["dones"] == [[question, stopped]] == [chat.list_messages()]


@pytest.mark.parametrize(("text", "status", "words"), [("/drop 3", 201, "1 2 3 "), ("/fail", 502, "")])
def test_page_reads_why_reply_failed(chat, text, status, words):
    assert chat.call("POST", chat.path, {"text": text})[0] == status
    _, reply = chat.list_messages()
    assert (reply["text"], reply["error"]) == (words, "The bot failed to answer")
    chat.follow(reply["id"])
    result = chat.wait_for_end()
    assert (result["text"], result["dones"], result["errors"]) == (words, [], [{"error": reply["error"]}])
