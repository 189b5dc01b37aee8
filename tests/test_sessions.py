"""How long a session lives: until its user logs out anywhere, or the server restarts."""

import itertools
import random
import time
from datetime import UTC, datetime, timedelta

import pytest
from flask.sessions import SecureCookieSessionInterface

from app import db
from app.models import User
from tests.conftest import PASSWORD, newcomer
from tests.serving import together

LOGIN_REQUIRED = {"error": "Login required"}
DAY = timedelta(days=1)


def device(app, username="ada"):
    client = app.test_client()
    assert client.login(username).status_code == 200
    return client


def holder(app, cookie):
    client = app.test_client()
    client.set_cookie("session", cookie)
    return client


def statuses(client):
    return {user["username"]: user["status"] for user in client.get("/api/users/status").json["users"]}


def signed(app, session):
    """Return a session cookie as only the server can make it."""
    return SecureCookieSessionInterface().get_signing_serializer(app).dumps(session)


def answer_to(app, cookies):
    """Return the answer of a protected route to a Cookie header."""
    response = app.test_client(use_cookies=False).get("/api/conversations", headers={"Cookie": cookies})
    return response.status_code, response.json


@pytest.fixture
def clock(monkeypatch):
    """A function that puts the server's clock, as users are concerned, wrong by a timedelta."""

    def set_wrong(by):
        class Clock(datetime):
            @classmethod
            def now(cls, tz=None):
                return datetime.now(tz) + by

        monkeypatch.setattr("app.models.user.datetime", Clock)

    return set_wrong


# Logout


def test_a_stolen_cookie_dies_at_logout(app, ada):
    thief = holder(app, ada.session_cookie)
    assert thief.is_logged_in()
    ada.logout()
    assert not thief.is_logged_in()


def test_a_dead_cookie_stays_dead_after_a_new_login(app, ada):
    thief = holder(app, ada.session_cookie)
    for _ in range(3):
        ada.logout()
        ada.login("ada")
        assert ada.is_logged_in()
        assert not thief.is_logged_in()


def test_devices_live_side_by_side_and_end_together(app, ada, bob):
    phone, laptop = device(app), device(app)
    assert [client.is_logged_in() for client in (ada, phone, laptop)] == [True, True, True]
    phone.logout()
    assert [client.is_logged_in() for client in (ada, phone, laptop)] == [False, False, False]
    assert bob.is_logged_in()


def test_logout_takes_the_cookie_from_the_device(ada):
    ada.logout()
    assert ada.get_cookie("session") is None


def test_a_dead_session_cannot_log_out(app, ada):
    thief = holder(app, ada.session_cookie)
    ada.logout()
    ada.login("ada")
    assert thief.post(f"/api/logout/{ada.user_id}").json == LOGIN_REQUIRED
    assert ada.is_logged_in()


def test_of_many_logouts_at_once_one_does_it(app, ada):
    devices = [device(app) for _ in range(6)]
    answers = together(*[lambda client=client: client.logout() for client in devices])
    assert sorted(answer.status_code for answer in answers) == [200] + [401] * 5
    assert not any(client.is_logged_in() for client in devices)


def test_a_failed_login_leaves_the_session_at_hand(ada):
    assert ada.login("ada", "wrong").status_code == 401
    assert ada.is_logged_in()


def test_a_login_on_a_device_in_use_changes_its_user(app, ada, bob):
    ada.login("bob")
    assert ada.get("/api/current_user").json["user"]["username"] == "bob"
    assert statuses(ada) == {"ada": "Online", "bob": "Online"}


def test_users_are_online_from_login_to_logout(app, ada):
    phone = device(app)
    assert statuses(ada) == {"ada": "Online"}
    phone.logout()
    assert statuses(ada) == {"ada": "Offline"}
    ada.login("ada")
    assert statuses(ada) == {"ada": "Online"}


# Restarts


def test_a_restart_ends_every_session(make_app):
    app = make_app(SECRET_KEY="the same")
    ada = newcomer(app, "ada")
    restarted = make_app(SECRET_KEY="the same")
    thief = holder(restarted, ada.session_cookie)
    assert not thief.is_logged_in()
    assert statuses(thief) == {"ada": "Offline"}

    again = device(restarted)
    assert again.is_logged_in()
    assert not thief.is_logged_in()
    assert statuses(thief) == {"ada": "Online"}


