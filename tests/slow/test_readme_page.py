"""The README's example of a page, in Chromium, and its first command in a clone."""

import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.helpers.model_server import running
from tests.helpers.readme import get_block
from tests.helpers.server import ROOT, TIMEOUT, wait_until


@pytest.fixture
def run_example(serve, browser, tmp_path):
    """A function that runs the example in a page; it returns what the page has logged once that begins with a word."""
    (tmp_path / "index.html").write_text("<!doctype html>")
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with running(ThreadingHTTPServer(("127.0.0.1", 0), handler)) as pages:
        origin = f"http://localhost:{pages.server_port}"
        server = serve(CORS_ORIGINS=origin)
        page = browser.new_page()
        page.set_default_timeout(TIMEOUT * 1000)
        logged = []
        page.on("console", lambda message: logged.append([argument.json_value() for argument in message.args]))
        page.goto(f"{origin}/index.html")

        def has_logged(word):
            page.wait_for_timeout(100)  # lets the page's events arrive
            return word in [arguments[0] for arguments in logged if arguments]

        def run(text, last_word):
            script = get_block("js", "fetch(").replace(":5000", f":{server.port}").replace("Hello", text)
            page.evaluate(f"async () => {{ {script} }}")
            wait_until(lambda: has_logged(last_word))
            return [arguments for arguments in logged if arguments]

        yield run
        page.close()


def test_example_of_a_page_sends_a_message_and_follows_the_reply(run_example):
    *deltas, [_, [question, reply]] = run_example("Hello", "stored")
    assert question["text"] == "Hello"
    assert "".join(text for [text] in deltas) == reply["text"]


def test_example_of_a_page_reads_why_a_reply_failed(run_example):
    assert run_example("/drop 3", "failed")[-1] == ["failed", "The bot failed to answer"]


def test_page_gets_an_answer_from_a_clone_in_which_the_first_command_was_run(browser):
    command = [sys.executable, "-m", "tests.benchmark.first_answer"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10 * TIMEOUT)
    assert "the page shows: Hello!" in result.stdout, result.stdout + result.stderr
