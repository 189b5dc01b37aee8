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

CONFIGURATION = get_block("js", "proxy")
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


def configure_proxy(server):
    """Return the README's vite.config.mjs for a server."""
    return CONFIGURATION.replace(":5000", f":{server.port}")


@contextmanager
def serve_pages(project, configuration, host="127.0.0.1"):
    """Run Vite with a vite.config.mjs while the block is executed; yield the URL of the pages."""
    port = find_listed_port()
    path = project / f"vite.config.{port}.mjs"
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
    """A page with a new conversation of a new user."""

    def __init__(self, context, url):
        context.clear_cookies()
        self.page = context.new_page()
        self.page.set_default_timeout(TIMEOUT * 1000)
        self.is_assistant_ui = url.endswith(PAGES[1])
        self.page.goto(url)
        self.page.get_by_label("Message").wait_for()

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

    def wait_until_stored(self, count=0):
        """Wait until the page has at least some messages and has loaded all of them: the API's ids are numbers."""
        get_ids = "messages => messages.map(message => message.dataset.messageId)"

        def is_stored():
            ids = self.page.locator("[data-message-id]").evaluate_all(get_ids)
            is_ready = self.page.locator("output").all_text_contents() == ["ready"]
            return is_ready and len(ids) >= count and all(map(str.isdecimal, ids))

        wait_until(is_stored)

    def ask(self, *texts):
        """Send messages and wait for the reply to each."""
        for text in texts:
            count = len(self.texts())
            self.send(text)
            self.wait_until_stored(count + 2)

    def reload(self):
        self.page.reload()
        self.wait_until_stored(1)

    def texts(self):
        """Return the texts of the messages that the page shows."""
        return [text.strip() for text in self.page.locator(".user, .assistant").all_text_contents()]

    def wait_for_texts(self, *texts):
        wait_until(lambda: self.texts() == list(texts))

    def call(self, path=""):
        """Return the JSON of the conversation, or of another path of it."""
        script = "path => fetch(`/api/conversations/${location.hash.slice(1)}${path}`).then(got => got.json())"
        return self.page.evaluate(script, path)

    def stored(self):
        """Return the texts and the statuses of the messages in the API."""
        return [(message["text"].strip(), message.get("status")) for message in self.call()["messages"]]

    def wait_for_stored_status(self, status):
        """Return the text of the last message in the API as soon as it has a status."""
        return wait_until(lambda: (stored := self.stored()) and stored[-1][1] == status and stored[-1:])[0][0]


@pytest.fixture(scope="module")
def url(project, server):
    """The URL of the pages behind Vite with the README's configuration."""
    with serve_pages(project, configure_proxy(server)) as url:
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


on_assistant_ui = pytest.mark.parametrize("chat", PAGES[1:], indirect=True)


def test_examples_compile(project):
    run_npm(project, "run", "--silent", "check")


@on_sqlite
def test_page_behind_another_proxy_streams_a_reply_though_its_origin_is_not_listed(project, serve, context):
    server = serve(CORS_ORIGINS="https://chat.example.com")
    proxy = {"/api/": {"target": f"http://127.0.0.1:{server.port}", "changeOrigin": True}}
    with serve_pages(project, f"export default {{ server: {{ proxy: {json.dumps(proxy)} }} }};", "localhost") as url:
        chat = ChatPage(context, url)
        chat.send("/slow 4")
        chat.wait_for(".assistant", "1 2")
        assert "4" not in chat.texts()[1]
        chat.wait_for_texts("/slow 4", "1 2 3 4")
        chat.page.close()


def test_page_sends_messages(chat):
    chat.ask("/long 3", "/long 4")
    chat.wait_for_texts("/long 3", "1 2 3", "/long 4", "1 2 3 4")
    assert chat.stored() == [(text, None) for text in chat.texts()]


@pytest.mark.parametrize("is_reloaded", [False, True])
def test_page_stops_a_reply(chat, is_reloaded):
    chat.send("/slow 60")
    chat.wait_for(".assistant", "1 2")
    if is_reloaded:
        chat.page.reload()
        chat.wait_for("output", "streaming")
    chat.click("Stop")
    stored = chat.wait_for_stored_status("stopped")  # if by another process, what was saved a second ago
    assert "".join(f"{number} " for number in range(1, 61)).startswith(stored)


@on_sqlite
def test_page_stops_a_reply_before_its_first_word_and_regenerates_it(project, serve, context):
    with running(ModelServer()) as model:
        model.script = [stall]
        with serve_pages(project, configure_proxy(serve(**model.settings()))) as url:
            chat = ChatPage(context, url)
            chat.send("Hi")
            wait_until(lambda: model.requests)
            chat.click("Stop")
            assert chat.wait_for_stored_status("stopped") == ""
            chat.wait_until_stored(2)
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
    chat.send("/slow 6")
    chat.wait_for(".assistant", "1 2")
    chat.page.reload()
    chat.wait_for_texts("/slow 6", "1 2 3 4 5 6")
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

    def titles(self, archived=False):
        titles = self.page.locator(f".threads > {'details >' if archived else ''} .item .title").all_text_contents()
        return [title.strip() for title in titles]

    def wait_for_titles(self, *titles, archived=False):
        wait_until(lambda: self.titles(archived) == list(titles))

    def click(self, title, name):
        self.page.locator(".item").filter(has_text=title).get_by_role("button", name=name, exact=True).click()

    def wait_for_stored(self, *conversations):
        """Wait for the names of all conversations in the API and whether they are archived."""
        script = "() => fetch('/api/conversations?messages=0').then(response => response.json())"
        wait_until(lambda: [(row["name"], row["archived"]) for row in self.page.evaluate(script)] == [*conversations])


@pytest.fixture
def thread_list(chat):
    """The list of two conversations, the second of which is shown."""
    thread_list = ThreadList(chat)
    chat.ask("/long 3")
    thread_list.wait_for_titles("/long 3")
    chat.click("New chat")
    chat.wait_for_texts()
    chat.ask("/long 4")
    thread_list.wait_for_titles("/long 4", "/long 3")
    return thread_list


@on_assistant_ui
def test_thread_list_creates_conversations_with_titles_and_switches_between_them(chat, thread_list):
    thread_list.wait_for_stored(("/long 3", False), ("/long 4", False))
    for _ in range(2):  # the second time after a reload
        thread_list.click("/long 3", "/long 3")
        chat.wait_for_texts("/long 3", "1 2 3")
        thread_list.click("/long 4", "/long 4")
        chat.wait_for_texts("/long 4", "1 2 3 4")
        chat.page.reload()
        thread_list.wait_for_titles("/long 4", "/long 3")
        chat.wait_for_texts("/long 4", "1 2 3 4")


@on_assistant_ui
def test_thread_list_archives_renames_brings_back_and_deletes_conversations(chat, thread_list):
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
