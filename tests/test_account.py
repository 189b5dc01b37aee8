"""Changing the password and deleting the account."""

import pytest
from sqlalchemy import func, select

from app import db
from app.models import Conversation, Message, User
from tests.conftest import (
    PASSWORD,
    can_log_in,
    create_logged_in_client,
    create_other_client,
    echo,
    log_in,
)
from tests.helpers.server import run_all, run_concurrently

NEW_PASSWORD = "battery staple"
PASSWORD_CHANGED = (200, {"message": "Password changed successfully"})
WRONG_PASSWORD = (403, {"error": "Wrong password"})
LOGIN_REQUIRED = (401, {"error": "Login required"})


def change_password(client, password=PASSWORD, new_password=NEW_PASSWORD):
    body = {"current_password": password, "new_password": new_password}
    response = client.put("/api/password", json=body)
    return response.status_code, response.json


def delete_account(client, password=PASSWORD):
    response = client.delete("/api/account", json={"password": password})
    return response.status_code, response.json


def log_out(client):
    response = client.logout()
    return response.status_code, response.json


both_calls = pytest.mark.parametrize("call", [change_password, delete_account])


def count_rows(app):
    """Return how many users, conversations and messages there are."""
    with app.app_context():
        return [db.session.scalar(select(func.count()).select_from(model)) for model in (User, Conversation, Message)]


@pytest.fixture
def app(make_app):
    return make_app(echo)


# Changing the password


def test_change_password_ends_all_sessions_but_this_one(app, ada, bob):
    phone, copy = log_in(app), create_other_client(ada)
    assert change_password(ada) == PASSWORD_CHANGED
    assert ada.is_logged_in()
    assert bob.is_logged_in()
    assert not phone.is_logged_in()
    assert not copy.is_logged_in()
    assert ada.get_statuses() == {"ada": "Online", "bob": "Online"}


def test_session_after_change_password_is_shared_and_ended_like_any_other(app, ada):
    change_password(ada)
    phone = log_in(app, password=NEW_PASSWORD)
    copy = create_other_client(ada)
    assert ada.logout().status_code == 200
    assert not phone.is_logged_in()
    assert not copy.is_logged_in()


def test_change_password_sets_a_cookie_as_login_does(ada):
    before = ada.get_cookie("chatbot_session")
    change_password(ada)
    cookie = ada.get_cookie("chatbot_session")
    assert cookie.value != before.value
    assert abs((cookie.expires - before.expires).total_seconds()) < 60
    assert (cookie.http_only, cookie.same_site, cookie.path) == (before.http_only, before.same_site, before.path)


def test_change_password_replaces_the_password(app, ada):
    change_password(ada)
    assert can_log_in(app, NEW_PASSWORD)
    assert not can_log_in(app, PASSWORD)
    assert change_password(ada, PASSWORD, "third") == WRONG_PASSWORD
    assert change_password(ada, NEW_PASSWORD, "third") == PASSWORD_CHANGED
    assert can_log_in(app, "third")


def test_change_password_to_the_same_one_ends_other_sessions(app, ada):
    phone = log_in(app)
    assert change_password(ada, new_password=PASSWORD) == PASSWORD_CHANGED
    assert can_log_in(app, PASSWORD)
    assert not phone.is_logged_in()


@pytest.mark.parametrize(
    "password", [" a ", "e\u0301", "\u00e9", "ﬁ", "😀" * 1024, "\ufeffa", "%s\\\"';--", "a" * 1024]
)
def test_change_password_accepts_any_visible_password(app, ada, password):
    assert change_password(ada, new_password=password) == PASSWORD_CHANGED
    assert can_log_in(app, password)
    assert not can_log_in(app, password[:-1] or "x")


def test_password_min_length_applies_to_the_new_password_only(make_app):
    create_logged_in_client(make_app(), "ada")
    assert change_password(log_in(make_app()), new_password="a") == PASSWORD_CHANGED
    ada = log_in(make_app(PASSWORD_MIN_LENGTH=8), password="a")
    error = {"error": "new_password must be 8 to 1024 characters long and not blank"}
    assert change_password(ada, "a", "b" * 7) == (400, error)
    assert change_password(ada, "b", NEW_PASSWORD) == WRONG_PASSWORD
    assert change_password(ada, "a", NEW_PASSWORD) == PASSWORD_CHANGED


# Deleting the account


def test_delete_account_deletes_all_of_the_user_and_nothing_of_others(app, ada, bob):
    phone = log_in(app)
    for client in (ada, bob):
        client.create_conversation()
        client.send_message(client.create_conversation())
    conversations = bob.list_conversations()
    assert count_rows(app) == [2, 4, 4]

    response = ada.delete("/api/account", json={"password": PASSWORD})
    assert (response.status_code, response.data) == (204, b"")
    assert count_rows(app) == [1, 2, 2]
    assert bob.list_conversations() == conversations
    assert bob.get_statuses() == {"bob": "Online"}
    assert [client.is_logged_in() for client in (ada, phone, bob)] == [False, False, True]
    assert not can_log_in(app, PASSWORD)


def test_delete_account_deletes_the_cookie_and_ends_its_copies(ada):
    copy = create_other_client(ada)
    delete_account(ada)
    assert ada.get_cookie("chatbot_session") is None
    for call in (change_password, delete_account):
        assert call(copy) == LOGIN_REQUIRED


def test_username_of_a_deleted_account_is_free_but_its_ids_are_not(ada):
    copy, conversation_id = create_other_client(ada), ada.create_conversation()
    delete_account(ada)
    assert ada.signup("ada").json["user_id"] == ada.user_id + 1
    ada.login("ada")
    assert not copy.is_logged_in()
    assert ada.list_conversations() == []
    assert ada.create_conversation() > conversation_id


