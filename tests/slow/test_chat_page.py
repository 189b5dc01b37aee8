"""Pages that use useChat of the AI SDK, and assistant-ui, behind the development server of Vite, in Chromium."""

import json
import subprocess
from contextlib import contextmanager

import pytest

from tests.conftest import on_sqlite
from tests.helpers.model_server import ModelServer, running, stall
from tests.helpers.npm import install, needs_npm, run_npm
from tests.helpers.readme import get_block
from tests.helpers.server import TIMEOUT, find_listed_port, is_listening, wait_until

PAGES = ["index.html", "assistant-ui.html"]
LOSE_CONNECTION = """() => {
  const { fetch } = window;
  window.fetch = async (url, init) => {
    if (!url.endsWith("/events")) return fetch(url, init);
    window.fetch = fetch;
    let count = 0;
    const transform = (chunk, controller) =>
      ++count < 4 ? controller.enqueue(chunk) : controller.error(new TypeError("network error"));
    return new Response((await fetch(url, init)).body.pipeThrough(new TransformStream({ transform })));
  };
}"""  # in the middle of the next events

pytestmark = needs_npm


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of tests/typescript/chat with its packages installed."""
    return install("chat", tmp_path_factory.mktemp("chat"))


@contextmanager
def serve_pages(project, configuration, server, host="127.0.0.1"):
    """Run Vite with a vite.config.mjs for a server while the block is executed; yield the URL of the pages."""
    port = find_listed_port()
    path = project / f"vite.config.{port}.mjs"
    path.write_text(configuration.replace(":5000", f":{server.port}"))
    command = ["node_modules/.bin/vite", "--config", path, "--port", str(port), "--strictPort", "--host", host]
    with subprocess.Popen(command, cwd=project, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: process.poll() is not None or is_listening(port, host))
            assert process.poll() is None
            yield f"http://{host}:{port}"
        finally:
            process.terminate()


class ChatPage:
    """A page with a new conversation of a new user."""

    def __init__(self, context, url):
        context.clear_cookies()
        self.page = context.new_page()
        self.page.set_default_timeout(TIMEOUT * 1000)
        self.is_assistant_ui = url.endswith(PAGES[1])
        self.page.goto(url)

    def send(self, text):
        self.page.get_by_label("Message").fill(text)
        self.click("Send")

    def click(self, name):
        self.page.get_by_role("button", name=name, exact=True).first.click()

    def edit(self, text):
        """Edit the first message."""
        self.page.once("dialog", lambda dialog: dialog.accept(text))
        self.click("Edit")
        if self.is_assistant_ui:
            self.page.get_by_label("New text").fill(text)
            self.click("Save")

    def wait_for(self, selector, text):
        """Wait until the last element of a selector has a text."""
        self.page.locator(selector).last.filter(has_text=text).wait_for()

    def is_stored(self, count):
        """Return whether the page has some messages at least and has loaded all of them: the API's ids are numbers."""
        messages = self.page.locator("[data-message-id]")
        ids = messages.evaluate_all("messages => messages.map(message => message.dataset.messageId)")
        is_ready = self.page.locator("output").all_text_contents() == ["ready"]
        return is_ready and len(ids) >= count and all(map(str.isdecimal, ids))

    def ask(self, *texts):
        """Send messages and wait for the reply to each."""
        for text in texts:
            count = len(self.texts()) + 2
            self.send(text)
            wait_until(lambda count=count: self.is_stored(count))

    def reload(self):
        self.page.reload()
        wait_until(lambda: self.is_stored(1))

    def texts(self):
        """Return the texts of the messages that the page shows."""
        return [text.strip() for text in self.page.locator(".user, .assistant").all_text_contents()]

    def wait_for_texts(self, *texts):
        wait_until(lambda: self.texts() == list(texts))

    def stored(self):
        """Return the texts and the statuses of the messages in the API."""
        script = "fetch(`/api/conversations/${location.hash.slice(1)}`).then(response => response.json())"
        return [(message["text"].strip(), message.get("status")) for message in self.page.evaluate(script)["messages"]]

    def stop(self):
        """Stop the reply; return its text in the API as soon as it has been stopped there."""
        self.click("Stop")
        wait_until(lambda: (stored := self.stored()) and stored[-1][1] == "stopped")
        return self.stored()[-1][0]


