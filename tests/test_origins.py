"""Pages of other origins, host names, and the security headers of every response."""

import pytest
from werkzeug.test import create_environ, run_wsgi_app

from tests.conftest import WRITES, on_sqlite
from tests.helpers.data import get_answer
from tests.helpers.statuses import STATUSES, failing_bot, request_every_status

pytestmark = on_sqlite
ALLOWED = "http://localhost:3000"
OWN_ORIGIN = "http://localhost"
FOREIGN = "https://evil.example"
OTHER_ORIGINS = [
    *("", "null", "file://", "*", "https://localhost", "https://localhost:3000", "http://localhost:3002"),
    *("http://localhost:30000", "http://localhost.evil.example", "http://localhost:3000.evil.example"),
    *("http://evil.example/http://localhost", "http://user@localhost", f"{ALLOWED}, {ALLOWED}", f"{ALLOWED}/"),
    *("http://xn--a", "http://[", "http://[::1]", "http://[::1]:3000", "http://localhost:99999", "é", "x" * 8000),
]
LOGIN = WRITES[1][2]


@pytest.fixture
def failing_app(make_app):
    return make_app(failing_bot, LOGIN_RATE_LIMIT="1 per minute")


@pytest.fixture
def ada(ada):
    """A client with the session of ada, whose user_id and only conversation are 1."""
    ada.send_message(ada.create_conversation())
    return ada


# Writes


@pytest.mark.parametrize("headers", [{"Origin": FOREIGN}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}])
def test_write_by_a_page_of_a_foreign_origin_returns_403_and_changes_nothing(ada, headers):
    before = ada.observe()
    for method, path, body in WRITES:
        response = ada.open(path, method=method, json=body, headers=headers)
        assert response.status_code == 403, (method, path)
        assert "Set-Cookie" not in response.headers
        assert ada.observe() == before, (method, path)


def test_write_of_an_origin_that_is_not_allowed_returns_403_that_names_it_and_the_setting(client):
    for origin in OTHER_ORIGINS:
        response = client.post("/api/login", json=LOGIN, headers={"Origin": origin})
        error = {"error": f"Origin not allowed: add {origin[:255]} to CORS_ORIGINS"}
        assert get_answer(response) == (403, error), origin


@pytest.mark.parametrize(
    "headers",
    [
        *({}, {"Origin": OWN_ORIGIN}, {"Origin": ALLOWED}, {"Origin": ALLOWED, "Sec-Fetch-Site": "cross-site"}),
        *({"Sec-Fetch-Site": site} for site in ("same-origin", "same-site", "none")),
    ],
)
def test_writes_of_own_and_allowed_origins_and_of_programs_succeed(ada, headers):
    for method, path, body in WRITES:
        ada.login("ada")
        assert ada.open(path, method=method, json=body, headers=headers).status_code in (200, 201, 204), path


@pytest.mark.parametrize("headers", [{"Origin": FOREIGN}, {"Sec-Fetch-Site": "cross-site"}])
def test_read_by_a_page_of_a_foreign_origin_is_not_refused(ada, headers):
    for call in (ada.get, ada.head):
        assert call("/api/conversations", headers=headers).status_code == 200


@pytest.mark.parametrize("as_text", [True, False])
def test_cors_origins_are_the_origins_that_may_write_and_read(make_app, as_text):
    origins = ["https://one.example", "https://two.example:8443", "http://[::1]:5173"]
    client = make_app(CORS_ORIGINS=", ".join(origins) if as_text else origins).test_client()
    for origin in (*origins, "https://two.example", ALLOWED, "https://one-example", "http://[::1]:51730", "http://:"):
        response = client.post("/api/login", json=LOGIN, headers={"Origin": origin})
        expected = (401, origin) if origin in origins else (403, None)
        assert (response.status_code, response.headers.get("Access-Control-Allow-Origin")) == expected


# Host names


def get_status(app, method, path, host, scheme="http", **headers):
    """Return the status of a request with a Host header that Werkzeug's test client may not accept."""
    environ = {"HTTP_HOST": host, "wsgi.url_scheme": scheme}
    body = LOGIN if method == "POST" else None
    environ = create_environ(path, method=method, json=body, headers=headers, environ_overrides=environ)
    return int(run_wsgi_app(app, environ, buffered=True)[1].split()[0])


@pytest.mark.parametrize("host", ["", "xn--a", "b\xc3\xbccher", "a/b", "a b", "[", "a:b", "@", "\x7f", "x" * 1000])
def test_request_with_any_host_is_no_server_error(app, ada, bob, host):
    for origin in (OWN_ORIGIN, FOREIGN, "http://xn--a"):
        for path in ("/", "/api/docs/", "/api/users/status?limit=1", "/unknown"):
            assert get_status(app, "GET", path, host, Origin=origin) < 500, (path, origin)
        assert get_status(app, "POST", "/api/login", host, Origin=origin) < 500, origin


@pytest.mark.parametrize(
    ("scheme", "host", "origin", "status"),
    [
        *(("http", host, f"http://{host}", 401) for host in ("xn--a", "b\xc3\xbccher", "[::1]:5000", "a_b")),
        ("http", "CHAT.example.com", "http://chat.example.com", 401),
        ("http", "chat.example.com:80", "http://chat.example.com", 401),
        ("https", "chat.example.com:443", "https://chat.example.com", 401),
        ("https", "[::1]:443", "https://[::1]", 401),
        ("https", "chat.example.com:80", "https://chat.example.com", 403),
        ("http", "chat.example.com:8080", "http://chat.example.com", 403),
    ],
)
def test_write_by_a_page_of_the_own_host_is_accepted_whatever_the_host_is(app, scheme, host, origin, status):
    assert get_status(app, "POST", "/api/login", host, scheme, Origin=origin) == status


