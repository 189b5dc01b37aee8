"""`flask demo`, `flask users` and `flask prune`, and how they report that the database cannot be used."""

import re
from datetime import UTC, datetime

import pytest
from sqlalchemy import func, select

from app import create_app, db
from app.models import Conversation, Message
from tests.conftest import CHEAP_HASH, PASSWORD, create_logged_in_client
from tests.helpers.cli import invoke
from tests.helpers.server import find_free_port

TIMESTAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"
DEMO_EXISTS = (1, [], ["Error: the demo's users exist already"])


def list_usernames(app):
    status, lines, errors = invoke(app, "users")
    assert (status, errors) == (0, [])
    return [line.split()[-1] for line in lines]


def test_demo_adds_users_with_conversations_in_every_status(app):
    status, [line], errors = invoke(app, "demo")
    assert (status, errors) == (0, [])
    usernames, password = re.fullmatch("Log in as (.+); the password is: (.+)", line).groups()
    conversations = []
    for username in usernames.split(", "):
        client = app.test_client()
        assert client.login(username, password).status_code == 200
        conversations += client.list_conversations()
    assert [] in [conversation["messages"] for conversation in conversations]
    for conversation in conversations:
        senders = [message["sender"] for message in conversation["messages"]]
        assert senders == ["user", "bot"] * (len(senders) // 2)
    statuses = {message.get("status") for conversation in conversations for message in conversation["messages"]}
    assert statuses == {None, "failed", "stopped", "truncated", "in_progress"}


def test_demo_conversation_can_be_continued(app, client):
    invoke(app, "demo")
    client.login("charles", "demo password")
    [conversation, *_] = client.list_conversations()
    exchange = client.send_message(conversation["id"], "Is it still you?").json
    assert client.list_messages(conversation["id"]) == conversation["messages"] + exchange


def test_second_demo_returns_1_and_adds_nothing(app, client):
    invoke(app, "demo")
    usernames = list_usernames(app)
    client.login("charles", "demo password")
    conversations = client.list_conversations()
    assert invoke(app, "demo") == DEMO_EXISTS
    assert client.list_conversations() == conversations
    assert list_usernames(app) == usernames


def test_demo_with_an_existing_username_returns_1_and_adds_nothing(app, client):
    client.signup("barbara")
    assert invoke(app, "demo") == DEMO_EXISTS
    assert list_usernames(app) == ["barbara"]
    assert client.login("barbara", PASSWORD).status_code == 200
    assert client.list_conversations() == []


def test_users_lists_each_user_with_status_and_last_login(app, client):
    client.signup("never there")
    create_logged_in_client(app, "here")
    create_logged_in_client(app, "gone").logout()
    status, lines, errors = invoke(app, "users")
    assert (status, errors) == (0, [])
    patterns = ["1 +Offline +never +never there", f"2 +Online +{TIMESTAMP} +here", f"3 +Offline +{TIMESTAMP} +gone"]
    for pattern, line in zip(patterns, lines, strict=True):
        assert re.fullmatch(f" *{pattern}", line)
    assert len({re.search(r"\S+( there)?$", line).start() for line in lines}) == 1  # the names are aligned


def test_users_without_users_prints_nothing(app):
    assert invoke(app, "users") == (0, [], [])


def test_users_after_a_restart_shows_who_has_not_logged_out(make_app):
    app = make_app()
    create_logged_in_client(app, "here")
    create_logged_in_client(app, "gone").logout()
    status, lines, errors = invoke(make_app(), "users")
    assert (status, errors) == (0, [])
    assert [(line.split()[1], line.split()[-1]) for line in lines] == [("Online", "here"), ("Offline", "gone")]


def invoke_on(url, command):
    """Run a command of an application on a database."""
    app = create_app({"DATABASE_URL": url, "PASSWORD_HASH_METHOD": CHEAP_HASH})
    result = invoke(app, *command.split())
    with app.app_context():
        db.engine.dispose()
    return result


@pytest.mark.parametrize("command", ["demo", "users", "prune --before 2026-01-31"])
def test_command_without_tables_prints_one_line_that_says_what_to_run(empty_database, command):
    status, lines, [error] = invoke_on(empty_database, command)
    assert (status, lines) == (1, [])
    assert error.startswith("Error: The database lacks its tables: run python -m flask db upgrade")


@pytest.mark.parametrize("command", ["demo", "users", "prune --before 2026-01-31"])
def test_command_without_database_server_prints_one_line_without_the_password(command):
    status, lines, [error] = invoke_on(f"postgresql://chat:hidden@127.0.0.1:{find_free_port()}/chat", command)
    assert (status, lines) == (1, [])
    assert error.startswith("Error: The database of DATABASE_URL cannot be used (")
    assert "hidden" not in error


# flask prune


@pytest.mark.parametrize("count", [0, 1, 45])
def test_prune_deletes_conversations_unchanged_since_the_date_with_their_messages(app, ada, count):
    kept_id = ada.create_conversation()
    with app.app_context():
        old = datetime(2026, 1, 31, 23, 59, 59, tzinfo=UTC)
        for _ in range(count):
            messages = [Message(sender="user", text="Hello", created_at=old)]
            db.session.add(Conversation(name="Old", user_id=1, created_at=old, updated_at=old, messages=messages))
        db.session.commit()
    assert invoke(app, "prune", "--before", "2026-01-31")[1] == ["Deleted 0 conversations"]
    deleted = f"Deleted {count} conversation{'' if count == 1 else 's'}"
    assert invoke(app, "prune", "--before", "2026-02-01") == (0, [deleted], [])
    assert [conversation["id"] for conversation in ada.list_conversations()] == [kept_id]
    with app.app_context():
        assert db.session.scalar(select(func.count()).select_from(Message)) == 0


def test_prune_keeps_a_conversation_that_changes_meanwhile(app, ada):
    first_id, second_id = ada.create_conversation(), ada.create_conversation()
    with app.app_context():
        before = datetime.now(UTC)
        ids = Conversation.list_unchanged_ids(before, 0, 20)
        db.session.commit()
        ada.send_message(first_id, "Hello")
        assert (ids, Conversation.prune(ids, before)) == ([first_id, second_id], 1)
    assert [conversation["id"] for conversation in ada.list_conversations()] == [first_id]


def test_prune_with_a_future_date_is_refused(app, ada):
    ada.create_conversation()
    status, _, errors = invoke(app, "prune", "--before", "2999-01-01")
    assert (status, errors[-1]) == (2, "Error: Invalid value for --before: must not be in the future")
    assert len(ada.list_conversations()) == 1


def test_prune_with_an_invalid_date_says_which_are_valid(app):
    status, _, errors = invoke(app, "prune", "--before", "yesterday")
    assert status == 2
    assert "'%Y-%m-%d'" in errors[-1]
