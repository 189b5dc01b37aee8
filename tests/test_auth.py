"""Signup, login, logout, who is online, and the throttles against guessing."""

import re
import time
from datetime import UTC, datetime
from itertools import chain

import pytest

from app import db
from app.models import User
from app.routes import auth
from tests.conftest import PASSWORD, newcomer
from tests.serving import together

TAKEN = {"error": "Username already exists"}
FULLWIDTH_ADA = "\uff41\uff44\uff41"
WRONG = {"error": "Invalid username or password"}


def answer(response):
    return response.status_code, response.json


def login_from(app, address, username="ada", password=PASSWORD, **headers):
    body = {"username": username, "password": password}
    client = app.test_client()
    return client.post("/api/login", json=body, headers=headers, environ_base={"REMOTE_ADDR": address})


def signup_from(app, address, username):
    body = {"username": username, "password": PASSWORD}
    return app.test_client().post("/api/signup", json=body, environ_base={"REMOTE_ADDR": address})


def stored_hash(app, username="ada"):
    with app.app_context():
        return User.named(username).password_hash


def store_hash(app, value, username="ada"):
    with app.app_context():
        User.named(username).password_hash = value
        db.session.commit()


# The documented answers


def test_the_server_tells_that_it_runs(client):
    assert answer(client.get("/api/test")) == (200, {"message": "Server is running"})


def test_signup_makes_a_user(client):
    assert answer(client.signup("ada")) == (201, {"message": "User created successfully", "user_id": 1})
    assert answer(client.signup("bob")) == (201, {"message": "User created successfully", "user_id": 2})


def test_signup_opens_no_session(client):
    assert "Set-Cookie" not in client.signup("ada").headers
    assert not client.is_logged_in()


def test_a_taken_name_is_refused(client):
    client.signup("ada")
    assert answer(client.signup("ada", "another password")) == (400, TAKEN)
    assert client.login("ada", "another password").status_code == 401


def test_login_tells_who_you_are(client):
    client.signup("bob")
    client.signup("ada")
    user = {"id": 2, "user_id": 2, "username": "ada"}
    assert answer(client.login("ada")) == (200, {"message": "Login successful", "user": user})
    assert answer(client.get("/api/current_user")) == (200, {"user": user})


@pytest.mark.parametrize(("username", "password"), [("ada", "wrong"), ("nobody", PASSWORD), ("Ada", PASSWORD)])
def test_a_wrong_password_and_an_unknown_name_look_the_same(client, username, password):
    client.signup("ada")
    response = client.login(username, password)
    assert answer(response) == (401, WRONG)
    assert "Set-Cookie" not in response.headers


def test_logout_says_goodbye(ada):
    assert answer(ada.logout()) == (200, {"message": f"User {ada.user_id} logged out successfully"})
    assert answer(ada.get("/api/current_user")) == (401, {"error": "Login required"})


def test_nobody_logs_out_somebody_else(ada, bob):
    refusal = (403, {"error": "Cannot logout different user"})
    assert answer(bob.post(f"/api/logout/{ada.user_id}")) == refusal
    assert answer(bob.post("/api/logout/999")) == refusal
    assert ada.is_logged_in()
    assert bob.is_logged_in()


def test_the_status_list_tells_who_is_online_since_when(app, client):
    started = datetime.now(UTC)
    client.signup("never")
    newcomer(app, "online")
    newcomer(app, "offline").logout()
    ended = datetime.now(UTC)

    response = client.get("/api/users/status")
    times = re.findall(r'"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z)"', response.text)
    online, offline, logout = times
    never = {"user_id": 1, "username": "never", "status": "Offline", "last_login": None, "last_logout": None}
    assert answer(response) == (
        200,
        {
            "users": [
                never,
                {**never, "user_id": 2, "username": "online", "status": "Online", "last_login": online},
                {**never, "user_id": 3, "username": "offline", "last_login": offline, "last_logout": logout},
            ]
        },
    )
    moments = [started, *map(datetime.fromisoformat, times), ended]
    assert moments == sorted(moments)


