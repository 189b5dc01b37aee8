"""Pages of other origins, host names, and the security headers of every response."""

import pytest
from werkzeug.test import create_environ, run_wsgi_app

from tests.conftest import PASSWORD, on_sqlite
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
CONVERSATION = "/api/conversations/1"
WRITES = [  # in this order, all succeed
    ("POST", "/api/signup", {"username": "eve", "password": PASSWORD}),
    ("POST", "/api/login", {"username": "ada", "password": PASSWORD}),
    ("POST", "/api/conversations", {"name": "New"}),
    ("PUT", CONVERSATION, {"name": "New"}),
    ("PATCH", CONVERSATION, {"name": "New"}),
    ("POST", f"{CONVERSATION}/messages", {"text": "Hello"}),
    ("POST", f"{CONVERSATION}/messages/2/stop", None),
    ("PUT", f"{CONVERSATION}/messages/1", {"text": "Hello"}),
    ("DELETE", CONVERSATION, None),
    ("PUT", "/api/password", {"current_password": PASSWORD, "new_password": PASSWORD}),
    ("POST", "/api/logout/1", None),
    ("DELETE", "/api/account", {"password": PASSWORD}),
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
        assert response.status_code == 403, origin
        assert response.json["error"].startswith(f"Origin not allowed: add {origin[:100]}")
        assert response.json["error"].endswith(" to CORS_ORIGINS")
        assert len(response.json["error"]) < 350


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Origin": OWN_ORIGIN},
        {"Origin": ALLOWED},
        {"Origin": OWN_ORIGIN, "Sec-Fetch-Site": "same-origin"},
        {"Origin": ALLOWED, "Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "none"},
    ],
)
def test_writes_of_own_and_allowed_origins_and_of_programs_succeed(ada, headers):
    for method, path, body in WRITES:
        ada.login("ada")
        assert ada.open(path, method=method, json=body, headers=headers).status_code in (200, 201, 204), path


@pytest.mark.parametrize("headers", [{"Origin": FOREIGN}, {"Sec-Fetch-Site": "cross-site"}])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_read_by_a_page_of_a_foreign_origin_is_not_refused(ada, method, headers):
    response = ada.open("/api/conversations", method=method, headers=headers)
    assert response.status_code == 200
    assert "Access-Control-Allow-Origin" not in response.headers


@pytest.mark.parametrize("as_text", [True, False])
def test_cors_origins_are_the_origins_that_may_write_and_read(make_app, as_text):
    origins = ["https://one.example", "https://two.example:8443", "http://[::1]:5173"]
    client = make_app(CORS_ORIGINS=", ".join(origins) if as_text else origins).test_client()
    for origin in (*origins, "https://two.example", ALLOWED, "https://one-example"):
        response = client.post("/api/login", json=LOGIN, headers={"Origin": origin})
        assert response.status_code == (401 if origin in origins else 403), origin
        assert response.headers.get("Access-Control-Allow-Origin") == (origin if origin in origins else None)


# Host names


def get_status(app, method, path, host, **headers):
    """Return the status of a request with a Host header that Werkzeug's test client may not accept."""
    body = LOGIN if method == "POST" else None
    environ = create_environ(path, method=method, json=body, headers=headers, environ_overrides={"HTTP_HOST": host})
    return int(run_wsgi_app(app, environ, buffered=True)[1].split()[0])


