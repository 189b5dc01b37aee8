"""The README's commands and snippets, run as they are."""

import json
import os
import re
import subprocess
import sys

from tests.helpers.readme import README, get_block
from tests.helpers.server import ROOT, TIMEOUT


def run_in_bash(script):
    """Run a script, which must not print errors, and return its output."""
    result = subprocess.run(["bash", "-s"], input=script, capture_output=True, text=True, timeout=TIMEOUT)
    assert result.stderr == ""
    return result.stdout


def test_curl_commands_work_when_pasted(serve):
    example = get_block("bash", "call $API/signup").replace(":5000", f":{serve().port}")
    requests, end = run_in_bash(example).split("event: start\n")

    signup, login, user, status, exchange, renamed, conversations = map(json.loads, requests.splitlines())
    ada = {"id": 1, "user_id": 1, "username": "ada"}
    assert signup == {"message": "User created successfully", "user_id": 1}
    assert login == {"message": "Login successful", "user": ada}
    assert user == {"user": ada}
    assert status["users"][0]["status"] == "Online"
    assert [message["sender"] for message in exchange] == ["user", "bot"]
    assert renamed == {"id": 1, "name": "A better name"}
    assert conversations == [{**renamed, "messages": exchange}]

    assert "event: done\n" in end
    assert end.endswith('\n\n\n{"message":"User 1 logged out successfully"}\n')


def test_example_of_a_bot_replies_and_is_found_by_the_command(tmp_path):
    (tmp_path / "echo.py").write_text(get_block("python", "def echo_bot"))
    environ = {**os.environ, "PYTHONPATH": f"{tmp_path}", "DATABASE_URL": f"sqlite:///{tmp_path}/chat.db"}
    (options,) = re.findall(r"`python (-m flask --app echo) run`", README)
    command = [sys.executable, *options.split(), "db", "upgrade"]
    subprocess.run(command, cwd=ROOT, env=environ, timeout=TIMEOUT, check=True)
    script = (
        "from echo import app\n"
        "client = app.test_client()\n"
        "for path in ('signup', 'login'):\n"
        "    client.post(f'/api/{path}', json={'username': 'ada', 'password': 'x'})\n"
        "client.post('/api/conversations', json={'name': 'New'})\n"
        "_, reply = client.post('/api/conversations/1/messages', json={'text': 'Hello there'}).json\n"
        "assert reply['text'] == 'You wrote: Hello there'\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environ, timeout=TIMEOUT, check=True)