# Names


def test_a_name_may_be_anything_printable(client):
    for username in ("a", "a" * 80, "😀" * 80, "Ада Лавлейс", "O'Brien; --", "a/b%20?#", "NULL", "</script>", "ẞ"):
        assert client.signup(username).status_code == 201
        assert client.login(username).json["user"]["username"] == username


@pytest.mark.parametrize("path", ["/api/signup", "/api/login"])
def test_a_name_out_of_bounds_is_refused(client, path):
    blanks = [name for blank in " \t\n\u00a0\u2003\u3000" for name in (blank, f"{blank}ada", f"ada{blank}")]
    controls = [f"a{control}b" for control in "\0\x01\b\n\x1f\x7f\x85\u2028\u2029"]
    grown_by_nfkc = ["ﬀ" * 41, "ﷺ" * 5, "\u00a8"]
    for username in ["", "a" * 81, *blanks, *controls, *grown_by_nfkc]:
        refusal = client.post(path, json={"username": username, "password": PASSWORD})
        assert (refusal.status_code, refusal.json["error"].split()[0]) == (400, "username"), ascii(username)


def test_names_that_read_the_same_are_the_same(client):
    for one, same in [
        ("\u212b", "\u00c5"),
        ("e\u0301", "\u00e9"),
        (FULLWIDTH_ADA, "ada"),
        ("ﬁn", "fin"),
        ("a\u00a0b", "a b"),
    ]:
        assert client.signup(one).status_code == 201
        assert answer(client.signup(same)) == (400, TAKEN)
        assert [client.login(spelling).json["user"]["username"] for spelling in (one, same)] == [same, same]


def test_names_differ_by_case(client):
    assert client.signup("ada").json["user_id"] == 1
    assert client.signup("Ada").json["user_id"] == 2


# Passwords


def test_a_password_may_be_anything(client):
    for n, password in enumerate(["x", "x" * 1024, "😀" * 1024, " a ", "\x01\x7f\u2028", '"\\']):
        assert client.signup(f"user {n}", password).status_code == 201
        assert client.login(f"user {n}", password).status_code == 200


@pytest.mark.parametrize("path", ["/api/signup", "/api/login"])
def test_a_password_longer_than_1024_characters_is_refused(client, path):
    refusal = client.post(path, json={"username": "ada", "password": "x" * 1025})
    assert answer(refusal) == (400, {"error": "password must be 1 to 1024 characters long and not blank"})


def test_a_password_counts_to_the_byte(client):
    pairs = [
        ("\u00e9", "e\u0301"),
        ("\u212b", "\u00c5"),
        (" a", "a"),
        ("a ", "a"),
        ("a", "A"),
        ("x" * 1024, "x" * 1023),
    ]
    for n, (password, other) in enumerate(pairs):
        client.signup(f"user {n}", password)
        assert answer(client.login(f"user {n}", other)) == (401, WRONG)
        assert client.login(f"user {n}", password).status_code == 200


def test_the_shortest_password_is_a_setting_for_those_who_sign_up(make_app):
    assert make_app().test_client().signup("ada", "seven77").status_code == 201
    client = make_app(PASSWORD_MIN_LENGTH="8").test_client()
    refusal = (400, {"error": "password must be 8 to 1024 characters long and not blank"})
    assert answer(client.signup("bob", "seven77")) == refusal
    assert client.signup("bob", "eight888").status_code == 201
    assert client.login("ada", "seven77").status_code == 200


