"""`flask users`, `flask demo` and `flask prune`, and how they report that the database cannot be used."""

import os
import pty
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import func, select, update

from app import create_app, db
from app.models import Conversation, Message
from tests.conftest import CHEAP_HASH, PASSWORD, can_log_in, create_logged_in_client
from tests.helpers.cli import invoke
from tests.helpers.server import ROOT, TIMEOUT, find_free_port

TIMESTAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"
DEMO_EXISTS = (1, [], ["Error: the demo's users exist already"])
EXISTS = (1, [], ["Error: Username already exists"])
UNKNOWN = (1, [], ["Error: Username does not exist"])
NEW_PASSWORD = "battery staple"
UNPRINTABLE = "\u0410d\u00e0"
INVALID_USERNAME = "username must not begin or end with a space or contain invisible characters"
COMMANDS_FOR_ONE_USER = ["set-password", "delete", "disable", "enable"]
DATABASE_COMMANDS = ["demo", "users list", "users add ada", "users disable ada", "prune --before 2026-01-31"]


def list_users(app):
    """Return the columns of each user that `flask users list` prints."""
    status, [_, *lines], errors = invoke(app, "users", "list")
    assert (status, errors) == (0, [])
    return [line.split(maxsplit=6) for line in lines]


def list_usernames(app):
    return [columns[-1] for columns in list_users(app)]


def run_users(database, *arguments, input=b"", **environ):
    """Run `flask users` as a program; return its exit status, its output and its errors as bytes."""
    environ = {**os.environ, "DATABASE_URL": database, "PASSWORD_HASH_METHOD": CHEAP_HASH, **environ}
    command = [sys.executable, "-m", "flask", "users", *arguments]
    process = subprocess.run(command, cwd=ROOT, env=environ, input=input, capture_output=True, timeout=TIMEOUT)
    return process.returncode, process.stdout, process.stderr


