"""Changing the password and deleting the account."""

import pytest
from sqlalchemy import func, select

from app import db
from app.models import Conversation, Message, User
from tests.conftest import PASSWORD, can_log_in, create_logged_in_client, create_other_client, echo, log_in
from tests.helpers.data import get_answer
from tests.helpers.server import run_all, run_concurrently

NEW_PASSWORD = "battery staple"
PASSWORD_CHANGED = (200, {"message": "Password changed successfully"})
WRONG_PASSWORD = (403, {"error": "Wrong password"})
LOGIN_REQUIRED = (401, {"error": "Login required"})


def change_password(client, password=PASSWORD, new_password=NEW_PASSWORD):
    return get_answer(client.put("/api/password", json={"current_password": password, "new_password": new_password}))


def delete_account(client, password=PASSWORD):
    return get_answer(client.delete("/api/account", json={"password": password}))


def log_out(client):
    return get_answer(client.logout())


both_calls = pytest.mark.parametrize("call", [change_password, delete_account])


def count_rows(app):
    """Return how many users, conversations and messages there are."""
    with app.app_context():
        return [db.session.scalar(select(func.count()).select_from(model)) for model in (User, Conversation, Message)]


@pytest.fixture
def app(make_app):
    return make_app(echo)


# Changing the password


@pytest.mark.parametrize("new_password", [NEW_PASSWORD, PASSWORD], ids=["another", "the same"])
def test_change_password_ends_all_sessions_but_this_one(app, ada, bob, new_password):
    others = log_in(app), create_other_client(ada)
    assert change_password(ada, new_password=new_password) == PASSWORD_CHANGED
    assert [client.is_logged_in() for client in (ada, bob, *others)] == [True, True, False, False]
    assert ada.get_statuses() == {"ada": "Online", "bob": "Online"}
    assert can_log_in(app, new_password)


def test_session_after_change_password_is_shared_and_ended_like_any_other(app, ada):
    change_password(ada)
    others = log_in(app, password=NEW_PASSWORD), create_other_client(ada)
    assert ada.logout().status_code == 200
    assert [client.is_logged_in() for client in others] == [False, False]


def test_change_password_sets_a_cookie_as_login_does(ada):
    before = ada.get_cookie("chatbot_session")
    change_password(ada)
    cookie = ada.get_cookie("chatbot_session")
    assert cookie.value != before.value
    assert abs((cookie.expires - before.expires).total_seconds()) < 60
    assert (cookie.http_only, cookie.same_site, cookie.path) == (before.http_only, before.same_site, before.path)


def test_change_password_replaces_the_password(app, ada):
    change_password(ada)
    assert [can_log_in(app, password) for password in (NEW_PASSWORD, PASSWORD)] == [True, False]
    assert change_password(ada, PASSWORD, "third") == WRONG_PASSWORD
    assert change_password(ada, NEW_PASSWORD, "third") == PASSWORD_CHANGED
    assert can_log_in(app, "third")


@pytest.mark.parametrize("password", [" a ", "e\u0301", "😀" * 1024, "\ufeffa"])
def test_change_password_accepts_any_visible_password(app, ada, password):
    assert change_password(ada, new_password=password) == PASSWORD_CHANGED
    assert can_log_in(app, password)
    assert not can_log_in(app, password[:-1])


def test_password_min_length_applies_to_the_new_password_only(make_app):
    ada = make_app().test_client()
    ada.signup("ada", "a")
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
    assert [call(copy) for call in (change_password, delete_account)] == [LOGIN_REQUIRED] * 2


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
    ada.send_message(ada.create_conversation())
    before = count_rows(app), ada.observe()
    assert call(ada, password) == WRONG_PASSWORD
    assert (count_rows(app), ada.observe()) == before
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
    with app.app_context():
        while_hashing(db.engine.pool.checkedout)
    assert call(ada)[0] in (200, 204)
    assert while_hashing.results == [0]


@both_calls
@pytest.mark.parametrize(
    ("first_call", "status", "passwords"),
    [
        (log_out, 200, [PASSWORD]),
        (lambda client: change_password(client, new_password="changed first"), 200, ["changed first"]),
        (delete_account, 204, []),
    ],
    ids=["logout", "password change", "account deletion"],
)
def test_end_of_the_session_during_hashing_wins(app, ada, while_hashing, call, first_call, status, passwords):
    phone = create_other_client(ada)
    while_hashing(lambda: first_call(phone)[0])
    assert call(ada)[0] in (401, 403)
    assert while_hashing.results == [status]
    assert not ada.is_logged_in()
    assert [each for each in (PASSWORD, "changed first", NEW_PASSWORD) if can_log_in(app, each)] == passwords
    assert count_rows(app) == [len(passwords), 0, 0]


@both_calls
def test_login_during_whose_hashing_the_password_is_changed_or_the_account_deleted_returns_401(
    app, ada, while_hashing, call
):
    client = app.test_client()
    while_hashing(lambda: call(ada)[0])
    assert client.login("ada").status_code == 401
    assert while_hashing.results in ([200], [204])
    assert [client.is_logged_in(), ada.is_logged_in()] == [False, call is change_password]


@pytest.mark.parametrize(
    "calls",
    [
        *((change_password, other) for other in (log_out, change_password, delete_account)),
        *((delete_account, other) for other in (log_out, delete_account)),
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
