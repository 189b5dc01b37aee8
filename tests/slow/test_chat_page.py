"""Pages that use useChat of the AI SDK, and assistant-ui, behind the development server of Vite, in Chromium."""

import json
import re
import subprocess
from contextlib import ExitStack, contextmanager

import pytest

from tests.conftest import on_sqlite
from tests.helpers.model_server import ModelServer, running, stall
from tests.helpers.npm import install, needs_npm, run_npm
from tests.helpers.readme import get_block
from tests.helpers.server import TIMEOUT, find_listed_port, is_listening, wait_until

CONFIGURATION = get_block("js", "proxy")

LOSE_CONNECTION = """() => {
  const { fetch } = window;
  window.fetch = async (...request) => {
    window.fetch = fetch;
    let count = 0;
    const transform = (chunk, controller) =>
      ++count < 4 ? controller.enqueue(chunk) : controller.error(new TypeError("network error"));
    return new Response((await fetch(...request)).body.pipeThrough(new TransformStream({ transform })));
  };
}"""  # in the middle of the next response

pytestmark = needs_npm


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of tests/typescript/chat with its packages installed."""
    return install("chat", tmp_path_factory.mktemp("chat"))


def configure_proxy(server):
    """Return the README's vite.config.js for a server."""
    return CONFIGURATION.replace(":5000", f":{server.port}")


@contextmanager
def serve_pages(project, configuration, host="127.0.0.1"):
    """Run Vite with a vite.config.js while the block is executed; yield the URL of the page."""
    port = find_listed_port()
    path = project / f"vite.config.{port}.js"
    path.write_text(configuration)
    command = ["node_modules/.bin/vite", "--config", path, "--port", str(port), "--strictPort", "--host", host]
    with subprocess.Popen(command, cwd=project, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: process.poll() is not None or is_listening(port, host))
            assert process.poll() is None
            yield f"http://{host}:{port}"
        finally:
            process.terminate()


class ChatPage:
    """The page with a new conversation of a new user, in a browser of its own."""

    def __init__(self, browser, url):
        self.context = browser.new_context()
        self.page = self.context.new_page()
        self.page.set_default_timeout(TIMEOUT * 1000)
        self.page.goto(url)
        self.page.get_by_label("Message").wait_for()

    def send(self, text):
        self.page.get_by_label("Message").fill(text)
        self.click("Send")

    def click(self, name):
        self.page.get_by_role("button", name=name).click()

    def wait_for(self, selector, text):
        """Wait until the last element of a selector has a text."""
        self.page.locator(selector).last.filter(has_text=text).wait_for()

    def wait_for_status(self, status):
        """Wait for a status of useChat: submitted, streaming, ready or error."""
        self.wait_for("output", status)

    @contextmanager
    def expect_reply(self, method="POST", status="ready"):
        """Wait for the response to what the block sends, then for a status of useChat."""

        def is_reply(response):
            return re.search("/messages(/[0-9]+(/events)?)?$", response.url) and response.request.method == method

        with self.page.expect_response(is_reply):
            yield
        self.wait_for_status(status)

    def wait_for_stored_status(self, status):
        """Return the text of the last message in the API as soon as it has a status."""
        return wait_until(lambda: (stored := self.stored()) and stored[-1][1] == status and stored[-1:])[0][0]

    def reload(self):
        self.page.reload()
        self.page.get_by_label("Message").wait_for()

    def texts(self):
        """Return the texts of the messages that the page shows."""
        texts = self.page.locator(".user, .assistant").all_text_contents()
        return [text.removesuffix("Edit").strip() for text in texts]

    def stored(self):
        """Return the texts and the statuses of the messages in the API."""
        path = "/api/conversations/" + self.page.evaluate("location.hash.slice(1)")
        messages = self.page.evaluate("path => fetch(path).then(response => response.json())", path)["messages"]
        return [(message["text"].strip(), message.get("status")) for message in messages]


@pytest.fixture(scope="module")
def url(project, server):
    """The URL of the page behind Vite with the README's configuration."""
    with serve_pages(project, configure_proxy(server)) as url:
        yield url