def run_users_at_terminal(database, *arguments, answers):
    """Run `flask users` at a pseudo-terminal, and answer its prompts; return its exit status and what it shows."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        environ = {**os.environ, "DATABASE_URL": database, "PASSWORD_HASH_METHOD": CHEAP_HASH}
        os.execve(sys.executable, [sys.executable, "-m", "flask", "users", *arguments], environ)
    shown = b""
    answers = iter(answers)
    while chunk := read_terminal(terminal):
        shown += chunk
        if shown.endswith(b": "):
            os.write(terminal, next(answers).encode() + b"\n")
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown.decode()


def read_terminal(terminal):
    """Return what a program writes to its terminal; b"" when it has ended, which Linux reports as an error."""
    try:
        return os.read(terminal, 1000)
    except OSError:
        return b""


# flask users


def test_users_list_shows_status_last_login_and_counts(app, client):
    client.signup("never there")
    here = create_logged_in_client(app, "here")
    here.send_message(here.create_conversation())
    here.send_message(here.create_conversation())
    here.create_conversation()
    with app.app_context():
        db.session.execute(update(Message).where(Message.id <= 2).values(created_at=datetime.now(UTC) - timedelta(1.1)))
        db.session.commit()
    create_logged_in_client(app, "gone").logout()
    create_logged_in_client(app, "refused")
    invoke(app, "users", "disable", "refused")
    status, lines, errors = invoke(app, "users", "list")
    patterns = [
        "ID +STATUS +LAST LOGIN +CONVERSATIONS +MESSAGES +LAST 24 H +USERNAME",
        "1 +Offline +never +0 +0 +0 +never there",
        f"2 +Online +{TIMESTAMP} +3 +4 +2 +here",
        f"3 +Offline +{TIMESTAMP} +0 +0 +0 +gone",
        f"4 +Disabled +{TIMESTAMP} +0 +0 +0 +refused",
    ]
    assert (status, errors) == (0, [])
    for pattern, line in zip(patterns, lines, strict=True):
        assert re.fullmatch(f" *{pattern}", line)
    assert len({re.search(r"\S+( there)?$", line).start() for line in lines}) == 1  # the names are aligned


def test_users_list_after_a_restart_shows_who_has_not_logged_out(make_app):
    app = make_app()
    create_logged_in_client(app, "here")
    create_logged_in_client(app, "gone").logout()
    columns = list_users(make_app())
    assert [(status, username) for _, status, *_, username in columns] == [("Online", "here"), ("Offline", "gone")]


@pytest.mark.parametrize(("signup", "line"), [("open", f"{NEW_PASSWORD}\n"), ("closed", f"{NEW_PASSWORD}\r\nmore\n")])
def test_users_add_creates_a_user_with_the_password_of_the_first_line(make_app, signup, line):
    app = make_app(SIGNUP=signup)
    assert invoke(app, "users", "add", "\uff41da", input=line) == (0, ["Added ada"], [])
    assert list_usernames(app) == ["ada"]
    assert can_log_in(app, NEW_PASSWORD)
    assert invoke(app, "users", "add", "ada", input="another\n") == EXISTS
    assert not can_log_in(app, "another")


@pytest.mark.parametrize(
    ("name", "password", "error"),
    [
        ("ada", "", "password must be 8 to 1024 characters long and not blank"),
        ("ada", "short", "password must be 8 to 1024 characters long and not blank"),
        ("ada", "long\0enough", "password must not contain NUL"),
        ("ada", "\ud800" * 8, "password must be text in utf-8"),
        ("x" * 81, NEW_PASSWORD, "username must be 1 to 80 characters long and not blank"),
        ("ada ", NEW_PASSWORD, INVALID_USERNAME),
        ("a\udcff", NEW_PASSWORD, INVALID_USERNAME),
    ],
)
def test_users_add_with_invalid_name_or_password_returns_1(make_app, name, password, error):
    app = make_app(PASSWORD_MIN_LENGTH=8)
    data = f"{password}\n".encode(errors="surrogatepass")
    assert invoke(app, "users", "add", name, input=data) == (1, [], [f"Error: {error}"])
    assert list_usernames(app) == []


def test_users_set_password_ends_sessions(app, ada, bob):
    result = invoke(app, "users", "set-password", "ada", input=NEW_PASSWORD)
    assert result == (0, ["Changed the password of ada"], [])
    assert not ada.is_logged_in()
    assert bob.is_logged_in()
    assert [can_log_in(app, password) for password in (PASSWORD, NEW_PASSWORD)] == [False, True]


def test_users_set_password_with_invalid_password_changes_nothing(app, ada):
    assert invoke(app, "users", "set-password", "ada", input="\n")[0] == 1
    assert ada.is_logged_in()
    assert can_log_in(app, PASSWORD)


def test_users_disable_ends_sessions_and_enable_allows_logins_again(app, ada, bob):
    for _ in range(2):
        assert invoke(app, "users", "disable", "ada") == (0, ["Disabled ada"], [])
    assert not ada.is_logged_in()
    assert bob.get_statuses() == {"ada": "Offline", "bob": "Online"}
    response = ada.login("ada")
    assert (response.status_code, response.json) == (403, {"error": "This account is disabled"})
    assert ada.login("ada", "wrong").status_code == 401
    assert not ada.is_logged_in()
    assert invoke(app, "users", "enable", "ada") == (0, ["Enabled ada"], [])
    assert ada.login("ada").status_code == 200
    assert invoke(app, "users", "enable", "ada")[0] == 0
    assert ada.is_logged_in()


@pytest.mark.parametrize(
    ("arguments", "answer", "status", "is_deleted"),
    [(["--yes"], "", 0, True), ([], "y\n", 0, True), ([], "n\n", 1, False), ([], "", 1, False)],
)
def test_users_delete_asks_first(app, ada, bob, arguments, answer, status, is_deleted):
    ada.send_message(ada.create_conversation())
    assert invoke(app, "users", "delete", "ada", *arguments, input=answer)[0] == status
    assert list_usernames(app) == (["bob"] if is_deleted else ["ada", "bob"])
    assert ada.is_logged_in() is not is_deleted
    with app.app_context():
        assert db.session.scalar(select(func.count(Message.id))) == (0 if is_deleted else 2)


@pytest.mark.parametrize("command", COMMANDS_FOR_ONE_USER)
def test_users_command_with_unknown_name_returns_1(app, bob, command):
    assert invoke(app, "users", command, "ada", input=NEW_PASSWORD) == UNKNOWN
    assert bob.is_logged_in()


@pytest.mark.slow
@pytest.mark.parametrize(("encoding", "shown"), [("cp1252", b"\\u0410d\xe0"), ("ascii", b"\\u0410d\\xe0")])
def test_users_commands_print_what_the_console_can_show(app, client, database, encoding, shown):
    client.signup(UNPRINTABLE)
    for arguments in (["list"], ["disable", UNPRINTABLE], ["delete", UNPRINTABLE, "--yes"]):
        status, output, errors = run_users(database, *arguments, PYTHONIOENCODING=encoding)
        assert (status, errors) == (0, b""), arguments
        assert shown in output, arguments


def test_users_add_with_password_in_another_encoding_returns_1(app, database):
    result = run_users(database, "add", "ada", input=b"p\xe4ssword\n", PYTHONIOENCODING="utf-8")
    assert result == (1, b"", b"Error: password must be text in utf-8\n")


@pytest.mark.slow
@pytest.mark.parametrize("answers", [[NEW_PASSWORD] * 2, ["typo", NEW_PASSWORD, NEW_PASSWORD, NEW_PASSWORD]])
def test_users_set_password_at_a_terminal_asks_twice_without_echo(app, ada, database, answers):
    status, shown = run_users_at_terminal(database, "set-password", "ada", answers=answers)
    assert (status, NEW_PASSWORD in shown) == (0, False)
    assert shown.splitlines()[-1] == "Changed the password of ada"
    assert shown.count("Repeat for confirmation: ") == len(answers) / 2
    assert can_log_in(app, NEW_PASSWORD)


# flask demo


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


def test_demo_with_an_existing_username_returns_1_and_adds_nothing(app, client):
    client.signup("barbara")
    assert invoke(app, "demo") == DEMO_EXISTS
    assert list_usernames(app) == ["barbara"]
    assert client.login("barbara", PASSWORD).status_code == 200
    assert client.list_conversations() == []


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


@pytest.mark.parametrize(
    ("date", "error"), [("2999-01-01", "Invalid value for --before: must not be in the future"), ("today", "%Y-%m-%d")]
)
def test_prune_with_an_invalid_date_returns_2_and_deletes_nothing(app, ada, date, error):
    ada.create_conversation()
    status, _, errors = invoke(app, "prune", "--before", date)
    assert (status, error in errors[-1]) == (2, True)
    assert len(ada.list_conversations()) == 1


# The database


def invoke_on(url, command):
    """Run a command of an application on a database."""
    app = create_app({"DATABASE_URL": url, "PASSWORD_HASH_METHOD": CHEAP_HASH})
    result = invoke(app, *command.split())
    with app.app_context():
        db.engine.dispose()
    return result


@pytest.mark.parametrize("command", DATABASE_COMMANDS)
def test_command_without_tables_prints_one_line_that_says_what_to_run(empty_database, command):
    status, lines, [error] = invoke_on(empty_database, command)
    assert (status, lines) == (1, [])
    assert error.startswith("Error: The database lacks its tables: run python -m flask db upgrade")


@pytest.mark.parametrize("command", DATABASE_COMMANDS)
def test_command_without_database_server_prints_one_line_without_the_password(command):
    status, lines, [error] = invoke_on(f"postgresql://chat:hidden@127.0.0.1:{find_free_port()}/chat", command)
    assert (status, lines) == (1, [])
    assert error.startswith("Error: The database of DATABASE_URL cannot be used (")
    assert "hidden" not in error
