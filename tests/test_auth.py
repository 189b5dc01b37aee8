"""Sign-up, login, logout, status, and the limits on guessing."""

import hashlib
import re
from datetime import UTC, datetime
from itertools import chain

import pytest
from werkzeug.security import generate_password_hash

from app import db
from tests.conftest import CHEAP_HASH, PASSWORD, can_log_in, create_logged_in_client
from tests.helpers.cli import invoke
from tests.helpers.data import execute, get_answer
from tests.helpers.server import run_concurrently

USERNAME_TAKEN = 400, {"error": "Username already exists"}
INVALID_LOGIN = 401, {"error": "Invalid username or password"}
FULLWIDTH_ADA = "\uff41\uff44\uff41"
COMPOSED, DECOMPOSED = "caf\u00e9 cr\u00e8me", "cafe\u0301 cre\u0300me"


def post_from(app, address, path, username, password=PASSWORD, **headers):
    body = {"username": username, "password": password}
    return app.test_client().post(path, json=body, headers=headers, environ_base={"REMOTE_ADDR": address})


def set_password_hash(app, password_hash):
    execute(app, 'UPDATE "user" SET password_hash = :password_hash', password_hash=password_hash)


def assert_too_many_requests(response):
    assert get_answer(response) == (429, {"error": "Too many attempts, try again later"})
    assert 1 <= int(response.headers["Retry-After"]) <= 60


def test_get_test_returns_that_the_server_is_running(client):
    assert get_answer(client.get("/api/test")) == (200, {"message": "Server is running"})


# Sign-up


def test_signup_returns_201_with_ascending_user_ids_and_opens_no_session(client):
    for user_id, username in enumerate(["ada", "Ada"], 1):
        response = client.signup(username)
        assert get_answer(response) == (201, {"message": "User created successfully", "user_id": user_id})
        assert "Set-Cookie" not in response.headers


def test_signup_when_closed_returns_403_whatever_the_body(make_app):
    client = make_app(SIGNUP="closed").test_client()
    for response in (client.signup("ada"), client.post("/api/signup", data="x")):
        assert get_answer(response) == (403, {"error": "Sign-up is closed"})
    assert client.get_statuses() == {}


def test_signup_with_existing_username_returns_400_and_keeps_the_password(app, client):
    client.signup("ada")
    assert get_answer(client.signup("ada", "another password")) == USERNAME_TAKEN
    assert [can_log_in(app, password) for password in (PASSWORD, "another password")] == [True, False]


@pytest.mark.parametrize(
    "username",
    ["a", "a" * 80, "😀" * 80, "Ада Лавлейс", "हिन्दी", "O'Brien; --", "a/b%20?#", "NULL", "</script>", "ẞ", "a  b"],
)
def test_user_with_any_printable_username_can_log_in(client, username):
    assert client.signup(username).status_code == 201
    assert client.login(username).json["user"]["username"] == username


@pytest.mark.parametrize(
    ("username", "same"),
    [("\u212b", "\u00c5"), ("e\u0301", "\u00e9"), (FULLWIDTH_ADA, "ada"), ("ﬁn", "fin"), ("a\u00a0b", "a b")],
)
def test_usernames_with_equal_nfkc_are_the_same(client, username, same):
    assert client.signup(username).status_code == 201
    assert get_answer(client.signup(same)) == USERNAME_TAKEN
    assert [client.login(spelling).json["user"]["username"] for spelling in (username, same)] == [same, same]


def test_signup_of_a_username_that_is_taken_during_hashing_returns_400(app, client, while_hashing):
    while_hashing(lambda: app.test_client().signup("ada", "faster").status_code)
    assert get_answer(client.signup("ada", "slower")) == USERNAME_TAKEN
    assert while_hashing.results == [201]
    assert [can_log_in(app, password) for password in ("faster", "slower")] == [True, False]


def test_concurrent_signups_get_unique_ascending_user_ids(app):
    def sign_up_five(number):
        return [app.test_client().signup(f"user {number} {n}").json["user_id"] for n in range(5)]

    user_ids = run_concurrently(8, sign_up_five)
    assert all(ids == sorted(ids) for ids in user_ids)
    assert sorted(chain(*user_ids)) == list(range(1, 41))


@pytest.mark.parametrize(("path", "username"), [("signup", "bob"), ("login", "ada"), ("login", "unknown")])
def test_signup_and_login_hold_no_connection_while_hashing(app, client, while_hashing, path, username):
    client.signup("ada")
    with app.app_context():
        while_hashing(db.engine.pool.checkedout)
    client.post(f"/api/{path}", json={"username": username, "password": PASSWORD})
    assert while_hashing.results == [0]


