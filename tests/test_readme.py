"""The README's claims: its commands, its snippets, its names of settings and files."""

import json
import re
import subprocess

import pytest
from dotenv import dotenv_values

from app.cli import DEMO
from config import SETTINGS, load_config
from tests.helpers.readme import README, get_block
from tests.helpers.server import ROOT, TIMEOUT

INSTALL = "python3 -m venv .venv && .venv/bin/python -m pip install -q -r requirements.txt && .venv/bin/python"


@pytest.mark.parametrize("command", ["run.py", "-m pytest"])
def test_each_of_the_two_commands_is_one_line(command):
    assert f"```bash\n{INSTALL} {command}\n```" in README


def test_readme_has_at_most_300_lines():
    assert len(README.splitlines()) <= 300


def test_usernames_of_readme_and_demo_differ():
    names = re.findall(r'"?username"?: "(\w+)"', README)
    assert len(names) > 2
    assert not set(names) & set(DEMO)


def test_proxy_and_calls_of_a_front_end_are_those_of_the_tested_pages():
    chat = ROOT / "tests" / "typescript" / "chat"
    assert (chat / "vite.config.mjs").read_text() == get_block("js", "proxy")
    page = (chat / "main.tsx").read_text()
    for call in ("const { chat, show } = createChat(", "useChat({ chat, resume: true });"):
        assert call in get_block("ts", "createChat")
        assert call in page


def test_installed_packages_of_a_front_end_are_those_of_the_tested_pages():
    package = json.loads((ROOT / "tests" / "typescript" / "chat" / "package.json").read_text())
    installed = dict(re.findall(r"(\S+)@([\d.]+)", get_block("bash", "npm install")))
    assert package["dependencies"].keys() | {"vite"} == installed.keys()
    for name, version in {**package["dependencies"], **package["devDependencies"]}.items():
        assert f"{version}.".startswith(f"{installed.get(name, version)}.")


def test_commands_that_name_a_model_and_a_database_write_valid_settings(tmp_path):
    script = get_block("bash", "BOT_MODEL=").replace("createdb chat\n", "")
    subprocess.run(["bash", "-ec", script], cwd=tmp_path, timeout=TIMEOUT, check=True)
    values = dotenv_values(tmp_path / ".env")
    assert values.keys() == {"BOT_MODEL", "OPENAI_BASE_URL", "DATABASE_URL"}
    config = load_config(values)
    assert values == {**values, **{name: config[name] for name in ("BOT_MODEL", "OPENAI_BASE_URL")}}


@pytest.mark.parametrize("name", sorted({*re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b", README)} - {"TEST_DATABASE_URL"}))
def test_named_setting_exists(name):
    assert name in SETTINGS


@pytest.mark.parametrize("path", re.findall(r"\]\((?!https?:)([^)]+)\)", README))
def test_linked_file_exists(path):
    assert (ROOT / path).is_file()
