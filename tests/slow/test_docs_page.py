"""The documentation page in Chromium."""

from urllib.parse import urlsplit

import pytest

from tests.helpers.server import TIMEOUT

PHONE = {"width": 390, "height": 844}


class DocsPage:
    """The documentation page in a browser."""

    def __init__(self, page, url):
        self.page = page
        self.requests = []
        page.set_default_timeout(TIMEOUT * 1000)
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(url)
        page.wait_for_selector("#operations-server-test")

    def execute(self, tag, operation_id, **parameters):
        """Execute an operation by "Try it out"; return the status and the body of the response."""
        block = self.page.locator(f"#operations-{tag}-{operation_id}")
        block.locator(".opblock-summary-control").click()
        block.get_by_role("button", name="Try it out").click()
        for name, value in parameters.items():
            block.get_by_placeholder(name, exact=True).fill(str(value))
        block.get_by_role("button", name="Execute").click()
        response = block.locator(".live-responses-table .response")
        status = int(response.locator(".response-col_status").inner_text().split()[0])
        return status, response.locator(".response-col_description .highlight-code code").first.text_content()


@pytest.fixture
def open_docs(browser):
    """A function that opens the documentation page of a URL in a phone's browser."""
    context = browser.new_context(viewport=PHONE)
    yield lambda url: DocsPage(context.new_page(), url)
    context.close()


def test_docs_page_describes_an_exchange_as_an_array_of_messages(server, open_docs):
    docs = open_docs(f"http://127.0.0.1:{server.port}/api/docs")
    block = docs.page.locator("#operations-messages-sendMessage")
    block.locator(".opblock-summary-control").click()
    response = block.locator("tr.response[data-code='201']")
    response.get_by_role("tab", name="Schema").click()
    assert "array<" in response.inner_text()
    response.get_by_role("button", name="Expand all").last.click()
    assert "created_at" in response.inner_text()


def test_docs_page_requests_no_other_host(server, open_docs):
    docs = open_docs(f"http://chat.example.com:{server.port}/api/docs")  # at localhost, Swagger UI omits its validator
    assert docs.execute("server", "test")[0] == 200
    assert {urlsplit(url).netloc for url in docs.requests if not url.startswith("data:")} == {
        f"chat.example.com:{server.port}"
    }
