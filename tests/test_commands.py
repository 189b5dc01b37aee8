"""`flask demo` and `flask users`: what they do, and how they say that they cannot."""

import os
import re
import subprocess
import sys

from tests.conftest import PASSWORD, newcomer
from tests.serving import ROOT, crowd, free_port


def flask(*arguments, url):
    """Run `python -m flask` as people do; return its exit status, what it printed, and what it complained of."""
    done = subprocess.run(
        [sys.executable, "-m", "flask", *arguments],
        cwd=ROOT,
        env={**os.environ, "DATABASE_URL": url, "PASSWORD_HASH_METHOD": "pbkdf2:sha256:1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()


def both(url):
    return crowd(2, lambda number: flask(("demo", "users")[number], url=url))


def run(app, command):
    """The same within this process."""
    result = app.test_cli_runner().invoke(args=[command])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout.splitlines(), result.stderr.splitlines()


def test_the_demo_fills_the_database_for_a_front_end_to_show(app):
    status, [line], complaints = run(app, "demo")
    assert (status, complaints) == (0, [])
    names, password = re.fullmatch("Log in as (.+); the password is: (.+)", line).groups()
    assert len(names.split(", ")) > 1
    shown = []
    for name in names.split(", "):
        person = app.test_client()
        assert person.login(name, password).status_code == 200
        shown += person.get("/api/conversations").json
    assert len(shown) > 2
    assert any(talk["messages"] for talk in shown)
    for talk in shown:
        assert [message["sender"] for message in talk["messages"]] == ["user", "bot"] * (len(talk["messages"]) // 2)


def test_a_demo_conversation_goes_on(app):
    run(app, "demo")
    charles = app.test_client()
    charles.login("charles", "demo password")
    talk = charles.get("/api/conversations").json[0]
    pair = charles.send(talk["id"], "Is it still you?").json
    assert charles.get(f"/api/conversations/{talk['id']}").json["messages"] == talk["messages"] + pair


def test_a_second_demo_says_no_and_doubles_nothing(app, client):
    run(app, "demo")
    before = run(app, "users")
    client.login("charles", "demo password")
    talks = client.get("/api/conversations").json
    assert run(app, "demo") == (1, [], ["Error: the demo's users exist already"])
    assert client.get("/api/conversations").json == talks
    client.logout()
    assert [line.split()[-1] for line in run(app, "users")[1]] == [line.split()[-1] for line in before[1]]


def test_a_demo_takes_nobody_s_name(app, client):
    client.signup("barbara")
    assert run(app, "demo") == (1, [], ["Error: the demo's users exist already"])
    assert [line.split()[-1] for line in run(app, "users")[1]] == ["barbara"]
    assert client.login("barbara", PASSWORD).status_code == 200
    assert client.get("/api/conversations").json == []


def test_users_are_listed_with_their_status(app, client):
    client.signup("never there")
    newcomer(app, "here")
    newcomer(app, "gone").logout()
    status, lines, complaints = run(app, "users")
    assert (status, complaints) == (0, [])
    moment = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"
    patterns = ["1 +Offline +never +never there", f"2 +Online +{moment} +here", f"3 +Offline +{moment} +gone"]
    assert [bool(re.fullmatch(f" *{pattern}", line)) for pattern, line in zip(patterns, lines, strict=True)] == [
        True
    ] * 3
    assert len({re.search(r"\S+( there)?$", line).start() for line in lines}) == 1


def test_who_is_online_is_seen_from_another_process(app, database):
    newcomer(app, "here")
    newcomer(app, "gone").logout()
    status, lines, complaints = flask("users", url=database)
    assert (status, complaints) == (0, [])
    assert [(line.split()[1], line.split()[-1]) for line in lines] == [("Online", "here"), ("Offline", "gone")]


def test_where_nobody_is_nobody_is_listed(app):
    assert run(app, "users") == (0, [], [])


def test_both_commands_are_there_for_python_m_flask(database):
    status, [line], complaints = flask("demo", url=database)
    assert (status, complaints) == (0, [])
    assert line.startswith("Log in as charles")
    status, lines, complaints = flask("users", url=database)
    assert (status, complaints) == (0, [])
    assert [line.split() for line in lines] == [
        [str(n), "Offline", "never", name] for n, name in enumerate(("charles", "alan", "barbara"), 1)
    ]


def test_without_tables_one_line_says_what_to_type(empty_database):
    for status, lines, complaints in both(empty_database):
        assert (status, lines, len(complaints)) == (1, [], 1)
        assert complaints[0].startswith("Error: The database lacks its tables: run python -m flask db upgrade")


def test_without_a_server_one_line_says_so():
    for status, lines, complaints in both(f"postgresql://chat:hidden@127.0.0.1:{free_port()}/chat"):
        assert (status, lines, len(complaints)) == (1, [], 1)
        assert complaints[0].startswith("Error: The database is unavailable")
        assert "hidden" not in complaints[0]