@pytest.mark.parametrize(
    "host", ["xn--a", "xn--bcher-kva.example", "b\xc3\xbccher", "[::1]:5000", "CHAT.example.com", "a_b"]
)
def test_write_by_a_page_of_the_own_host_is_accepted_whatever_the_host_is(app, host):
    assert get_status(app, "POST", "/api/login", host, Origin=f"http://{host.lower()}") == 401


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("GET", "/", {}),
        ("GET", "/api/docs/", {"Origin": "http://xn--a"}),
        ("GET", "/api/users/status?limit=1", {}),
        ("GET", "/api/users/status?limit=1", {"Origin": OWN_ORIGIN}),
        ("GET", "/unknown", {"Origin": FOREIGN}),
        ("POST", "/api/login", {"Origin": "http://xn--a"}),
    ],
)
def test_request_with_any_host_is_no_server_error(app, ada, bob, method, path, headers):
    for host in ("", "xn--a", "b\xc3\xbccher", "a/b", "a b", "[", "a:b", "@", "\x7f", "x" * 1000):
        assert get_status(app, method, path, host, **headers) < 500, host


@pytest.mark.parametrize(
    ("proxies", "headers", "status"),
    [
        (1, {"X-Forwarded-Proto": "https"}, 401),
        (1, {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "chat.example.com", "Host": "app:5000"}, 401),
        (1, {}, 403),
        (0, {"X-Forwarded-Proto": "https"}, 403),
    ],
)
def test_own_origin_behind_trusted_proxies_is_the_one_that_clients_use(make_app, proxies, headers, status):
    client = make_app(TRUSTED_PROXIES=proxies).test_client()
    headers = {"Host": "chat.example.com", "Origin": "https://chat.example.com", **headers}
    environ = {"HTTP_HOST": headers.pop("Host")}
    assert client.post("/api/login", json=LOGIN, headers=headers, environ_overrides=environ).status_code == status


@pytest.mark.parametrize(
    ("host", "status"),
    [("chat.example.com", 200), ("chat.example.com:5000", 200), ("evil.example", 400)],
)
def test_host_outside_trusted_hosts_returns_400(make_app, host, status):
    client = make_app(TRUSTED_HOSTS=["chat.example.com"]).test_client()
    response = client.get("/api/test", environ_overrides={"HTTP_HOST": host})
    assert response.status_code == status
    assert list(response.json) == (["message"] if status == 200 else ["error"])


@pytest.mark.parametrize(
    ("url", "host", "origin", "status"),
    [
        ("http://localhost", "chat.example.com:80", "http://chat.example.com", 401),
        ("https://localhost", "chat.example.com:443", "https://chat.example.com", 401),
        ("https://localhost", "[::1]:443", "https://[::1]", 401),
        ("https://localhost", "chat.example.com:80", "https://chat.example.com", 403),
        ("http://localhost", "chat.example.com:8080", "http://chat.example.com", 403),
    ],
)
def test_default_port_in_host_is_that_of_the_own_origin(client, url, host, origin, status):
    environ = {"HTTP_HOST": host}
    response = client.post(
        "/api/login", base_url=url, json=LOGIN, headers={"Origin": origin}, environ_overrides=environ
    )
    assert response.status_code == status


@pytest.mark.parametrize(("site", "status"), [("same-origin", 401), ("same-site", 403), ("cross-site", 403), ("", 403)])
def test_origin_null_is_accepted_only_from_a_page_of_the_same_origin(client, site, status):
    headers = {"Origin": "null", "Sec-Fetch-Site": site}
    assert client.post("/api/login", json=LOGIN, headers=headers).status_code == status


# Reads


def test_page_of_an_allowed_origin_may_read_every_response(failing_app):
    for response in request_every_status(failing_app, origin=ALLOWED):
        assert response.headers["Access-Control-Allow-Origin"] == ALLOWED
        assert response.headers["Access-Control-Allow-Credentials"] == "true"


def test_page_of_a_foreign_origin_may_read_no_response(ada):
    for method, path, body in [("GET", "/api/test", None), ("GET", "/unknown", None), *WRITES]:
        response = ada.open(path, method=method, json=body, headers={"Origin": FOREIGN})
        assert not [name for name, _ in response.headers if name.startswith("Access-Control")], path


