"""`flask users`, `flask demo` and `flask prune`, and how they report that the database cannot be used."""

import os
import pty
import re
import subprocess
import sys
from contextlib import suppress

import pytest

from app import create_app, db
from tests.conftest import CHEAP_HASH, PASSWORD, can_log_in, create_logged_in_client, log_in, on_sqlite
from tests.helpers.cli import invoke
from tests.helpers.data import add_conversations, count_messages, execute, get_answer, get_ids
from tests.helpers.server import ROOT, TIMEOUT, find_free_port

TIMESTAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"
EXISTS = (1, [], ["Error: Username already exists"])
UNKNOWN = (1, [], ["Error: Username does not exist"])
NEW_PASSWORD = "battery staple"
INVALID_USERNAME = "username must not begin or end with a space or contain invisible characters"
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
    shown, answers = b"", iter(answers)
    with suppress(OSError):  # by which Linux reports that the program has ended
        while chunk := os.read(terminal, 1000):
            shown += chunk
            if shown.endswith(b": "):
                os.write(terminal, next(answers).encode() + b"\n")
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown.decode()


# flask users


def test_users_list_shows_status_last_login_and_counts(app, client):
    client.signup("never there")
    here = create_logged_in_client(app, "here")
    for _ in range(2):
        here.send_message(here.create_conversation())
    here.create_conversation()
    execute(app, "UPDATE message SET created_at = '2026-01-31T12:00:00.000000Z' WHERE id <= 3")
    create_logged_in_client(app, "gone").logout()
    create_logged_in_client(app, "refused")
    invoke(app, "users", "disable", "refused")
    status, lines, errors = invoke(app, "users", "list")
    patterns = [
        "ID +STATUS +LAST LOGIN +CONVERSATIONS +MESSAGES +LAST 24 H +USERNAME",
        "1 +Offline +never +0 +0 +0 +never there",
        f"2 +Online +{TIMESTAMP} +3 +4 +1 +here",
        f"3 +Offline +{TIMESTAMP} +0 +0 +0 +gone",
        f"4 +Disabled +{TIMESTAMP} +0 +0 +0 +refused",
    ]
    assert (status, errors) == (0, [])
    for pattern, line in zip(patterns, lines, strict=True):
        assert re.fullmatch(f" *{pattern}", line)


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


def test_users_set_password_ends_sessions_unless_it_is_invalid(app, ada, bob):
    assert invoke(app, "users", "set-password", "ada", input="\n")[0] == 1
    assert ada.is_logged_in()
    changed = (0, ["Changed the password of ada"], [])
    assert invoke(app, "users", "set-password", "ada", input=NEW_PASSWORD) == changed
    assert (ada.is_logged_in(), bob.is_logged_in()) == (False, True)
    assert [can_log_in(app, password) for password in (PASSWORD, NEW_PASSWORD)] == [False, True]


def test_users_disable_ends_sessions_and_enable_allows_logins_again(app, ada, bob):
    for _ in range(2):
        assert invoke(app, "users", "disable", "ada") == (0, ["Disabled ada"], [])
    assert bob.get_statuses() == {"ada": "Offline", "bob": "Online"}
    assert get_answer(ada.login("ada")) == (403, {"error": "This account is disabled"})
    assert ada.login("ada", "wrong").status_code == 401
    assert not ada.is_logged_in()
    for _ in range(2):
        assert invoke(app, "users", "enable", "ada") == (0, ["Enabled ada"], [])
        assert ada.login("ada").status_code == 200
    assert ada.is_logged_in()


@pytest.mark.parametrize(
    ("arguments", "answer", "status", "is_deleted"),
    [(["--yes"], "", 0, True), ([], "y\n", 0, True), ([], "n\n", 1, False), ([], "", 1, False)],
)
def test_users_delete_asks_first(app, ada, bob, arguments, answer, status, is_deleted):
    ada.send_message(ada.create_conversation())
    assert invoke(app, "users", "delete", "ada", *arguments, input=answer)[0] == status
    assert list_usernames(app) == (["bob"] if is_deleted else ["ada", "bob"])
    assert (ada.is_logged_in(), count_messages(app)) == ((False, 0) if is_deleted else (True, 2))


@pytest.mark.parametrize("command", ["set-password", "delete", "disable", "enable"])
def test_users_command_with_unknown_name_returns_1(app, bob, command):
    assert invoke(app, "users", command, "ada", input=NEW_PASSWORD) == UNKNOWN
    assert bob.is_logged_in()


