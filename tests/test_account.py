"""One's own account: a new password, and the end of it all."""

import pytest
from sqlalchemy import event, func

from app import db
from app.models import Conversation, Message, User
from app.models.user import verify_password
from tests.conftest import PASSWORD, newcomer, statements
from tests.serving import crowd

NEW = "battery staple"
CHANGED = (200, {"message": "Password changed successfully"})
WRONG = (403, {"error": "Wrong password"})
LOGIN_REQUIRED = (401, {"error": "Login required"})


def answer(response):
    return response.status_code, response.json


def change(client, current=PASSWORD, new=NEW):
    return client.put("/api/password", json={"current_password": current, "new_password": new})


def leave(client, password=PASSWORD):
    return client.delete("/api/account", json={"password": password})


ACTS = pytest.mark.parametrize("act", [change, leave])


def device(app, username="ada", password=PASSWORD):
    client = app.test_client()
    assert client.login(username, password).status_code == 200
    return client


def holder(app, cookie, user_id=None):
    client = app.test_client()
    client.set_cookie("session", cookie)
    client.user_id = user_id
    return client


def lets_in(app, password, username="ada"):
    return app.test_client().login(username, password).status_code == 200


def rows(app):
    """Count the users, the conversations and the messages."""
    with app.app_context():
        return [
            db.session.scalar(db.select(func.count()).select_from(table)) for table in (User, Conversation, Message)
        ]


@pytest.fixture
def meanwhile(monkeypatch):
    """A function that has `act` done by another thread when the next password is checked but nothing is changed yet."""

    def install(act):
        def verify(*args):
            monkeypatch.undo()
            right = verify_password(*args)
            crowd(1, lambda number: act())
            return right

        monkeypatch.setattr("app.routes.auth.verify_password", verify)

    return install


# A new password


def test_a_new_password_ends_every_session_but_this_one(app, ada, bob):
    before, phone = ada.session_cookie, device(app)
    assert answer(change(ada)) == CHANGED
    assert ada.is_logged_in()
    assert bob.is_logged_in()
    assert not phone.is_logged_in()
    assert ada.session_cookie != before
    assert not holder(app, before).is_logged_in()
    assert [user["status"] for user in ada.get("/api/users/status").json["users"]] == ["Online", "Online"]


def test_the_session_that_goes_on_is_as_any_other(app, ada):
    change(ada)
    kept, phone = ada.session_cookie, device(app, password=NEW)
    assert ada.send(ada.create()).status_code == 201
    assert ada.logout().status_code == 200
    assert not phone.is_logged_in()
    assert not holder(app, kept).is_logged_in()


def test_the_cookie_of_a_new_password_is_kept_as_long_as_one_of_a_login(app, ada):
    login = ada.get_cookie("session")
    change(ada)
    cookie = ada.get_cookie("session")
    assert abs((cookie.expires - login.expires).total_seconds()) < 60
    assert (cookie.http_only, cookie.same_site, cookie.path) == (login.http_only, login.same_site, login.path)


def test_the_new_password_takes_the_old_one_s_place(app, ada):
    change(ada)
    assert not lets_in(app, PASSWORD)
    assert lets_in(app, NEW)
    assert answer(change(ada, PASSWORD, "third")) == WRONG
    assert answer(change(ada, NEW, "third")) == CHANGED
    assert lets_in(app, "third")


def test_the_same_password_again_ends_the_other_sessions_too(app, ada):
    phone = device(app)
    assert answer(change(ada, new=PASSWORD)) == CHANGED
    assert lets_in(app, PASSWORD)
    assert not phone.is_logged_in()


@ACTS
def test_a_wrong_password_changes_nothing(app, ada, act):
    cookie, phone = ada.session_cookie, device(app)
    talk = ada.create()
    ada.send(talk)
    before = rows(app), ada.get("/api/users/status").json, ada.get("/api/conversations").json
    for wrong in ("wrong", PASSWORD.upper(), f"{PASSWORD} ", PASSWORD[:-1]):
        response = act(ada, wrong)
        assert answer(response) == WRONG
        assert "Set-Cookie" not in response.headers
    assert (rows(app), ada.get("/api/users/status").json, ada.get("/api/conversations").json) == before
    assert ada.session_cookie == cookie
    assert phone.is_logged_in()
    assert lets_in(app, PASSWORD)
    assert not lets_in(app, NEW)


def test_passwords_count_to_the_byte(app, ada):
    current = PASSWORD
    for new in (" a ", "e\u0301", "\u00e9", "ﬁ", "\U0001f600" * 1024, "\ufeffa", "%s\\\"';--", "a" * 1024):
        assert answer(change(ada, current, new)) == CHANGED
        assert lets_in(app, new)
        assert not lets_in(app, current)
        current = new
    assert not lets_in(app, "a" * 1023)


