"""The README's example of a page, in Chromium, and its first command in a clone."""

import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from secrets import token_hex

import pytest

from tests.helpers.model_server import running
from tests.helpers.readme import get_block
from tests.helpers.server import ROOT, TIMEOUT, find_listed_port, wait_until


@pytest.fixture
def page(server, browser, tmp_path):
    """An empty page of an origin that is allowed by default."""
    (tmp_path / "index.html").write_text("<!doctype html>")
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with running(ThreadingHTTPServer(("127.0.0.1", find_listed_port()), handler)) as pages:
        page = browser.new_page()
        page.set_default_timeout(TIMEOUT * 1000)
        page.goto(f"http://localhost:{pages.server_port}/index.html")
        yield page
        page.close()


@pytest.fixture
def run_example(server, page):
    """A function that runs the example in the page as a new user, with another text, and more code after it."""
    username = token_hex(8)

    def run(text, more=""):
        script = get_block("js", "EventSource(").replace('"grace"', f'"{username}"').replace("Hello", text)
        script = script.replace(":5000", f":{server.port}")
        page.evaluate(f"async () => {{ {script} {more} }}")

    return run


def wait_for_lines(page, *lines):
    """Wait until the page shows some lines."""
    wait_until(lambda: [line.strip() for line in page.locator("body").inner_text().splitlines()] == [*lines])


def test_example_of_a_page_shows_the_reply_also_after_a_reload(page, run_example):
    run_example("/long 3")
    wait_for_lines(page, "1 2 3")
    page.reload()
    run_example("/long 4")
    wait_for_lines(page, "Username already exists", "1 2 3 4")


@pytest.mark.parametrize(("text", "shown"), [("/fail", ""), ("/drop 3", "1 2 3 ")])
def test_example_of_a_page_shows_why_a_reply_failed(page, run_example, text, shown):
    run_example(text)
    wait_for_lines(page, f"{shown}The bot failed to answer")


def test_example_of_a_poll_shows_messages_that_were_sent_elsewhere(server, page, run_example):
    lengths = []
    page.on("console", lambda message: lengths.append(len(message.args[0].json_value()["messages"])))
    poll = get_block("js", "setInterval").replace("5000", "100")
    run_example("Hello", f"{poll}; window.send = () => post(`/conversations/${{id}}/messages`, {{ text: 'Hello' }});")
    server.wait_for(r"GET /api/conversations/\d+ 304")
    page.evaluate("send()")
    wait_until(lambda: page.wait_for_timeout(100) or lengths[-1] == 4)
    assert lengths[0] == 2


def test_page_gets_an_answer_from_a_clone_in_which_the_first_command_was_run(browser):
    command = [sys.executable, "-m", "tests.benchmark.first_answer"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10 * TIMEOUT)
    assert "the page shows: Hello!" in result.stdout, result.stdout + result.stderr