def test_sessions_live_on_where_the_setting_says_so(make_app):
    settings = {"SECRET_KEY": "the same", "SESSIONS_VALID_FROM": datetime.now(UTC).isoformat()}
    ada = newcomer(make_app(**settings), "ada")
    same = holder(make_app(**settings), ada.session_cookie)
    assert same.is_logged_in()
    assert statuses(same) == {"ada": "Online"}


def test_another_key_ends_every_session(make_app):
    valid_from = datetime.now(UTC).isoformat()
    ada = newcomer(make_app(SECRET_KEY="one", SESSIONS_VALID_FROM=valid_from), "ada")
    assert not holder(make_app(SECRET_KEY="another", SESSIONS_VALID_FROM=valid_from), ada.session_cookie).is_logged_in()


# Cookies


def test_the_cookie_outlives_the_browser_and_hides_from_scripts(ada):
    cookie = ada.get_cookie("session")
    assert (cookie.http_only, cookie.same_site, cookie.secure, cookie.path) == (True, "Lax", False, "/")
    assert abs(cookie.expires - datetime.now(UTC) - 400 * DAY) < timedelta(minutes=5)


def test_the_cookie_is_as_strict_as_the_settings(make_app):
    app = make_app(SESSION_COOKIE_SECURE="true", SESSION_COOKIE_SAMESITE="Strict")
    cookie = newcomer(app, "ada").get_cookie("session")
    assert (cookie.http_only, cookie.same_site, cookie.secure) == (True, "Strict", True)


def test_nothing_but_login_and_logout_sets_a_cookie(ada):
    talk = f"/api/conversations/{ada.create()}"
    answers = [
        ada.get("/api/test"),
        ada.get("/api/current_user"),
        ada.get("/api/users/status"),
        ada.get("/api/conversations"),
        ada.put(talk, json={"name": "New"}),
        ada.post(f"{talk}/messages", json={"text": "Hello"}),
        ada.delete(talk),
        ada.delete(talk),
        ada.post("/api/logout/999"),
        ada.login("ada", "wrong"),
        ada.get("/nowhere"),
    ]
    assert [answer.headers.get("Set-Cookie") for answer in answers] == [None] * len(answers)
    assert "Set-Cookie" in ada.login("ada").headers
    assert "Set-Cookie" in ada.logout().headers


def test_a_cookie_that_is_none_is_no_session(make_app, app, ada):
    real = ada.session_cookie
    head, tail = real.rsplit(".", 1)
    forged = signed(make_app(SECRET_KEY="guessed"), {"_user_id": f"1.{time.time_ns() // 1000}"})
    cookies = [
        *("", "session", "session=", 'session="', "=;=", ";;;", "session=.", "session=..", "session=garbage"),
        *("session=é", "session=\x01", f"session={'x' * 6000}", f"session={'.' * 6000}", f"session=.eJw{real}"),
        *(f"session={real[:-5]}", f"session={real[5:]}", f"session={head}", f"session={head}.{tail[::-1]}"),
        *(f"session={real}{real}", f"session={real.swapcase()}"),
        f"session={forged}",
        *(
            "remember_token=1",
            "remember_token=|",
            "remember_token=1|00",
            "remember_token=1|é",
            f"remember_token={real}",
        ),
    ]
    assert answer_to(app, f"session={real}") == (200, [])
    assert {cookie: answer_to(app, cookie) for cookie in cookies} == dict.fromkeys(cookies, (401, LOGIN_REQUIRED))