def test_the_shortest_password_is_a_setting_for_the_new_one_only(make_app):
    ada = newcomer(make_app(), "ada")
    assert answer(change(ada, new="a")) == CHANGED
    stricter = device(make_app(PASSWORD_MIN_LENGTH="8"), password="a")
    refusal = (400, {"error": "new_password must be 8 to 1024 characters long and not blank"})
    assert answer(change(stricter, "a", "b" * 7)) == refusal
    assert answer(change(stricter, "b", "b" * 8)) == WRONG
    assert answer(change(stricter, "a", "b" * 8)) == CHANGED
    assert leave(stricter, "b" * 8).status_code == 204


@pytest.mark.parametrize("method", ["pbkdf2:sha256:1", "pbkdf2:sha256:2"])
def test_the_new_hash_is_of_the_cost_that_is_set(make_app, method):
    newcomer(make_app(), "ada")
    app = make_app(PASSWORD_HASH_METHOD=method)
    assert answer(change(device(app))) == CHANGED
    with app.app_context():
        assert User.named("ada").password_hash.startswith(f"{method}$")
    assert lets_in(app, NEW)


# What is refused

FIELDS = [
    ("PUT", "/api/password", {"current_password": PASSWORD, "new_password": NEW}, "current_password"),
    ("PUT", "/api/password", {"current_password": PASSWORD, "new_password": NEW}, "new_password"),
    ("DELETE", "/api/account", {"password": PASSWORD}, "password"),
]
NO_PASSWORDS = [
    *(None, 0, 5, -1.5, True, False, [], [PASSWORD], {}, {"password": PASSWORD}),
    *("", " ", "\t\n\u3000", "\0", f"{PASSWORD}\0", "a" * 1025, "\U0001f600" * 1025),
]


@pytest.mark.parametrize(("method", "path", "body", "field"), FIELDS)
def test_a_field_that_is_not_what_it_should_be_is_named(app, ada, method, path, body, field):
    without = {name: value for name, value in body.items() if name != field}
    for bad in [without, *({**body, field: value} for value in NO_PASSWORDS)]:
        response = ada.open(path, method=method, json=bad)
        assert (response.status_code, response.json["error"].split()[0]) == (400, field), bad
    assert ada.is_logged_in()
    assert lets_in(app, PASSWORD)


@pytest.mark.parametrize(("method", "path", "body"), [row[:3] for row in FIELDS[1:]])
def test_a_request_that_is_not_what_it_should_be_is_refused(app, ada, client, method, path, body):
    def status(person=ada, **request):
        return person.open(path, method=method, **request).status_code

    assert [status(data=data, content_type="application/json") for data in ("", "[]", "null", "5", "{", '"a"')] == [
        400
    ] * 6
    assert [status(), status(data=body), status(data="{}", content_type="text/plain")] == [415] * 3
    assert status(json={**body, "more": "a" * 2**20}) == 413
    assert status(json=body, headers={"Origin": "https://evil.example"}) == 403
    assert status(client, json=body) == 401
    assert ada.is_logged_in()
    assert lets_in(app, PASSWORD)


@ACTS
def test_wrong_passwords_are_throttled_together_with_logins(make_app, act):
    app = make_app(LOGIN_RATE_LIMIT="3 per minute")
    ada, bob = newcomer(app, "ada"), newcomer(app, "bob")
    assert [change(ada, "wrong").status_code, leave(ada, "wrong").status_code] == [403, 403]
    assert app.test_client().login("ada", "wrong").status_code == 401
    refusal = act(ada)
    assert answer(refusal) == (429, {"error": "Too many tries, wait a little"})
    assert 1 <= int(refusal.headers["Retry-After"]) <= 60
    assert app.test_client().login("ada").status_code == 429
    assert ada.is_logged_in()
    assert act(bob).status_code in (200, 204)


def test_right_passwords_do_not_count(make_app):
    ada = newcomer(make_app(LOGIN_RATE_LIMIT="1 per minute"), "ada")
    assert [answer(change(ada, new=PASSWORD)) for _ in range(3)] == [CHANGED] * 3


@ACTS
def test_guesses_at_once_get_no_more_answers_than_one_by_one(make_app, act):
    app = make_app(LOGIN_RATE_LIMIT="2 per minute")
    ada = newcomer(app, "ada")
    guessers = [holder(app, ada.session_cookie) for _ in range(8)]
    statuses = crowd(8, lambda number: act(guessers[number], f"wrong {number}").status_code)
    assert set(statuses) <= {403, 429}
    assert act(ada).status_code == 429


# The end of an account


def test_an_account_is_deleted_with_all_that_is_its_user_s(app, ada, bob):
    phone = device(app)
    for person in (ada, bob):
        person.send(person.create("Empty") and person.create("Talk"))
    his = bob.get("/api/conversations").json
    assert rows(app) == [2, 4, 4]

    response = leave(ada)
    assert (response.status_code, response.data) == (204, b"")
    assert rows(app) == [1, 2, 2]
    assert bob.get("/api/conversations").json == his
    assert [user["username"] for user in bob.get("/api/users/status").json["users"]] == ["bob"]
    assert [person.is_logged_in() for person in (ada, phone, bob)] == [False, False, True]
    assert not lets_in(app, PASSWORD)


