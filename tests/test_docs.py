"""The documentation page."""

import re
from urllib.parse import urljoin

import pytest

DOCS_URL = "http://localhost/apps/chat/api/docs/"


@pytest.mark.parametrize("path", ["/", "/api/docs"])
def test_redirect_to_docs_page_is_relative(client, path):
    response = client.get(path)
    assert response.status_code == 302
    assert urljoin(f"http://localhost/apps/chat{path}", response.headers["Location"]) == DOCS_URL


def test_docs_page_refers_to_relative_urls_that_exist(client):
    references = re.findall(r'(?:href|src|"url")(?:=|: )"([^"]+)"', client.get("/api/docs/").text)
    assert len(references) == 7
    for reference in references:
        url = urljoin(DOCS_URL, reference)
        assert url.startswith("http://localhost/apps/chat/api/")
        assert client.get(url.removeprefix("http://localhost/apps/chat"), buffered=True).status_code == 200


def test_docs_page_allows_no_inline_scripts_or_styles_but_its_own(client):
    policy = client.get("/api/docs/").headers["Content-Security-Policy"]
    assert "unsafe" not in policy
    assert {"default-src 'none'", "frame-ancestors 'none'"} <= set(policy.split("; "))


@pytest.mark.parametrize("tag", ["{}", "W/{}", '"other", {}', "{gzip}"])
def test_openapi_json_with_its_etag_returns_304(client, tag):
    etag = client.get("/api/openapi.json").headers["ETag"]
    etag = tag.format(etag, gzip=f'"{etag[1:-1]}-gzip"')  # as Apache makes it
    response = client.get("/api/openapi.json", headers={"If-None-Match": etag})
    assert response.status_code == 304
    assert response.data == b""
