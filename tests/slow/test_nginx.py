"""The program behind nginx, as the README says: HTTPS, a path prefix, streams, and the size of bodies."""

import json
import shutil
import subprocess
import time

import pytest

from tests.helpers.readme import get_block
from tests.helpers.server import TIMEOUT, HttpClient, find_free_port, is_listening, wait_until
from tests.helpers.tls import create_certificate, create_tls_context
from tests.slow.conftest import run_server
from tests.slow.test_docs_page import DocsPage

pytestmark = pytest.mark.skipif(not shutil.which("nginx"), reason="nginx is not installed")

CONFIGURATION = """
user root;
daemon off;
error_log stderr;
pid {folder}/nginx.pid;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    {server}
}}
"""


class ProxyClient(HttpClient):
    """A client of nginx, as which a page of the same origin sends: under the prefix, with its own Origin."""

    def __init__(self, port):
        super().__init__(port, context=create_tls_context())
        self.origin = f"https://localhost:{port}"

    def send_request(self, method, path, body=None, **headers):
        return super().send_request(method, f"/chat{path}", body, Origin=self.origin, **headers)


@pytest.fixture(scope="module")
def nginx_port(tmp_path_factory):
    """The port of nginx with the README's configuration in front of the program."""
    folder, port = tmp_path_factory.mktemp("nginx"), find_free_port()
    with run_server(f"sqlite:///{folder}/chat.db", TRUSTED_PROXIES=1, SESSION_COOKIE_SECURE="true") as server:
        block = get_block("nginx", "proxy_pass")
        for value, replacement in {
            "443": f"127.0.0.1:{port}",
            "/etc/ssl/chat.pem": create_certificate(folder),
            "127.0.0.1:5000": f"127.0.0.1:{server.port}",
        }.items():
            assert value in block
            block = block.replace(value, str(replacement), 2)
        path = folder / "nginx.conf"
        path.write_text(CONFIGURATION.format(folder=folder, server=block))
        process = subprocess.Popen(["nginx", "-p", folder, "-c", path])
        wait_until(lambda: is_listening(port))
        yield port
        process.terminate()
        process.wait(TIMEOUT)


@pytest.fixture(scope="module")
def client(nginx_port):
    with ProxyClient(nginx_port) as client:
        assert client.signup("ada").status == 201
        assert client.login("ada").status == 200
        yield client


def test_page_of_the_proxy_logs_in_with_a_secure_cookie_of_the_host(client):
    assert client.cookie.startswith("__Host-")
    assert client.get("/api/current_user").json["user"]["username"] == "ada"


def test_page_of_another_origin_gets_403(nginx_port):
    with HttpClient(nginx_port, context=create_tls_context()) as client:
        response = client.request("POST", "/chat/api/signup", {}, Origin="https://evil.example")
    assert response.status == 403


def test_links_stay_below_the_prefix(client):
    for name in ("a", "b"):
        client.create_conversation(name)
    assert client.get("/api/conversations?limit=1").headers["Link"].startswith("<?")


@pytest.mark.parametrize("path", ["/", "/api/docs", "/api/docs/"])
def test_docs_page_works_below_the_prefix(nginx_port, browser, path):
    url = f"https://localhost:{nginx_port}/chat"
    with browser.new_context(ignore_https_errors=True) as context:
        docs = DocsPage(context.new_page(), url + path)
        status, body = docs.execute("server", "test")
        assert (status, json.loads(body)) == (200, {"message": "Server is running"})
        assert all(request.startswith((f"{url}/", "data:")) for request in docs.requests)


def test_stream_passes_through_while_the_reply_grows(client):
    path = f"/api/conversations/{client.create_conversation()}/messages"
    arrivals = [(name, time.monotonic()) for name, *_ in client.stream("POST", path, {"text": "/slow 3"})]
    names = [name for name, _ in arrivals]
    assert (names[0], names[-1]) == ("start", "done")
    assert arrivals[-1][1] - arrivals[0][1] > 1


@pytest.mark.parametrize(("size", "status"), [(2**21, 400), (2**21 + 1, 413)])
def test_large_body_gets_the_answer_of_the_api(client, size, status):
    response = client.post("/api/conversations", b"x" * size)
    assert response.status == status
    assert list(response.json) == ["error"]