def test_a_deleted_account_takes_the_cookie_from_the_device(app, ada):
    cookie = ada.session_cookie
    leave(ada)
    assert ada.get_cookie("session") is None
    for act in (change, leave):
        assert answer(act(holder(app, cookie))) == LOGIN_REQUIRED


def test_a_deleted_name_is_free_again_but_not_its_user_id(app, ada):
    cookie, talk = ada.session_cookie, ada.create()
    leave(ada)
    assert answer(ada.signup("ada"))[1]["user_id"] == ada.user_id + 1
    ada.login("ada")
    assert not holder(app, cookie).is_logged_in()
    assert ada.get("/api/conversations").json == []
    assert ada.create() > talk


def test_an_account_is_deleted_by_one_statement_however_much_it_has(app, ada):
    for _ in range(5):
        ada.send(ada.create())
    with statements(app) as sent:
        leave(ada)
    assert [statement.split()[:3] for statement in sent if "DELETE" in statement] in (
        [["DELETE", "FROM", "user"]],
        [["DELETE", "FROM", '"user"']],
    )
    assert not [statement for statement in sent if "conversation" in statement or "message" in statement]
    assert rows(app) == [0, 0, 0]


# Meanwhile


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
@ACTS
def test_nothing_is_stored_of_a_send_under_way(app, ada, act, accept):
    talk, phone = ada.create(), holder(app, ada.session_cookie)

    def bot(history):
        yield "Well,"
        crowd(1, lambda number: act(phone))
        yield " well."

    app.extensions["bot"] = bot
    response = ada.send(talk, headers={"Accept": accept})
    if accept == "application/json":
        assert answer(response) == LOGIN_REQUIRED
    else:
        assert response.text.split("\n\n")[-2] == 'event: error\ndata: {"error":"Login required"}'
    assert rows(app) == ([0, 0, 0] if act is leave else [1, 1, 0])


@ACTS
def test_a_logout_meanwhile_holds(app, ada, meanwhile, act):
    phone = holder(app, ada.session_cookie, ada.user_id)
    cookie = ada.session_cookie
    meanwhile(lambda: phone.logout())
    response = act(ada)
    assert answer(response) == LOGIN_REQUIRED
    assert not holder(app, cookie).is_logged_in()
    assert not ada.is_logged_in()
    assert rows(app) == [1, 0, 0]
    assert lets_in(app, PASSWORD)
    assert not lets_in(app, NEW)


@ACTS
def test_a_new_password_meanwhile_holds(app, ada, meanwhile, act):
    phone = holder(app, ada.session_cookie)
    meanwhile(lambda: change(phone, new="theirs"))
    assert act(ada).status_code in (401, 403)
    assert not ada.is_logged_in()
    assert phone.is_logged_in()
    assert lets_in(app, "theirs")
    assert not lets_in(app, NEW)


@ACTS
def test_an_account_that_is_deleted_meanwhile_stays_so(app, ada, meanwhile, act):
    phone = holder(app, ada.session_cookie)
    meanwhile(lambda: leave(phone))
    assert act(ada).status_code in (401, 403)
    assert rows(app) == [0, 0, 0]
    assert not ada.is_logged_in()


def test_a_conversation_of_an_account_that_is_deleted_meanwhile_is_not_opened(app, ada):
    phone, pending = holder(app, ada.session_cookie), [leave]

    def delete_first(*args):
        if pending:
            crowd(1, lambda number: pending.pop()(phone))

    event.listen(db.session, "before_flush", delete_first)
    try:
        response = ada.post("/api/conversations", json={"name": "Talk"})
    finally:
        event.remove(db.session, "before_flush", delete_first)
    assert answer(response) == LOGIN_REQUIRED
    assert rows(app) == [0, 0, 0]


@pytest.mark.parametrize("rivals", [(change, "logout"), (change, change), (change, leave), (leave, leave)])
def test_of_two_at_once_one_wins_and_no_dead_session_lives(app, rivals):
    for number in range(3):
        username = f"ada {number}"
        ada = newcomer(app, username)
        cookie = ada.session_cookie
        devices = [holder(app, cookie, ada.user_id) for _ in rivals]

        def act(n):
            rival = rivals[n]
            if rival == "logout":
                return devices[n].logout().status_code  # noqa: B023
            return (rival(devices[n], new=f"new {n}") if rival is change else rival(devices[n])).status_code  # noqa: B023

        statuses = crowd(2, act)
        (winner,) = [n for n, status in enumerate(statuses) if status < 300]
        assert statuses[1 - winner] in (401, 403)
        changed = rivals[winner] is change
        assert [client.is_logged_in() for client in devices] == [changed and n == winner for n in range(2)]
        assert not holder(app, cookie).is_logged_in()
        passwords = (PASSWORD, "new 0", "new 1")
        good = f"new {winner}" if changed else None if rivals[winner] is leave else PASSWORD
        assert [lets_in(app, password, username) for password in passwords] == [one == good for one in passwords]