def test_an_unusable_hash_lets_nobody_in(make_app):
    app = make_app(LOGIN_RATE_LIMIT="100 per minute")
    client = newcomer(app, "ada")
    unusable = [
        *("", "x", "$", "$$", "plain text", "md5$salt$00", "scrypt:3:8:1$salt$00", f"scrypt:{2**70}:8:1$salt$00"),
        *("pbkdf2:sha256:x$salt$00", "pbkdf2:sha256:0$salt$00", f"pbkdf2:sha256:{2**70}$salt$00"),
        *("pbkdf2:sha256:1$salt$é", "$argon2id$v=19$m=65536,t=3,p=4$c2FsdA$aGFzaA"),
    ]
    answers = {}
    for stored in unusable:
        store_hash(app, stored)
        answers[stored] = answer(client.login("ada"))
    assert answers == dict.fromkeys(unusable, (401, WRONG))


def test_a_hash_of_another_cost_is_replaced_at_login(make_app):
    old = make_app()
    old.test_client().signup("ada")
    made = stored_hash(old)
    new = make_app(PASSWORD_HASH_METHOD="pbkdf2:sha256:2")
    client = new.test_client()

    client.login("ada", "wrong")
    assert stored_hash(new) == made
    assert client.login("ada").status_code == 200
    assert stored_hash(new).startswith("pbkdf2:sha256:2$")
    assert client.login("ada").status_code == 200


@pytest.mark.parametrize("method", ["pbkdf2:sha256:2", "scrypt"])
def test_a_hash_of_the_cost_that_is_set_stays(make_app, method):
    app = make_app(PASSWORD_HASH_METHOD=method)
    client = newcomer(app, "ada")
    made = stored_hash(app)
    client.login("ada")
    assert stored_hash(app) == made


def test_two_devices_log_in_while_the_hash_is_replaced(make_app, monkeypatch):
    make_app().test_client().signup("ada")
    app = make_app(PASSWORD_HASH_METHOD="pbkdf2:sha256:2")
    others = [app.test_client()]
    hash_password = auth.hash_password

    def log_in_elsewhere_first(*args):
        if others:
            assert together(lambda: others.pop().login("ada"))[0].status_code == 200
        return hash_password(*args)

    monkeypatch.setattr(auth, "hash_password", log_in_elsewhere_first)
    assert app.test_client().login("ada").status_code == 200


# Many at once


def test_a_name_taken_between_look_up_and_insert_is_refused(app, client, monkeypatch):
    hash_password = auth.hash_password

    def be_overtaken(*args):
        monkeypatch.setattr(auth, "hash_password", hash_password)
        assert together(lambda: app.test_client().signup("ada", "faster"))[0].status_code == 201
        return hash_password(*args)

    monkeypatch.setattr(auth, "hash_password", be_overtaken)
    assert answer(client.signup("ada", "slower")) == (400, TAKEN)
    assert client.login("ada", "faster").status_code == 200
    assert client.login("ada", "slower").status_code == 401


def test_of_many_who_want_one_name_one_gets_it(app):
    answers = together(*[lambda: answer(app.test_client().signup("ada"))] * 12)
    assert sorted(status for status, body in answers) == [201] + [400] * 11
    assert [body for status, body in answers if status == 400] == [TAKEN] * 11
    assert len(app.test_client().get("/api/users/status").json["users"]) == 1


def test_user_ids_are_unique_and_ascend_under_any_concurrency(app):
    def sign_up_five(letter):
        return [app.test_client().signup(f"{letter}{n}").json["user_id"] for n in range(5)]

    series = together(*[lambda letter=letter: sign_up_five(letter) for letter in "abcdefgh"])
    assert [ids == sorted(ids) for ids in series] == [True] * 8
    assert sorted(chain(*series)) == list(range(1, 41))


def test_a_user_id_is_never_given_twice(app, client):
    assert [client.signup(name).json["user_id"] for name in ("ada", "bob")] == [1, 2]
    with app.app_context():
        db.session.delete(User.named("bob"))
        db.session.commit()
    assert client.signup("bob").json["user_id"] == 3


# Throttles


def assert_throttled(response):
    assert response.status_code == 429
    assert list(response.json) == ["error"]
    assert response.json["error"]
    assert 1 <= int(response.headers["Retry-After"]) <= 60