def test_a_signed_cookie_that_makes_no_sense_is_no_session(app, ada):
    with app.app_context():
        user = User.named("ada")
        opened = (user.last_login - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    token = f"{user.id}.{opened}"
    nonsense = [
        *("", " ", ".", "x", "1", "1.", ".1", "1.2.3", "1,2", "1.x", "x.1", "1.1e9", "0x1.1", "\0", "😀"),
        *(None, True, False, 0, 5, -1, 1.5, 2**70, [], [1], [token], {}, {"id": 1}),
        *(f"{token} ", f" {token}", f"{token}\n", f"{token}.", f"+{token}", f"-{token}", f"{user.id}.-{opened}"),
        *(f"\u0661.{opened}", f"\uff11.{opened}", f"².{opened}", f"1_0.{opened}", f"0.{opened}", f"999.{opened}"),
        *("9" * 400, f"{'9' * 400}.{opened}", f"{user.id}.{'9' * 400}", f"{'9' * 18}.{'9' * 17}", f"{2**63}.{opened}"),
        *(f"{user.id}.0", f"{user.id}.1", f"{user.id}.{opened - 60 * 10**6}"),
    ]
    assert answer_to(app, f"session={signed(app, {'_user_id': token})}") == (200, [])
    sessions = [{"_user_id": name} for name in nonsense] + [{}, {"user_id": token}, {"_fresh": True}]
    answers = [(session, answer_to(app, f"session={signed(app, session)}")) for session in sessions]
    assert answers == [(session, (401, LOGIN_REQUIRED)) for session in sessions]


def test_the_session_of_a_user_who_is_gone_is_none(app, ada):
    with app.app_context():
        db.session.delete(User.named("ada"))
        db.session.commit()
    assert ada.get("/api/current_user").json == LOGIN_REQUIRED


# Clocks


def test_no_clock_revives_a_dead_cookie_or_kills_a_new_one(app, clock):
    app.test_client().signup("ada")
    dead = []
    for at_login, at_logout in itertools.product([-DAY, 0 * DAY, DAY], repeat=2):
        clock(at_login)
        cookies = [device(app).session_cookie for _ in range(2)]
        clock(at_logout)
        assert all(holder(app, cookie).is_logged_in() for cookie in cookies)
        assert not any(holder(app, cookie).is_logged_in() for cookie in dead)
        client = holder(app, cookies[0])
        assert client.post("/api/logout/1").status_code == 200
        assert not any(holder(app, cookie).is_logged_in() for cookie in cookies)
        dead += cookies
        assert statuses(client) == {"ada": "Offline"}


def test_a_clock_that_runs_behind_lets_people_in_after_a_restart(make_app, clock):
    app = make_app(SECRET_KEY="the same")
    old = newcomer(app, "ada").session_cookie
    restarted = make_app(SECRET_KEY="the same")
    clock(-DAY)
    ada = device(restarted)
    assert ada.is_logged_in()
    assert statuses(ada) == {"ada": "Online"}
    assert not holder(restarted, old).is_logged_in()


def test_a_cookie_signed_by_a_clock_that_runs_ahead_is_good_elsewhere(app, monkeypatch):
    app.test_client().signup("ada")
    with monkeypatch.context() as ahead:
        now = time.time()
        ahead.setattr(time, "time", lambda: now + 3600)
        ada = device(app)
    assert ada.is_logged_in()


def test_last_login_and_last_logout_never_go_back(app, ada, clock):
    moments = []
    for wrong_by in (DAY, -DAY, 0 * DAY):
        clock(wrong_by)
        ada.login("ada")
        ada.logout()
        (user,) = ada.get("/api/users/status").json["users"]
        moments += [datetime.fromisoformat(user[field]) for field in ("last_login", "last_logout")]
    assert moments == sorted(moments)


# Many at once


def test_a_logout_ends_every_session_opened_before_it_began(app):
    """Whatever the interleaving: a model of what is known of each cookie, checked while it goes on and at the end."""
    app.test_client().signup("ada")
    opened = []  # (cookie, when its login began)
    dead = set()  # cookies that some acknowledged logout began after
    logouts = []  # when each was acknowledged

    def live(name):
        chance = random.Random(name)
        client = device(app)
        for _ in range(10):
            began = time.monotonic()
            if chance.random() < 0.6:
                assert client.login("ada", PASSWORD).status_code == 200
                opened.append((client.session_cookie, began))
                continue
            before = {cookie for cookie, _ in list(opened)}
            if client.logout().status_code == 200:
                logouts.append(time.monotonic())
                dead.update(before)
                sample = chance.sample(sorted(before), min(5, len(before)))
                assert not any(holder(app, cookie).is_logged_in() for cookie in sample)

    together(*[lambda name=name: live(name) for name in range(5)])

    fresh = device(app).session_cookie
    assert dead
    assert not any(holder(app, cookie).is_logged_in() for cookie in dead)
    alive = {fresh, *(cookie for cookie, began in opened if began > max(logouts))}
    assert all(holder(app, cookie).is_logged_in() for cookie in alive)