@pytest.mark.parametrize(
    ("proxies", "host", "headers", "status"),
    [
        (1, "chat.example.com", {"X-Forwarded-Proto": "https"}, 401),
        (1, "app:5000", {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "chat.example.com"}, 401),
        (1, "chat.example.com", {}, 403),
        (0, "chat.example.com", {"X-Forwarded-Proto": "https"}, 403),
    ],
)
def test_own_origin_behind_trusted_proxies_is_the_one_that_clients_use(make_app, proxies, host, headers, status):
    app = make_app(TRUSTED_PROXIES=proxies)
    assert get_status(app, "POST", "/api/login", host, Origin="https://chat.example.com", **headers) == status


@pytest.mark.parametrize(
    ("host", "status", "key"),
    [("chat.example.com", 200, "message"), ("chat.example.com:5000", 200, "message"), ("evil.example", 400, "error")],
)
def test_host_outside_trusted_hosts_returns_400(make_app, host, status, key):
    client = make_app(TRUSTED_HOSTS=["chat.example.com"]).test_client()
    response = client.get("/api/test", environ_overrides={"HTTP_HOST": host})
    assert (response.status_code, [*response.json]) == (status, [key])


@pytest.mark.parametrize(("site", "status"), [("same-origin", 401), ("same-site", 403), ("cross-site", 403), ("", 403)])
def test_origin_null_is_accepted_only_from_a_page_of_the_same_origin(client, site, status):
    headers = {"Origin": "null", "Sec-Fetch-Site": site}
    assert client.post("/api/login", json=LOGIN, headers=headers).status_code == status


# Reads


def test_page_of_an_allowed_origin_may_read_every_response_with_its_headers(failing_app):
    for response in request_every_status(failing_app, origin=ALLOWED):
        assert response.headers["Access-Control-Allow-Origin"] == ALLOWED
        assert response.headers["Access-Control-Allow-Credentials"] == "true"
        if response.request.method != "OPTIONS":
            exposed = set(response.headers["Access-Control-Expose-Headers"].split(", "))
            assert exposed >= {"ETag", "Idempotent-Replayed", "Link", "Location"}
            assert exposed >= {"Preference-Applied", "Retry-After", "X-Request-ID"}


def test_page_of_a_foreign_origin_may_read_no_response(ada):
    for method, path, body in [("GET", "/api/test", None), ("GET", "/unknown", None), *WRITES]:
        preflight = ada.options(path, headers={"Origin": FOREIGN, "Access-Control-Request-Method": method})
        for response in (preflight, ada.open(path, method=method, json=body, headers={"Origin": FOREIGN})):
            assert not [name for name, _ in response.headers if name.startswith("Access-Control")], path


def ask(client, path, method, names):
    """Return the response to the preflight by a page of an allowed origin for a request with certain headers."""
    headers = {"Access-Control-Request-Method": method, "Access-Control-Request-Headers": names}
    return client.options(path, headers={"Origin": ALLOWED, **headers})


def test_preflight_of_an_allowed_origin_allows_every_write(client):
    for method, path, _ in WRITES:
        response = ask(client, path, method, "content-type")
        assert response.status_code == 200, (method, path)
        assert response.headers["Access-Control-Allow-Origin"] == ALLOWED
        assert response.headers["Access-Control-Allow-Credentials"] == "true"
        assert method in response.headers["Access-Control-Allow-Methods"].split(", ")
        assert response.headers["Access-Control-Allow-Headers"].lower() == "content-type"
        assert response.headers["Access-Control-Max-Age"] == "600"


def test_preflight_allows_the_request_headers_of_the_api_only(client):
    allowed = ["accept", "content-type", "idempotency-key", "if-none-match", "last-event-id", "prefer", "x-request-id"]
    for name in (*allowed, "authorization", "x-forwarded-for", "x-unknown", "*"):
        response = ask(client, "/api/conversations/1/messages", "POST", name)
        names = response.headers.get("Access-Control-Allow-Headers", "").lower().split(", ")
        assert (name in names) is (name in allowed), name


# Headers of every response


@pytest.mark.parametrize("headers", [{}, {"origin": ALLOWED}])
def test_every_response_has_the_security_headers_and_may_be_kept_only_with_its_etag(failing_app, headers):
    responses = request_every_status(failing_app, **headers)
    assert [response.status_code for response in responses] == STATUSES
    for response in responses:
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Referrer-Policy"] == "no-referrer"
        assert response.headers["Content-Security-Policy"] == "default-src 'none'; frame-ancestors 'none'"
        assert response.headers["Cross-Origin-Resource-Policy"]
        assert "Strict-Transport-Security" not in response.headers
        assert {"origin", "cookie"} <= {name.lower() for name in response.vary}
        assert response.headers["Cache-Control"] == ("private, no-cache" if "ETag" in response.headers else "no-store")


@pytest.mark.parametrize("path", ["/api/test", "/api/conversations", "/unknown", "/api/docs/"])
def test_response_over_https_demands_https(client, path):
    response = client.get(path, base_url="https://localhost")
    assert response.headers["Strict-Transport-Security"].startswith("max-age=31536000")


@pytest.mark.parametrize(("count", "is_allowed"), [(100, True), (200, False)])
def test_preflight_of_very_many_headers_allows_none(client, count, is_allowed):
    response = ask(client, "/api/login", "POST", ",".join(["accept"] * count))
    assert ("Access-Control-Allow-Headers" in response.headers) == is_allowed
