"""The README's claims: its commands, its snippets, its names of settings and files."""

import json
import re
import subprocess

from dotenv import dotenv_values

from app.cli import DEMO
from config import SETTINGS, load_config
from tests.helpers.readme import README, get_block
from tests.helpers.server import ROOT, TIMEOUT

CHAT = ROOT / "tests" / "typescript" / "chat"
INSTALL = "python3 -m venv .venv && .venv/bin/python -m pip install -q -r requirements.txt && .venv/bin/python"


def test_each_of_the_two_commands_is_one_line_of_a_readme_of_at_most_300():
    for command in ("run.py", "-m pytest"):
        assert f"```bash\n{INSTALL} {command}\n```" in README
    assert len(README.splitlines()) <= 300


def test_usernames_of_readme_and_demo_differ():
    names = re.findall(r'"?username"?: "(\w+)"', README)
    assert len(names) > 2
    assert not set(names) & set(DEMO)


def test_proxy_and_calls_of_a_front_end_are_those_of_the_tested_pages():
    assert (CHAT / "vite.config.mjs").read_text() == get_block("js", "proxy")
    for call in ("const { chat, show } = createChat(", "useChat({ chat, resume: true });"):
        assert call in get_block("ts", "createChat")
        assert call in (CHAT / "main.tsx").read_text()


def test_installed_packages_of_a_front_end_are_those_of_the_tested_pages():
    package = json.loads((CHAT / "package.json").read_text())
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


def test_named_settings_and_linked_files_exist():
    names = {*re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b", README)} - {"TEST_DATABASE_URL"}
    assert names - {*SETTINGS} == set()
    paths = re.findall(r"\]\((?!https?:)([^)]+)\)", README)
    assert [path for path in paths if not (ROOT / path).is_file()] == []