def test_page_of_an_allowed_origin_may_read_response_headers(client):
    response = client.get("/api/test", headers={"Origin": ALLOWED})
    exposed = set(response.headers["Access-Control-Expose-Headers"].split(", "))
    assert exposed >= {"ETag", "Idempotent-Replayed", "Link", "Location"}
    assert exposed >= {"Preference-Applied", "Retry-After", "X-Request-ID"}


def test_preflight_of_an_allowed_origin_allows_every_write(client):
    for method, path, _ in WRITES:
        headers = {
            "Origin": ALLOWED,
            "Access-Control-Request-Method": method,
            "Access-Control-Request-Headers": "content-type",
        }
        response = client.options(path, headers=headers)
        assert response.status_code == 200, (method, path)
        assert response.headers["Access-Control-Allow-Origin"] == ALLOWED
        assert response.headers["Access-Control-Allow-Credentials"] == "true"
        assert method in response.headers["Access-Control-Allow-Methods"].split(", ")
        assert response.headers["Access-Control-Allow-Headers"].lower() == "content-type"
        assert response.headers["Access-Control-Max-Age"] == "600"


def test_preflight_allows_the_request_headers_of_the_api_only(client):
    allowed = ["accept", "content-type", "idempotency-key", "if-none-match", "last-event-id", "prefer", "x-request-id"]
    for name in (*allowed, "authorization", "x-forwarded-for", "x-unknown", "*"):
        headers = {"Origin": ALLOWED, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": name}
        response = client.options(f"{CONVERSATION}/messages", headers=headers)
        names = response.headers.get("Access-Control-Allow-Headers", "").lower().split(", ")
        assert (name in names) is (name in allowed), name


def test_preflight_of_more_than_1000_characters_of_headers_returns_400_and_allows_none(client):
    for length, status in ((1000, 200), (1001, 400)):
        names = "accept,".rjust(length, ",")
        headers = {"Origin": ALLOWED, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": names}
        response = client.options(CONVERSATION, headers=headers)
        assert response.status_code == status
        assert ("Access-Control-Allow-Headers" in response.headers) is (status == 200)
    assert response.json == {"error": "Access-Control-Request-Headers must be at most 1000 characters"}


def test_preflight_of_too_many_headers_with_an_invalid_cookie_allows_none(client):
    headers = {"Origin": ALLOWED, "Access-Control-Request-Method": "POST", "Cookie": "remember_token=\xe9"}
    response = client.options(CONVERSATION, headers={**headers, "Access-Control-Request-Headers": "accept," * 200})
    assert response.status_code == 400
    assert "Access-Control-Allow-Headers" not in response.headers


def test_preflight_of_a_foreign_origin_allows_nothing(client):
    response = client.options(CONVERSATION, headers={"Origin": FOREIGN, "Access-Control-Request-Method": "DELETE"})
    assert not [name for name, _ in response.headers if name.startswith("Access-Control")]


# Headers of every response


@pytest.mark.parametrize("headers", [{}, {"origin": ALLOWED}])
def test_every_response_has_the_security_headers(failing_app, headers):
    responses = request_every_status(failing_app, **headers)
    assert [response.status_code for response in responses] == STATUSES
    for response in responses:
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Referrer-Policy"] == "no-referrer"
        assert response.headers["Content-Security-Policy"] == "default-src 'none'; frame-ancestors 'none'"
        assert response.headers["Cross-Origin-Resource-Policy"]
        assert "Strict-Transport-Security" not in response.headers
        assert {"origin", "cookie"} <= {name.lower() for name in response.vary}


def test_response_may_be_kept_only_with_its_etag(failing_app):
    for response in request_every_status(failing_app):
        expected = "private, no-cache" if "ETag" in response.headers else "no-store"
        assert response.headers["Cache-Control"] == expected


@pytest.mark.parametrize("path", ["/api/test", "/api/conversations", "/unknown", "/api/docs/"])
def test_response_over_https_demands_https(client, path):
    response = client.get(path, base_url="https://localhost")
    assert response.headers["Strict-Transport-Security"].startswith("max-age=31536000")