@pytest.fixture
def open_page(browser, url):
    """A function that opens a page of the project by its path."""
    pages = []

    def open_page(path):
        pages.append(ChatPage(browser, f"{url}/{path}"))
        return pages[-1]

    yield open_page
    for page in pages:
        page.context.close()


@pytest.fixture
def chat(open_page):
    return open_page("")


@pytest.fixture
def assistant_ui(open_page):
    return open_page("assistant-ui.html")


def test_transport_and_pages_compile(project):
    run_npm(project, "run", "--silent", "check")


@pytest.mark.parametrize("change_origin", [False, True])
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_page_behind_the_proxy_streams_a_reply(project, server, browser, host, change_origin):
    proxy = {"/api/": {"target": f"http://127.0.0.1:{server.port}", "changeOrigin": change_origin}}
    with serve_pages(project, f"export default {{ server: {{ proxy: {json.dumps(proxy)} }} }};", host) as url:
        chat = ChatPage(browser, url)
        chat.send("/slow 4")
        chat.wait_for(".assistant", "1 2")
        assert "4" not in chat.texts()[1]
        chat.wait_for_status("ready")
        assert chat.texts() == ["/slow 4", "1 2 3 4"]
        chat.context.close()


@on_sqlite
def test_page_of_an_origin_that_is_not_listed_reads_which_setting_lists_it(project, serve, browser):
    server = serve(CORS_ORIGINS="https://chat.example.com")
    with serve_pages(project, configure_proxy(server)) as url:
        page = browser.new_page()
        with page.expect_event("pageerror") as error:
            page.goto(url)
        page.close()
    assert error.value.message == f"Origin not allowed: add {url} to CORS_ORIGINS"


def test_page_sends_messages(chat):
    for text in ("/long 3", "/long 4"):
        with chat.expect_reply():
            chat.send(text)
    assert chat.texts() == ["/long 3", "1 2 3", "/long 4", "1 2 3 4"]
    assert chat.stored() == [(text, None) for text in chat.texts()]


def test_page_stops_a_reply(chat):
    chat.send("/slow 60")
    chat.wait_for(".assistant", "1 2")
    chat.click("Stop")
    chat.wait_for_status("ready")
    assert chat.wait_for_stored_status("stopped").startswith("1 2")


@on_sqlite
def test_page_stops_a_reply_before_its_first_word_and_regenerates_it(project, serve, browser):
    with ExitStack() as stack:
        model = stack.enter_context(running(ModelServer()))
        model.script = [stall]
        server = serve(**model.settings())
        chat = ChatPage(browser, stack.enter_context(serve_pages(project, configure_proxy(server))))
        stack.callback(chat.context.close)
        chat.send("Hi")
        chat.wait_for_status("submitted")
        wait_until(lambda: model.requests)  # so the message is stored
        chat.click("Stop")
        assert chat.wait_for_stored_status("stopped") == ""
        model.script = ["Hello", " there."]
        with chat.expect_reply("PUT"):
            chat.click("Regenerate")
        assert chat.texts() == ["Hi", "Hello there."]
        assert chat.stored() == [("Hi", None), ("Hello there.", None)]


def test_page_regenerates_a_reply_before_and_after_a_reload(chat):
    with chat.expect_reply():
        chat.send("/long 3")
    for _ in range(2):
        with chat.expect_reply("PUT"):
            chat.click("Regenerate")
        assert chat.texts() == ["/long 3", "1 2 3"]
        assert chat.stored() == [("/long 3", None), ("1 2 3", None)]
        chat.reload()


def test_page_edits_a_message(chat):
    for text in ("/long 3", "/long 4"):
        with chat.expect_reply():
            chat.send(text)
    chat.page.once("dialog", lambda dialog: dialog.accept("/long 5"))
    with chat.expect_reply("PUT"):
        chat.page.get_by_role("button", name="Edit").first.click()
    assert chat.texts() == ["/long 5", "1 2 3 4 5"]
    assert chat.stored() == [(text, None) for text in chat.texts()]


