"""What the README says, as far as a test can hold it."""

import json
import re
import subprocess

import pytest

from app.routes.chat import DEMO
from config import SETTINGS
from tests.serving import PATIENCE, ROOT
from tests.test_browsers import NEEDS_CHROMIUM, browsing, serve_pages  # noqa: F401

README = (ROOT / "README.md").read_text()
SETUP = "python3 -m venv .venv && .venv/bin/python -m pip install -q -r requirements.txt && .venv/bin/python"


def block(language, containing):
    """Return the only code block of that language with that text in it."""
    blocks = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    (found,) = [text for text in blocks if containing in text]
    return found


@pytest.mark.parametrize("command", ["run.py", "-m pytest"])
def test_each_of_the_two_commands_is_one_line(command):
    assert f"```bash\n{SETUP} {command}\n```" in README


def test_whoever_follows_the_readme_takes_no_name_of_the_demo_s():
    names = re.findall(r'"?username"?: "(\w+)"', README)
    assert len(names) > 2
    assert not set(names) & set(DEMO)


def test_the_walk_with_curl_works_when_pasted(serve):
    walk = block("bash", "call $API/signup").replace(":5000", f":{serve().port}")
    shell = subprocess.run(["bash", "-s"], input=walk, capture_output=True, text=True, timeout=PATIENCE)
    assert shell.stderr == ""
    signup, login, me, status, pair, renamed, talks, deleted, logout = shell.stdout.splitlines()
    ada = {"id": 1, "user_id": 1, "username": "ada"}
    assert json.loads(signup) == {"message": "User created successfully", "user_id": 1}
    assert json.loads(login) == {"message": "Login successful", "user": ada}
    assert json.loads(me) == {"user": ada}
    assert json.loads(status)["users"][0]["status"] == "Online"
    assert [message["sender"] for message in json.loads(pair)] == ["user", "bot"]
    assert json.loads(renamed) == {"id": 1, "name": "A better name"}
    assert json.loads(talks) == [{**json.loads(renamed), "messages": json.loads(pair)}]
    assert deleted == ""
    assert json.loads(logout) == {"message": "User 1 logged out successfully"}


@pytest.mark.slow
@NEEDS_CHROMIUM
def test_the_snippet_for_a_front_end_works_in_a_browser(serve, serve_pages, tmp_path):  # noqa: F811
    pages = serve_pages()
    server = serve(CORS_ORIGINS=pages.origin)
    snippet = block("js", "fetch(").replace(":5000", f":{server.port}")
    script = f"""
        report.said = [];
        console.log = console.error = (...said) => report.said.push(said);
        (async () => {{ {snippet} }})().catch(error => report.said.push(`${{error}}`)).finally(() => tell());
    """
    with browsing(pages.add("snippet", f"http://localhost:{server.port}", script), tmp_path / "chromium"):
        said = pages.reports.get(timeout=2 * PATIENCE)["said"]
    *pieces, (stored, pair) = said
    assert stored == "stored"
    assert len(pieces) > 1
    assert "".join(piece for (piece,) in pieces) == pair[1]["text"]


def test_the_stream_with_curl_works_when_pasted(serve):
    (command,) = re.findall(r"With curl: `(curl [^`]*)`", README)
    walk = block("bash", "call $API/signup").replace(":5000", f":{serve().port}")
    before, _ = walk.split("call $API/conversations/$TALK -X DELETE")
    shell = subprocess.run(
        ["bash", "-s"], input=before + " ".join(command.split()), capture_output=True, text=True, timeout=PATIENCE
    )
    assert shell.stdout.count("event: delta\n") == 50
    assert "event: done\n" in shell.stdout


@pytest.mark.parametrize("name", sorted({*re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b", README)} - {"TEST_DATABASE_URL"}))
def test_a_setting_that_is_named_is_a_setting(name):
    assert name in SETTINGS


@pytest.mark.parametrize("path", re.findall(r"\]\((?!https?:)([^)]+)\)", README))
def test_a_file_that_is_linked_is_there(path):
    assert (ROOT / path).is_file()
