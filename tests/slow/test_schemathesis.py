"""The served program against requests that schemathesis derives from the API description."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.helpers.server import TIMEOUT
from tests.slow.conftest import run_server

pytestmark = pytest.mark.skipif(not find_spec("schemathesis"), reason="schemathesis is not installed")

# The schema of events is that of their data, which schemathesis does not parse. Unknown query parameters are ignored. A
# username that is taken is a 400, which a schema cannot express.
SETTINGS = """
[generation]
allow-extra-parameters = false

[[operations]]
include-name = "POST /api/signup"
checks.positive_data_acceptance.expected-statuses = ["201", "400"]

[[operations]]
include-name = "GET /api/conversations/{conversation_id}/messages/{message_id}/events"
checks.response_schema_conformance.enabled = false
"""

# The hooks keep to what the description says in words: a visible character and no NUL in every text, usernames in NFKC
# without spaces around, and parameters that require another one. The password cannot be guessed, so that the user is
# not deleted; a 401 after a logout makes schemathesis log in again.
HOOKS = """
import os
from urllib.parse import urlencode

import requests
import schemathesis

API = os.environ["API"]
REQUIRED = {"before": {"limit": 1}, "after": {"limit": 1}}


@schemathesis.auth()
class Session:
    def get(self, case, context):
        credentials = {"username": "schemathesis", "password": os.environ["PASSWORD"]}
        return requests.post(f"{API}/api/login", json=credentials).cookies["chatbot_session"]

    def set(self, case, data, context):
        case.cookies = {**(case.cookies or {}), "chatbot_session": data}


def is_acceptable(text):
    return any("!" <= character <= "~" for character in text) and "\\0" not in text


@schemathesis.hook
def filter_body(context, body):
    texts = {name: value for name, value in body.items() if isinstance(value, str)} if isinstance(body, dict) else {}
    if not all("!" <= character <= "~" for character in texts.get("username", "")):
        return False
    return all(text == "" or is_acceptable(text) for text in texts.values())


@schemathesis.hook
def filter_query(context, query):
    query = query or {}
    is_short = len(urlencode(query, doseq=True)) < 2000  # gunicorn refuses a request line of 4,094 bytes
    return is_short and "cursor" not in query and is_acceptable(str(query.get("q", "q")))


@schemathesis.hook
def filter_case(context, case):
    return (case.headers or {}).get("Prefer", "respond-async") == "respond-async"  # other preferences are ignored


@schemathesis.hook
def before_call(context, case, kwargs):
    if "order" in (case.query or {}):
        case.query.pop("before", None)
    for name, required in REQUIRED.items():
        if name in (case.query or {}):
            case.query.update({**required, **case.query})
"""
OPTIONS = ("--max-examples=15", "--seed=1", "--continue-on-failure", "--no-color", "--warnings=off")


def test_served_program_matches_its_description(tmp_path):
    (tmp_path / "hooks.py").write_text(HOOKS)
    (tmp_path / "schemathesis.toml").write_text(SETTINGS)
    password, limit = "a password that cannot be guessed", "1000000 per second"
    with (
        run_server(f"sqlite:///{tmp_path}/chat.db", LOGIN_RATE_LIMIT=limit, SIGNUP_RATE_LIMIT=limit) as server,
        server.client() as client,
    ):
        client.signup("schemathesis", password)
        api = f"http://127.0.0.1:{server.port}"
        command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run"]
        environ = {"SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": f"{tmp_path}", "API": api, "PASSWORD": password}
        process = subprocess.run(
            [*command, f"{api}/api/openapi.json", *OPTIONS],
            cwd=tmp_path,
            env={**os.environ, **environ},
            capture_output=True,
            text=True,
            timeout=20 * TIMEOUT,
        )
        assert process.returncode == 0, process.stdout + process.stderr
        assert "Traceback" not in server.output
        assert not re.search(r"INFO [A-Z]+ \S+ 5\d\d ", server.output)