# Login


def test_login_returns_the_user_and_opens_a_session(client):
    client.signup("bob")
    client.signup("ada")
    user = {"id": 2, "user_id": 2, "username": "ada"}
    assert get_answer(client.login("ada")) == (200, {"message": "Login successful", "user": user})
    assert get_answer(client.get("/api/current_user")) == (200, {"user": user})


@pytest.mark.parametrize(("username", "password"), [("ada", "wrong"), ("unknown", PASSWORD), ("Ada", PASSWORD)])
def test_login_with_wrong_password_or_unknown_username_returns_401(client, username, password):
    client.signup("ada")
    response = client.login(username, password)
    assert get_answer(response) == INVALID_LOGIN
    assert "Set-Cookie" not in response.headers


@pytest.mark.parametrize(
    ("password", "other"),
    [
        *(("\u00e9", "e"), (" a", "a"), ("a ", "a"), ("a", "A"), ("x" * 1024, "x" * 1023), ("\u00df", "ss")),
        *(("😀" * 1024, "😀"), ("\x01\x7f\u2028.", "."), ('"\\', '"'), ("%s';--", "%s")),
    ],
)
def test_login_with_any_password_of_the_user_returns_200_and_with_a_similar_one_401(client, password, other):
    assert client.signup("ada", password).status_code == 201
    assert client.login("ada", other).status_code == 401
    assert client.login("ada", password).status_code == 200


@pytest.mark.parametrize(
    ("password", "other"), [(COMPOSED, DECOMPOSED), ("\u212b", "\u00c5"), ("ﬁ", "fi"), ("a\u00a0b", "a b")]
)
def test_passwords_with_equal_nfkc_are_the_same(app, client, password, other):
    for spelling, other_spelling in ((password, other), (other, password)):
        client.signup(spelling, spelling)
        assert client.login(spelling, other_spelling).status_code == 200
        body = {"current_password": other_spelling, "new_password": spelling}
        assert client.put("/api/password", json=body).status_code == 200
        assert client.delete("/api/account", json={"password": other_spelling}).status_code == 204


def test_hash_of_a_password_as_typed_is_replaced_at_the_next_login_or_password_change(app, ada):
    set_password_hash(app, generate_password_hash(DECOMPOSED, CHEAP_HASH))
    assert [can_log_in(app, password) for password in (COMPOSED, DECOMPOSED, COMPOSED)] == [False, True, True]
    set_password_hash(app, generate_password_hash(DECOMPOSED, CHEAP_HASH))
    body = {"current_password": DECOMPOSED, "new_password": DECOMPOSED}
    assert ada.put("/api/password", json=body).status_code == 200
    assert can_log_in(app, COMPOSED)


@pytest.mark.parametrize("password", ["ﬁ" * 513, "ﷺ" * 57, "e\u0301" * 513])
def test_signup_with_password_too_long_as_typed_or_in_nfkc_returns_400(client, password):
    response = client.signup("ada", password)
    assert response.json == {"error": "password must be 1 to 1024 characters long and not blank"}


def test_password_min_length_counts_characters_of_nfkc_at_signup_only(make_app):
    assert make_app().test_client().signup("ada", "seven77").status_code == 201
    client = make_app(PASSWORD_MIN_LENGTH=8).test_client()
    error = {"error": "password must be 8 to 1024 characters long and not blank"}
    assert get_answer(client.signup("bob", "e\u0301" * 7)) == (400, error)
    assert client.signup("bob", "e\u0301" * 8).status_code == 201
    assert client.login("ada", "seven77").status_code == 200


@pytest.mark.parametrize(("password", "count"), [(PASSWORD, 1), (COMPOSED, 1), (DECOMPOSED, 2)])
def test_login_of_an_unknown_username_costs_as_many_hashes_as_a_wrong_password(client, monkeypatch, password, count):
    client.signup("ada", "another")
    hashed, pbkdf2_hmac = [], hashlib.pbkdf2_hmac
    monkeypatch.setattr(hashlib, "pbkdf2_hmac", lambda *args: hashed.append(args) or pbkdf2_hmac(*args))
    for username in ("ada", "unknown"):
        assert client.login(username, password).status_code == 401
        assert len(hashed) == count
        hashed.clear()


def test_login_whose_hash_is_replaced_meanwhile_returns_200(make_app, while_hashing):
    make_app().test_client().signup("ada")
    app = make_app(PASSWORD_HASH_METHOD="pbkdf2:sha256:2")
    while_hashing(lambda: can_log_in(app, PASSWORD))
    assert can_log_in(app, PASSWORD)
    assert while_hashing.results == [True]