def test_after_ten_failures_in_a_minute_even_the_right_password_has_to_wait(app, client):
    client.signup("ada")
    for _ in range(10):
        assert answer(client.login("ada", "wrong")) == (401, WRONG)
    assert_throttled(client.login("ada"))
    assert not client.is_logged_in()


def test_the_wait_ends(app, client, monkeypatch):
    client.signup("ada")
    for _ in range(10):
        client.login("ada", "wrong")
    wait = int(client.login("ada").headers["Retry-After"])
    later = time.time() + wait
    monkeypatch.setattr(time, "time", lambda: later)
    assert client.login("ada").status_code == 200


def test_whoever_guesses_elsewhere_locks_nobody_out(make_app):
    app = make_app(LOGIN_RATE_LIMIT="1 per minute")
    newcomer(app, "ada")
    assert login_from(app, "192.0.2.1", password="wrong").status_code == 401
    assert_throttled(login_from(app, "192.0.2.1"))
    assert login_from(app, "192.0.2.2").status_code == 200


def test_successes_do_not_count(make_app):
    app = make_app(LOGIN_RATE_LIMIT="3 per minute")
    client = newcomer(app, "ada")
    guesses = [PASSWORD, "wrong", PASSWORD, PASSWORD, "wrong", PASSWORD, PASSWORD, "wrong", PASSWORD]
    statuses = [client.login("ada", guess).status_code for guess in guesses]
    assert statuses == [200, 401, 200, 200, 401, 200, 200, 401, 429]


def test_spellings_of_a_name_and_names_of_nobody_are_throttled_too(make_app):
    client = make_app(LOGIN_RATE_LIMIT="2 per minute").test_client()
    assert [client.login(name).status_code for name in ("ada", FULLWIDTH_ADA, "ada", FULLWIDTH_ADA)] == [
        401,
        401,
        429,
        429,
    ]


def test_an_address_has_ten_times_the_tries_of_a_name(make_app):
    app = make_app(LOGIN_RATE_LIMIT="2 per minute")
    newcomer(app, "ada")
    for n in range(20):
        assert login_from(app, "192.0.2.1", f"name {n}").status_code == 401
    assert_throttled(login_from(app, "192.0.2.1"))
    assert login_from(app, "192.0.2.2").status_code == 200


def test_guesses_at_once_get_no_more_answers_than_one_by_one(make_app):
    app = make_app(LOGIN_RATE_LIMIT="3 per minute")
    app.test_client().signup("ada")
    statuses = together(*[lambda: app.test_client().login("ada", "wrong").status_code] * 12)
    assert sorted(statuses) == [401] * 3 + [429] * 9


def test_signups_are_throttled_by_address(make_app):
    app = make_app(SIGNUP_RATE_LIMIT="2 per minute")
    assert [signup_from(app, "192.0.2.1", name).status_code for name in ("a", "b")] == [201, 201]
    assert_throttled(signup_from(app, "192.0.2.1", "c"))
    assert signup_from(app, "192.0.2.2", "c").status_code == 201


@pytest.mark.parametrize(
    ("proxies", "forwarded", "status"),
    [
        ("0", ["203.0.113.1", "203.0.113.2"], 429),
        ("1", ["203.0.113.1, 203.0.113.9", "203.0.113.2, 203.0.113.9"], 429),
        ("2", ["203.0.113.1, 203.0.113.9", "203.0.113.2, 203.0.113.9"], 401),
    ],
)
def test_a_forwarded_address_counts_only_behind_trusted_proxies(make_app, proxies, forwarded, status):
    app = make_app(LOGIN_RATE_LIMIT="1 per minute", TRUSTED_PROXIES=proxies)
    first, second = (login_from(app, "192.0.2.1", **{"X-Forwarded-For": addresses}) for addresses in forwarded)
    assert (first.status_code, second.status_code) == (401, status)