# Wrong passwords


@both_calls
@pytest.mark.parametrize("password", ["wrong", PASSWORD.upper(), f"{PASSWORD} ", PASSWORD[:-1]])
def test_wrong_password_returns_403_and_changes_nothing(app, ada, call, password):
    copy = create_other_client(ada)
    ada.send_message(ada.create_conversation())
    before = count_rows(app), ada.get_statuses(), ada.list_conversations(), ada.session_cookie
    assert call(ada, password) == WRONG_PASSWORD
    assert (count_rows(app), ada.get_statuses(), ada.list_conversations(), ada.session_cookie) == before
    assert copy.is_logged_in()
    assert can_log_in(app, PASSWORD)
    assert not can_log_in(app, NEW_PASSWORD)


@both_calls
def test_wrong_passwords_count_together_with_failed_logins(make_app, call):
    app = make_app(LOGIN_RATE_LIMIT="3 per minute")
    ada, bob = (create_logged_in_client(app, username) for username in ("ada", "bob"))
    assert change_password(ada, "wrong") == delete_account(ada, "wrong") == WRONG_PASSWORD
    assert app.test_client().login("ada", "wrong").status_code == 401
    assert call(ada) == (429, {"error": "Too many attempts, try again later"})
    assert app.test_client().login("ada").status_code == 429
    assert ada.is_logged_in()
    assert call(bob)[0] in (200, 204)


# Concurrent requests


@both_calls
def test_no_connection_is_held_while_hashing(app, ada, while_hashing, call):
    def count_connections():
        with app.app_context():
            return db.engine.pool.checkedout()

    while_hashing(count_connections)
    assert call(ada)[0] in (200, 204)
    assert while_hashing.results == [0]


@both_calls
def test_logout_during_hashing_wins(app, ada, while_hashing, call):
    phone, copy = create_other_client(ada), create_other_client(ada)
    while_hashing(lambda: log_out(phone)[0])
    assert call(ada) == LOGIN_REQUIRED
    assert while_hashing.results == [200]
    assert not copy.is_logged_in()
    assert not ada.is_logged_in()
    assert can_log_in(app, PASSWORD)
    assert not can_log_in(app, NEW_PASSWORD)


@both_calls
def test_password_change_during_hashing_wins(app, ada, while_hashing, call):
    phone = create_other_client(ada)
    while_hashing(lambda: change_password(phone, new_password="changed first")[0])
    assert call(ada)[0] in (401, 403)
    assert while_hashing.results == [200]
    assert not ada.is_logged_in()
    assert phone.is_logged_in()
    assert can_log_in(app, "changed first")
    assert not can_log_in(app, NEW_PASSWORD)


@both_calls
def test_account_deletion_during_hashing_wins(app, ada, while_hashing, call):
    phone = create_other_client(ada)
    while_hashing(lambda: delete_account(phone)[0])
    assert call(ada)[0] in (401, 403)
    assert while_hashing.results == [204]
    assert count_rows(app) == [0, 0, 0]
    assert not ada.is_logged_in()


@both_calls
def test_login_during_whose_hashing_the_password_is_changed_or_the_account_deleted_returns_401(
    app, ada, while_hashing, call
):
    client = app.test_client()
    while_hashing(lambda: call(ada)[0])
    assert client.login("ada").status_code == 401
    assert while_hashing.results in ([200], [204])
    assert not client.is_logged_in()
    assert ada.is_logged_in() is (call is change_password)


@both_calls
def test_concurrent_login_with_the_old_password_opens_no_session_that_lasts(app, call):
    for number in range(5):
        username = f"ada {number}"
        ada, client = create_logged_in_client(app, username), app.test_client()
        (status, _), response = run_all(lambda: call(ada), lambda: client.login(username))  # noqa: B023
        assert status in (200, 204)
        assert response.status_code in (200, 401)
        assert not client.is_logged_in()
        assert ada.is_logged_in() is (call is change_password)


@pytest.mark.parametrize(
    "calls",
    [
        (change_password, log_out),
        (change_password, change_password),
        (change_password, delete_account),
        (delete_account, delete_account),
        (delete_account, log_out),
    ],
)
def test_of_two_concurrent_calls_one_wins(app, calls):
    for number in range(3):
        username = f"ada {number}"
        ada = create_logged_in_client(app, username)
        clients = [create_other_client(ada) for _ in calls]
        statuses = run_concurrently(2, lambda number: calls[number](clients[number])[0])  # noqa: B023
        [winner] = [number for number, status in enumerate(statuses) if status < 300]
        assert statuses[1 - winner] in (401, 403)
        is_changed, is_deleted = calls[winner] is change_password, calls[winner] is delete_account
        assert [client.is_logged_in() for client in clients] == [is_changed and number == winner for number in range(2)]
        assert not ada.is_logged_in()
        assert can_log_in(app, NEW_PASSWORD, username) is is_changed
        assert can_log_in(app, PASSWORD, username) is not (is_changed or is_deleted)


def test_concurrent_creation_of_conversations_and_account_deletion_leave_no_rows(app):
    for number in range(5):
        ada = create_logged_in_client(app, f"ada {number}")
        clients = [create_other_client(ada) for _ in range(6)]
        creations = [lambda client=client: client.post("/api/conversations", json={"name": "x"}) for client in clients]
        (status, _), *responses = run_all(lambda: delete_account(ada), *creations)  # noqa: B023
        assert status == 204
        assert {response.status_code for response in responses} <= {201, 401}
        assert count_rows(app) == [0, 0, 0]