@pytest.mark.slow
@on_sqlite
def test_users_commands_print_what_the_console_can_show(client, database):
    name = "\u0410d\u00e0"
    client.signup(name)
    for arguments in (["list"], ["delete", name, "--yes"]):
        status, output, errors = run_users(database, *arguments, PYTHONIOENCODING="cp1252")
        assert (status, errors, b"\\u0410d\xe0" in output) == (0, b"", True), arguments


@on_sqlite
def test_users_add_with_password_in_another_encoding_returns_1(app, database):
    result = run_users(database, "add", "ada", input=b"p\xe4ssword\n", PYTHONIOENCODING="utf-8")
    assert result == (1, b"", b"Error: password must be text in utf-8\n")


@pytest.mark.slow
@on_sqlite
def test_users_set_password_at_a_terminal_asks_twice_without_echo(app, ada, database):
    answers = ["typo", NEW_PASSWORD, NEW_PASSWORD, NEW_PASSWORD]
    status, shown = run_users_at_terminal(database, "set-password", "ada", answers=answers)
    assert (status, NEW_PASSWORD in shown, shown.count("Repeat for confirmation: ")) == (0, False, 2)
    assert shown.splitlines()[-1] == "Changed the password of ada"
    assert can_log_in(app, NEW_PASSWORD)


# flask demo


def test_demo_adds_users_with_conversations_in_every_status_to_continue(app):
    status, [line], errors = invoke(app, "demo")
    assert (status, errors) == (0, [])
    usernames, password = re.fullmatch("Log in as (.+); the password is: (.+)", line).groups()
    clients = [log_in(app, username, password) for username in usernames.split(", ")]
    conversations = [item["messages"] for client in clients for item in client.list_conversations()]
    assert [] in conversations
    for messages in conversations:
        assert [message["sender"] for message in messages] == ["user", "bot"] * (len(messages) // 2)
    ends = {(message.get("status"), message.get("error")) for messages in conversations for message in messages}
    errors = {None: None, "failed": "The bot failed to answer", "stopped": None, "truncated": None, "in_progress": None}
    assert ends == set(errors.items())
    [first, *_] = clients[0].list_conversations()
    exchange = clients[0].send_message(first["id"], "Is it still you?").json
    assert clients[0].list_messages(first["id"]) == first["messages"] + exchange


def test_demo_with_an_existing_username_returns_1_and_adds_nothing(app, client):
    client.signup("barbara")
    assert invoke(app, "demo") == EXISTS
    assert list_usernames(app) == ["barbara"]
    assert client.login("barbara").status_code == 200
    assert client.list_conversations() == []


# flask prune


@pytest.mark.parametrize("count", [1, 45])
def test_prune_deletes_conversations_unchanged_since_the_date_with_their_messages(app, ada, count):
    old = add_conversations(app, ada, count, messages=1)
    kept_id = ada.create_conversation()
    execute(app, "UPDATE conversation SET updated_at = '2026-01-31T23:59:59.000000Z' WHERE id < :id", id=kept_id)
    assert invoke(app, "prune", "--before", "2026-01-31")[1] == ["Deleted 0 conversations"]
    assert get_ids(ada.list_conversations()) == [*old, kept_id]
    deleted = f"Deleted {count} conversation{'' if count == 1 else 's'}"
    assert invoke(app, "prune", "--before", "2026-02-01") == (0, [deleted], [])
    assert (get_ids(ada.list_conversations()), count_messages(app)) == ([kept_id], 0)


@pytest.mark.parametrize(
    ("date", "error"), [("2999-01-01", "Invalid value for --before: must not be in the future"), ("today", "%Y-%m-%d")]
)
def test_prune_with_an_invalid_date_returns_2_and_deletes_nothing(app, ada, date, error):
    ada.create_conversation()
    status, _, errors = invoke(app, "prune", "--before", date)
    assert (status, error in errors[-1]) == (2, True)
    assert len(ada.list_conversations()) == 1


# The database


@pytest.mark.parametrize("command", DATABASE_COMMANDS)
@pytest.mark.parametrize(
    ("url", "start"),
    [
        ("sqlite:///{folder}/empty.db", "The database lacks its tables: run python -m flask db upgrade"),
        ("postgresql://chat:hidden@127.0.0.1:{port}/chat", "The database of DATABASE_URL cannot be used ("),
    ],
    ids=["no tables", "no server"],
)
def test_command_without_tables_or_server_prints_one_line_without_the_password(tmp_path, command, url, start):
    url = url.format(folder=tmp_path, port=find_free_port())
    app = create_app({"DATABASE_URL": url, "PASSWORD_HASH_METHOD": CHEAP_HASH})
    status, lines, [error] = invoke(app, *command.split())
    assert (status, lines, "hidden" in error) == (1, [], False)
    assert error.startswith(f"Error: {start}")
    with app.app_context():
        db.engine.dispose()