def test_page_shows_why_a_message_failed_and_sends_it_again(chat):
    with chat.expect_reply(status="error"):
        chat.send("/fail")
    with chat.expect_reply(status="error"):  # POST again, as nothing is stored
        chat.click("Regenerate")
    assert chat.page.get_by_role("alert").inner_text() == "The bot failed to answer"
    assert chat.stored() == []


def test_page_shows_why_a_reply_failed_and_regenerates_it(chat):
    with chat.expect_reply(status="error"):
        chat.send("/drop 3")
    with chat.expect_reply("PUT", status="error"):
        chat.click("Regenerate")
    assert chat.page.get_by_role("alert").inner_text() == "The bot failed to answer"
    assert chat.texts() == ["/drop 3", "1 2 3"]
    assert chat.stored() == [("/drop 3", None), ("1 2 3", "failed")]


def check_reload_resumes_a_reply(page):
    """Assert that a page that is reloaded in the middle of a reply shows all of it."""
    page.send("/slow 6")
    page.wait_for(".assistant", "1 2")
    with page.expect_reply("GET"):
        page.reload()
    assert page.texts() == ["/slow 6", "1 2 3 4 5 6"]
    assert page.stored() == [(text, None) for text in page.texts()]


def test_reloaded_page_resumes_a_reply(chat):
    check_reload_resumes_a_reply(chat)


def test_page_that_lost_the_connection_resumes_a_reply_when_it_is_shown_again(chat):
    chat.page.evaluate(LOSE_CONNECTION)
    chat.send("/slow 6")
    chat.wait_for_status("error")
    with chat.expect_reply("GET"):
        chat.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    assert chat.texts() == ["/slow 6", "1 2 3 4 5 6"]


def test_reloaded_page_stops_a_reply(chat):
    chat.send("/slow 60")
    chat.wait_for(".assistant", "1 2")
    chat.reload()
    chat.wait_for_status("streaming")
    chat.click("Stop")
    assert chat.wait_for_stored_status("stopped").startswith("1 2")


def test_assistant_ui_sends_messages_and_regenerates_replies(assistant_ui):
    for text in ("/long 3", "/long 4"):
        with assistant_ui.expect_reply():
            assistant_ui.send(text)
    with assistant_ui.expect_reply("PUT"):
        assistant_ui.page.get_by_role("button", name="Regenerate").last.click()
    assert assistant_ui.texts() == ["/long 3", "1 2 3", "/long 4", "1 2 3 4"]
    assert assistant_ui.stored() == [(text, None) for text in assistant_ui.texts()]


def test_assistant_ui_stops_a_reply(assistant_ui):
    assistant_ui.send("/slow 60")
    assistant_ui.wait_for(".assistant", "1 2")
    assistant_ui.click("Stop")
    assert assistant_ui.wait_for_stored_status("stopped").startswith("1 2")


def test_assistant_ui_edits_a_message(assistant_ui):
    with assistant_ui.expect_reply():
        assistant_ui.send("/long 3")
    assistant_ui.click("Edit")
    assistant_ui.page.get_by_label("New text").fill("/long 5")
    with assistant_ui.expect_reply("PUT"):
        assistant_ui.click("Save")
    assert assistant_ui.texts() == ["/long 5", "1 2 3 4 5"]
    assert assistant_ui.stored() == [(text, None) for text in assistant_ui.texts()]


def test_assistant_ui_resumes_a_reply_after_a_reload(assistant_ui):
    check_reload_resumes_a_reply(assistant_ui)


def test_assistant_ui_shows_why_a_message_failed_and_sends_it_again(assistant_ui):
    with assistant_ui.expect_reply(status="error"):
        assistant_ui.send("/fail")
    with assistant_ui.expect_reply(status="error"):
        assistant_ui.click("Regenerate")
    assert assistant_ui.page.get_by_role("alert").inner_text() == "The bot failed to answer"
    assert assistant_ui.stored() == []