@pytest.fixture(scope="module")
def url(project, server):
    """The URL of the pages behind Vite with the README's configuration."""
    with serve_pages(project, get_block("js", "proxy"), server) as url:
        yield url


@pytest.fixture(scope="module")
def context(browser):
    """A browser whose cache saves most of the time that a page takes to load."""
    return browser.new_context()


@pytest.fixture(params=PAGES)
def chat(request, context, url):
    chat = ChatPage(context, f"{url}/{request.param}")
    yield chat
    chat.page.close()


def test_examples_compile(project):
    run_npm(project, "run", "--silent", "check")


@pytest.mark.parametrize("is_reloaded", [False, True])
def test_page_stops_a_reply(chat, is_reloaded):
    chat.send("/slow 60")
    chat.wait_for(".assistant", "1 2")
    if is_reloaded:
        chat.page.reload()
        chat.wait_for("output", "streaming")
    stored = chat.stop()  # if by another process, what was saved a second ago
    assert "".join(f"{number} " for number in range(1, 61)).startswith(stored)


@on_sqlite
def test_page_of_an_unlisted_origin_behind_another_proxy_stops_a_silent_reply_and_regenerates_it(
    project, serve, context
):
    with running(ModelServer()) as model:
        model.script = [stall]
        server = serve(CORS_ORIGINS="https://chat.example.com", **model.settings())
        proxy = {"/api/": {"target": "http://127.0.0.1:5000", "changeOrigin": True}}
        configuration = f"export default {{ server: {{ proxy: {json.dumps(proxy)} }} }};"
        with serve_pages(project, configuration, server, "localhost") as url:
            chat = ChatPage(context, url)
            chat.send("Hi")
            wait_until(lambda: model.requests)
            assert chat.stop() == ""
            wait_until(lambda: chat.is_stored(2))
            model.script = ["Hello", " there."]
            chat.click("Regenerate")
            chat.wait_for_texts("Hi", "Hello there.")
            assert chat.stored() == [("Hi", None), ("Hello there.", None)]
            chat.page.close()


def test_page_regenerates_a_reply_and_shows_its_versions(chat):
    chat.ask("/long 3")
    for count in (2, 3):  # the second time after a reload
        chat.click("Regenerate")
        chat.wait_for(".versions", f"{count}/{count}")
        chat.reload()
        chat.wait_for(".versions", f"{count}/{count}")
    assert chat.stored() == [("/long 3", None), ("1 2 3", None)]


def test_page_edits_a_message_and_shows_its_versions(chat):
    chat.ask("/long 3", "/long 4")
    chat.edit("/long 5")
    chat.wait_for_texts("/long 5", "1 2 3 4 5")
    chat.wait_for(".versions", "2/2")
    chat.click("Previous version")
    chat.wait_for_texts("/long 3", "1 2 3", "/long 4", "1 2 3 4")
    chat.edit("/long 6")  # the old version, not the one that replaced it
    chat.wait_for(".versions", "3/3")
    assert chat.stored() == [("/long 6", None), ("1 2 3 4 5 6", None)]
    chat.reload()
    chat.wait_for(".versions", "3/3")


