"""The README's example of a page, in Chromium."""

from tests.helpers.readme import get_block
from tests.helpers.server import TIMEOUT, wait_until

PAGE = "http://localhost:5173/"  # of Vite's development server, an origin that CORS_ORIGINS lists by default


def test_example_of_a_page_sends_a_message_and_follows_the_reply(serve, browser):
    server = serve()
    messages = []
    page = browser.new_page()
    page.set_default_timeout(TIMEOUT * 1000)
    page.on("console", lambda message: messages.append([argument.json_value() for argument in message.args]))
    page.route(PAGE, lambda route: route.fulfill(content_type="text/html", body="<!doctype html>"))
    page.goto(PAGE)
    page.evaluate(f"async () => {{ {get_block('js', 'fetch(').replace(':5000', f':{server.port}')} }}")

    def get_stored():
        page.wait_for_timeout(100)  # lets the page's events arrive
        return [arguments[1] for arguments in messages if arguments[0] == "stored"]

    question, reply = wait_until(get_stored)[0]
    assert question["text"] == "Hello"
    assert "".join(arguments[0] for arguments in messages if len(arguments) == 1) == reply["text"]
    page.close()
