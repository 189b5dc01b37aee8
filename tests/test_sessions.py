"""Sessions: their token, their end by logout or restart, their cookie."""

import base64
import re
import time
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest

from app.models import User
from tests.conftest import SHARED_SESSIONS, create_logged_in_client, create_other_client, log_in, on_sqlite
from tests.helpers.data import get_answer
from tests.helpers.server import run_all, run_concurrently

LOGIN_REQUIRED = 401, {"error": "Login required"}
KEY = "the key that the servers of this module share"
OTHER_KEY = "a key that only another server of this module has"
SECURE_NAME = "__Host-chatbot_session"
DAY = timedelta(days=1)


def get_session_token(app, username="ada"):
    with app.app_context():
        return User.get_by_username(username).session_token


def get_with_session(app, session):
    """Return the status and the body of a protected resource for a session signed with the SECRET_KEY."""
    cookie = app.session_interface.get_signing_serializer(app).dumps(session)
    return get_with_cookies(app, f"chatbot_session={cookie}")


def get_with_cookies(app, cookies):
    """Return the status and the body of a protected resource for a Cookie header."""
    return get_answer(app.test_client(use_cookies=False).get("/api/conversations", headers={"Cookie": cookies}))


# The token


def test_token_is_random_and_lasts_until_logout_or_restart(make_app):
    app = make_app()
    ada, _ = (create_logged_in_client(app, username) for username in ("ada", "bob"))
    tokens = [get_session_token(app, username) for username in ("ada", "bob")]
    log_in(app)
    assert get_session_token(app) == tokens[0]
    ada.logout()
    assert get_session_token(app) is None
    for _ in range(2):
        log_in(app)
        tokens.append(get_session_token(app))
        app = make_app()
    assert all(re.fullmatch(r"[\w-]{43}", token) for token in tokens)
    assert len(set(tokens)) == 4


# Login and logout


def test_logout_ends_the_session_on_all_devices(app, ada, bob):
    devices = phone, *_ = log_in(app), create_other_client(ada), ada
    assert [client.is_logged_in() for client in devices] == [True] * 3
    assert bob.get_statuses() == {"ada": "Online", "bob": "Online"}
    phone.logout()
    assert phone.get_cookie("chatbot_session") is None
    assert [client.is_logged_in() for client in (*devices, bob)] == [False] * 3 + [True]
    assert bob.get_statuses() == {"ada": "Offline", "bob": "Online"}


def test_login_does_not_revive_a_cookie_from_before_logout(ada):
    copy = create_other_client(ada)
    for _ in range(3):
        ada.logout()
        ada.login("ada")
        assert get_answer(copy.logout()) == LOGIN_REQUIRED
        assert ada.is_logged_in()


def test_failed_login_keeps_the_session_of_the_client(ada):
    assert ada.login("ada", "wrong").status_code == 401
    assert ada.is_logged_in()


def test_login_as_another_user_changes_the_session_of_the_client(ada, bob):
    ada.login("bob")
    assert ada.get("/api/current_user").json["user"]["username"] == "bob"
    assert ada.get_statuses() == {"ada": "Online", "bob": "Online"}


# Restarts and other servers


def test_restart_ends_sessions_and_a_new_login_does_not_revive_them(make_app):
    ada = create_logged_in_client(make_app(SECRET_KEY=KEY), "ada")
    app = make_app(SECRET_KEY=KEY)
    copy = create_other_client(ada, app)
    assert not copy.is_logged_in()
    assert copy.get_statuses() == {"ada": "Offline"}

    assert log_in(app).is_logged_in()
    assert not copy.is_logged_in()
    assert copy.get_statuses() == {"ada": "Online"}


def test_sessions_continue_after_restart_if_settings_say_so(make_app):
    ada = create_logged_in_client(make_app(**SHARED_SESSIONS), "ada")
    copy = create_other_client(ada, make_app(**SHARED_SESSIONS))
    assert copy.is_logged_in()
    assert copy.get_statuses() == {"ada": "Online"}


def test_another_secret_key_ends_sessions_unless_the_old_one_is_a_fallback(make_app):
    ada = create_logged_in_client(make_app(**SHARED_SESSIONS), "ada")
    settings = {**SHARED_SESSIONS, "SECRET_KEY": OTHER_KEY}
    assert not create_other_client(ada, make_app(**settings)).is_logged_in()
    fallbacks = [SHARED_SESSIONS["SECRET_KEY"]]
    assert create_other_client(ada, make_app(**settings, SECRET_KEY_FALLBACKS=fallbacks)).is_logged_in()


def test_login_by_a_clock_that_is_behind_the_last_restart_opens_a_session(app, ada):
    app.config["SESSIONS_VALID_FROM"] += DAY
    assert not ada.is_logged_in()
    client = log_in(app)
    assert client.is_logged_in()
    assert client.get_statuses() == {"ada": "Online"}
    assert not ada.is_logged_in()


def test_session_opened_by_a_clock_that_is_ahead_is_accepted(app, monkeypatch):
    app.test_client().signup("ada")
    with monkeypatch.context() as patch:
        now = time.time()
        patch.setattr(time, "time", lambda: now + 3600)
        ada = log_in(app)
    assert ada.is_logged_in()


# Cookies


@pytest.mark.parametrize(
    ("settings", "name", "same_site", "is_secure"),
    [
        ({}, "chatbot_session", "Lax", False),
        ({"SESSION_COOKIE_SECURE": True, "SESSION_COOKIE_SAMESITE": "Strict"}, SECURE_NAME, "Strict", True),
    ],
)
def test_login_sets_a_persistent_cookie_that_scripts_cannot_read(make_app, settings, name, same_site, is_secure):
    cookie = create_logged_in_client(make_app(**settings), "ada").get_cookie(name)
    assert (cookie.http_only, cookie.path, cookie.domain) == (True, "/", "localhost")
    assert (cookie.same_site, cookie.secure) == (same_site, is_secure)
    assert abs(cookie.expires - datetime.now(UTC) - 400 * DAY) < timedelta(minutes=5)