@pytest.mark.parametrize(("password", "cost"), [(PASSWORD, 2), ("wrong", 1)])
def test_login_replaces_a_hash_of_another_method(make_app, password, cost):
    make_app().test_client().signup("ada")
    app = make_app(PASSWORD_HASH_METHOD="pbkdf2:sha256:2")
    app.test_client().login("ada", password)
    assert execute(app, 'SELECT password_hash FROM "user"')[0][0].startswith(f"pbkdf2:sha256:{cost}$")
    assert can_log_in(app, PASSWORD)


def test_login_of_a_user_who_is_disabled_meanwhile_returns_403(app, client, while_hashing):
    client.signup("ada")
    while_hashing(lambda: invoke(app, "users", "disable", "ada")[0])
    assert get_answer(client.login("ada")) == (403, {"error": "This account is disabled"})
    assert while_hashing.results == [0]


# Logout


def test_logout_returns_200_and_ends_the_session(ada):
    assert get_answer(ada.logout()) == (200, {"message": f"User {ada.user_id} logged out successfully"})
    assert get_answer(ada.get("/api/current_user")) == (401, {"error": "Login required"})


def test_logout_of_another_user_returns_403(ada, bob):
    for user_id in (ada.user_id, 999):
        assert get_answer(bob.post(f"/api/logout/{user_id}")) == (403, {"error": "Cannot logout different user"})
    assert ada.is_logged_in()
    assert bob.is_logged_in()


# Status


def test_status_lists_who_is_online_with_times_of_last_login_and_logout(app, client):
    start = datetime.now(UTC)
    client.signup("new")
    create_logged_in_client(app, "online")
    create_logged_in_client(app, "offline").logout()
    end = datetime.now(UTC)

    response = client.get("/api/users/status")
    timestamps = re.findall(r'"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z)"', response.text)
    online, offline, logout = timestamps
    new = {"user_id": 1, "username": "new", "status": "Offline", "last_login": None, "last_logout": None}
    others = [
        {**new, "user_id": 2, "username": "online", "status": "Online", "last_login": online},
        {**new, "user_id": 3, "username": "offline", "last_login": offline, "last_logout": logout},
    ]
    assert response.json == {"users": [new, *others]}
    times = [start, *map(datetime.fromisoformat, timestamps), end]
    assert times == sorted(times)


# Settings and limits


def test_login_after_ten_failures_in_a_minute_returns_429(client):
    client.signup("ada")
    assert [client.login("ada", "wrong").status_code for _ in range(10)] == [401] * 10
    assert_too_many_requests(client.login("ada"))
    assert not client.is_logged_in()


def test_login_whose_limit_is_used_up_during_hashing_returns_429(make_app, while_hashing):
    app = make_app(LOGIN_RATE_LIMIT="2 per minute")
    client = app.test_client()
    client.signup("ada")
    while_hashing(lambda: [app.test_client().login("ada", "wrong").status_code for _ in range(2)])
    assert_too_many_requests(client.login("ada"))
    assert while_hashing.results == [[401, 401]]
    assert not client.is_logged_in()


def test_logins_with_spellings_of_one_unknown_username_share_a_limit(make_app):
    client = make_app(LOGIN_RATE_LIMIT="2 per minute").test_client()
    statuses = [client.login(username).status_code for username in ("ada", FULLWIDTH_ADA, "ada", FULLWIDTH_ADA)]
    assert statuses == [401, 401, 429, 429]


def test_signups_are_limited_by_address(make_app):
    app = make_app(SIGNUP_RATE_LIMIT="2 per minute")
    for username in ("a", "b"):
        assert post_from(app, "192.0.2.1", "/api/signup", username).status_code == 201
    assert_too_many_requests(post_from(app, "192.0.2.1", "/api/signup", "c"))
    assert post_from(app, "192.0.2.2", "/api/signup", "c").status_code == 201


@pytest.mark.parametrize(
    ("proxies", "forwarded", "status"),
    [
        (0, ["203.0.113.1", "203.0.113.2"], 429),
        (1, ["203.0.113.1, 203.0.113.9", "203.0.113.2, 203.0.113.9"], 429),
        (2, ["203.0.113.1, 203.0.113.9", "203.0.113.2, 203.0.113.9"], 401),
    ],
)
def test_forwarded_address_counts_only_behind_trusted_proxies(make_app, proxies, forwarded, status):
    app = make_app(LOGIN_RATE_LIMIT="1 per minute", TRUSTED_PROXIES=proxies)
    statuses = [
        post_from(app, "192.0.2.1", "/api/login", "ada", **{"X-Forwarded-For": addresses}).status_code
        for addresses in forwarded
    ]
    assert statuses == [401, status]
