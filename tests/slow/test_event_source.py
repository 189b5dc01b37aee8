"""A page in Chromium, of another origin, that sends messages with fetch and follows replies with EventSource."""

from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.helpers.model_server import running
from tests.helpers.server import TIMEOUT, find_listed_port

PAGE = """<!DOCTYPE html><title>Chat</title><script>
const API = `http://localhost:${location.hash.slice(1)}`;
const json = {"Content-Type": "application/json"};

async function get(path) {
    return (await fetch(API + path, {credentials: "include"})).json();
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

    def list_messages(self):
        return self.page.evaluate("get", self.path)

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