REQUESTS_WITHOUT_COOKIE = [
    ("GET", "/api/test", None),
    ("GET", "/api/current_user", None),
    ("GET", "/api/conversations", None),
    ("GET", "/api/unknown", None),
    ("POST", "/api/conversations", {"name": "New"}),
    ("PUT", "/api/conversations/1", {"name": "New"}),
    ("POST", "/api/conversations/1/messages", {"text": "Hello"}),
    ("DELETE", "/api/conversations/1", None),
    ("POST", "/api/logout/999", None),
    ("POST", "/api/login", {"username": "ada", "password": "wrong"}),
]
MALFORMED_COOKIES = [
    *("", "{name}", "{name}=", '{name}="', "=;=", ";;;", "{name}=.", "{name}=..", "{name}=garbage", "{name}=é"),
    *("{name}=\x01", "{name}={long}", "{name}={dots}", "{name}=.eJw{cookie}", "{name}={cookie}{cookie}"),
    *("{name}={head}", "{name}={head}.{reversed}", "{name}={cut}", "{name}={swapped}", "session={cookie}"),
    *("remember_token=1", "remember_token=|", "remember_token=1|00", "remember_token={cookie}"),
    "remember_token=.|.; {name}=garbage",
]


@on_sqlite
def test_requests_other_than_login_and_logout_set_no_cookie(ada):
    ada.create_conversation()
    for method, path, body in REQUESTS_WITHOUT_COOKIE:
        assert "Set-Cookie" not in ada.open(path, method=method, json=body).headers, (method, path)


@on_sqlite
def test_malformed_cookie_returns_401(app, ada):
    cookie = ada.session_cookie
    head, _, signature = cookie.rpartition(".")
    parts = {"head": head, "reversed": signature[::-1], "cut": cookie[:-5], "swapped": cookie.swapcase()}
    parts.update(name="chatbot_session", cookie=cookie, long="x" * 6000, dots="." * 6000)
    for cookies in MALFORMED_COOKIES:
        assert get_with_cookies(app, cookies.format(**parts)) == LOGIN_REQUIRED, cookies


@on_sqlite
@pytest.mark.parametrize("value", ["é", "1|\xff", "😀|00"])
def test_remember_cookie_that_is_not_ascii_is_no_server_error(client, value):
    client.set_cookie("remember_token", value)
    for path in ("/api/conversations", "/api/current_user", "/unknown"):
        response = client.get(path)
        assert response.status_code < 500, path
        assert "Set-Cookie" not in response.headers, path


def test_cookie_of_the_server_s_key_with_another_token_or_none_is_refused(app, ada):
    token = get_session_token(app)
    assert get_with_session(app, {"_user_id": token}) == (200, [])
    other_tokens = [
        *("", " ", "x", "1", "1.1", "A" * 43, "A" * 5000, "\0", "a\0b", "😀", "%", "' OR 1=1 --", "é" * 43),
        *(f"{token} ", f"{token}\n", f"{token}{token}", token[:-1], token.swapcase(), token.encode(), (token,)),
        *(None, True, False, 0, 1, -1, 1.5, 2**62, [], [1], [token], {}, {"id": 1}, datetime.now(UTC), UUID(int=0)),
    ]
    remember = {"_user_id": "a" * 43, "_remember": "set", "_remember_seconds": "x"}  # Flask-Login would read these
    sessions = [{"_user_id": other_token, "_fresh": True} for other_token in other_tokens]
    for session in (*sessions, {}, {"user_id": 1}, {"_fresh": True}, {"username": "ada"}, remember):
        assert get_with_session(app, session) == LOGIN_REQUIRED, session


@on_sqlite
@pytest.mark.parametrize(
    "payload",
    [
        *("[]", "1", "null", '"x"', '[["_user_id", 1]]', "{", "", "[" * 5000, "9" * 5000, '{"a": NaN}'),
        *('{" d": "x"}', '{" b": "x"}', '{" b": 1}', '{" u": "x"}', '{" t": 5}', '{" m": []}', '{"a": {" d": 1}}'),
    ],
)
def test_cookie_of_the_server_s_key_with_any_payload_is_refused(app, ada, payload):
    interface = app.session_interface
    signer = interface.get_signing_serializer(app).make_signer(interface.salt)
    encoded = base64.urlsafe_b64encode(payload.encode()).rstrip(b"=")
    cookie = signer.sign(encoded).decode()
    assert get_with_cookies(app, f"chatbot_session={cookie}") == LOGIN_REQUIRED


# Concurrent requests


def test_concurrent_logins_share_a_session_and_concurrent_logouts_end_it_once(app, client):
    client.signup("ada")
    clients = run_concurrently(6, lambda number: log_in(app))
    assert [client.is_logged_in() for client in clients] == [True] * 6
    responses = run_concurrently(6, lambda number: clients[number].logout())
    assert sorted(response.status_code for response in responses) == [200] + [401] * 5


def test_login_and_concurrent_logout_agree_on_the_session(app, client):
    client.signup("ada")
    for _ in range(5):
        ada, phone = log_in(app), app.test_client()
        responses = run_all(ada.logout, lambda phone=phone: phone.login("ada"))
        assert [response.status_code for response in responses] == [200, 200]
        assert not ada.is_logged_in() or phone.is_logged_in()
        assert client.get_statuses() == {"ada": "Online" if phone.is_logged_in() else "Offline"}