@pytest.mark.parametrize(("text", "reply"), [("/fail", ""), ("/drop 3", "1 2 3")])
def test_page_shows_why_a_reply_failed_and_generates_it_again(chat, text, reply):
    chat.ask(text)
    for _ in range(2):  # the second time after a reload
        chat.wait_for('[role="alert"]', "The bot failed to answer")
        assert chat.page.get_by_role("alert").count() == 1
        assert chat.texts() == [text, reply]
        chat.reload()
    assert chat.stored() == [(text, None), (reply, "failed")]
    chat.click("Regenerate")
    chat.wait_for(".versions", "2/2")
    chat.edit("/long 2")
    chat.wait_for_texts("/long 2", "1 2")
    assert chat.page.get_by_role("alert").count() == 0


def test_page_keeps_a_message_that_is_refused(chat):
    text = "x" * 100_001
    chat.send(text)
    chat.wait_for('[role="alert"]', "text must be 1 to 100000 characters long and not blank")
    assert chat.texts()[0] == text


def test_reloaded_page_resumes_a_reply(chat):
    chat.send("/slow 4")
    chat.wait_for(".assistant", "1 2")
    chat.page.reload()
    chat.wait_for_texts("/slow 4", "1 2 3 4")
    chat.wait_for("output", "ready")


def test_page_that_lost_the_connection_resumes_a_reply_when_it_is_shown_again(chat):
    chat.page.evaluate(LOSE_CONNECTION)
    chat.send("/slow 6")
    chat.wait_for("output", "error")
    chat.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    chat.wait_for_texts("/slow 6", "1 2 3 4 5 6")
    chat.wait_for("output", "ready")


class ThreadList:
    """The thread list of assistant-ui."""

    def __init__(self, chat):
        self.page = chat.page

    def wait_for_titles(self, *titles, archived=False):
        items = self.page.locator(f".threads > {'details >' if archived else ''} .item .title")
        wait_until(lambda: [title.strip() for title in items.all_text_contents()] == [*titles])

    def click(self, title, name):
        self.page.locator(".item").filter(has_text=title).get_by_role("button", name=name, exact=True).click()

    def wait_for_stored(self, *conversations):
        """Wait for the names of all conversations in the API and whether they are archived."""
        script = "fetch('/api/conversations?messages=0').then(response => response.json())"
        wait_until(lambda: [(row["name"], row["archived"]) for row in self.page.evaluate(script)] == [*conversations])


@pytest.mark.parametrize("chat", PAGES[1:], indirect=True)
def test_thread_list_creates_opens_archives_renames_brings_back_and_deletes_conversations(chat):
    thread_list = ThreadList(chat)
    chat.ask("/long 3")
    thread_list.wait_for_titles("/long 3")
    chat.click("New chat")
    chat.wait_for_texts()
    chat.ask("/long 4")
    for _ in range(2):  # the second time after a reload
        thread_list.wait_for_titles("/long 4", "/long 3")
        thread_list.click("/long 3", "/long 3")
        chat.wait_for_texts("/long 3", "1 2 3")
        thread_list.click("/long 4", "/long 4")
        chat.wait_for_texts("/long 4", "1 2 3 4")
        thread_list.wait_for_stored(("/long 3", False), ("/long 4", False))
        chat.reload()
    thread_list.click("/long 3", "Archive")
    thread_list.wait_for_titles("/long 3", archived=True)
    thread_list.wait_for_stored(("/long 3", True), ("/long 4", False))
    chat.page.once("dialog", lambda dialog: dialog.accept("Numbers"))
    thread_list.click("/long 4", "Rename")
    thread_list.wait_for_titles("Numbers")
    thread_list.wait_for_stored(("/long 3", True), ("Numbers", False))
    chat.page.reload()
    thread_list.wait_for_titles("/long 3", archived=True)
    chat.page.locator("summary").click()
    thread_list.click("/long 3", "Unarchive")
    thread_list.wait_for_titles("/long 3", "Numbers")
    thread_list.wait_for_stored(("/long 3", False), ("Numbers", False))
    thread_list.click("Numbers", "Delete")
    thread_list.wait_for_titles("/long 3")
    chat.wait_for_texts()  # of a new conversation
    thread_list.wait_for_stored(("/long 3", False))
