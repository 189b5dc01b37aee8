"""Clients generated from the API description, in TypeScript and Python: they generate, compile, and work."""

import os
import sys
from importlib.util import find_spec

import pytest

from tests.helpers.npm import install, needs_npm, run, run_npm

# Uses the API by openapi-python-client, as the programs in tests/typescript do by the others.
PYTHON_PROGRAM = """
import os

from generated.api.auth import get_current_user, login, logout, signup
from generated.api.conversations import change_conversation, create_conversation, create_title, list_conversations
from generated.api.messages import edit_message, follow_reply, list_messages, list_versions, send_message, stop_reply
from generated.client import Client
from generated.models import *
from generated.types import UNSET

client = Client(base_url=os.environ["API"])
credentials = Credentials(username="python", password="correct horse")
user = signup.sync(client=client, body=credentials)
assert signup.sync(client=client, body=credentials).error == "Username already exists"
assert get_current_user.sync_detailed(client=client).status_code == 401
assert login.sync(client=client, body=credentials).user.user_id == user.user_id
assert get_current_user.sync(client=client).user.username == "python"

id = create_conversation.sync(client=client, body=ConversationInput(name="First conversation")).id
message, reply = send_message.sync(id, client=client, body=MessageInput(text="Hello"), idempotency_key="first")
assert (message.text, reply.sender, reply.status) == ("Hello", "bot", UNSET) and reply.text
other, other_reply = edit_message.sync(id, message.id, client=client, body=MessageInput(text="Hello again"))
assert [version.text for version in list_versions.sync(id, other.id, client=client)] == ["Hello", "Hello again"]
assert list_messages.sync(id, client=client, versions=1)[0].versions == [message.id, other.id]
failed = send_message.sync_detailed(id, client=client, body=MessageInput(text="/fail"))
assert (failed.status_code, failed.parsed.error) == (502, "The bot failed to answer")
assert list_messages.sync(id, client=client)[-1].error == "The bot failed to answer"
assert b"event: done" in follow_reply.sync_detailed(id, other_reply.id, client=client).content
assert stop_reply.sync(id, other_reply.id, client=client).text == other_reply.text

assert create_title.sync(id, client=client).name == "Hello again"
assert change_conversation.sync(id, client=client, body=ConversationChange(archived=True)).archived
assert list_conversations.sync(client=client, archived=False) == []
assert [item.id for item in list_conversations.sync(client=client, archived=True)] == [id]
logout.sync(user.user_id, client=client)
assert get_current_user.sync(client=client).error == "Login required"
"""


@pytest.fixture(scope="module")
def description(server):
    """The text of the API description as served."""
    with server.client() as client:
        return client.get("/api/openapi.json").body.decode()


def generate(folder, description, script="generate"):
    """Generate clients of an API description by a script of package.json."""
    (folder / "openapi.json").write_text(description)
    run_npm(folder, "run", script)


@pytest.fixture(scope="module")
def clients(description, tmp_path_factory):
    """A copy of tests/typescript with the clients, generated, type-checked and built."""
    folder = install(".", tmp_path_factory.mktemp("clients"))
    generate(folder, description)
    run_npm(folder, "run", "--silent", "check")
    run_npm(folder, "run", "--silent", "build")
    return folder


@pytest.mark.skipif(not find_spec("openapi_python_client"), reason="openapi-python-client is not installed")
def test_generated_python_client_uses_the_api(server, description, tmp_path):
    (tmp_path / "openapi.json").write_text(description)
    (tmp_path / "program.py").write_text(PYTHON_PROGRAM)
    generate = ["openapi_python_client", "generate", "--path=openapi.json", "--output-path=generated", "--meta=none"]
    # The generator formats what it has written by ruff, from the same environment as itself.
    environ = {"PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])}
    environ["API"] = f"http://127.0.0.1:{server.port}"
    for command in (["-m", *generate, "--fail-on-warning"], ["program.py"]):
        process = run(tmp_path, sys.executable, *command, **environ)
        assert process.returncode == 0, process.stdout + process.stderr


@needs_npm
@pytest.mark.parametrize("generator", ["openapi-typescript", "hey-api", "orval"])
def test_generated_client_compiles_and_uses_the_api(clients, server, generator):
    process = run(clients, "node", f"build/{generator}.js", API=f"http://127.0.0.1:{server.port}")
    assert process.returncode == 0, process.stderr


@needs_npm
def test_incompatible_description_fails_the_type_check(clients, description):
    changes = {
        '"sender":{': '"author":{',
        '"/api/logout/{user_id}":{': '"/api/sessions/{user_id}":{',
        '"name":"before"': '"name":"until"',
        '"required":["text"],"properties":{"text":{"type"': '"required":["body"],"properties":{"body":{"type"',
    }
    for old, new in changes.items():
        assert old in description
        description = description.replace(old, new)
    generate(clients, description, "generate:openapi-typescript")
    errors = run(clients, "npm", "run", "--silent", "check").stdout
    for name in ("sender", "before", "text"):
        assert f"'{name}' does not exist" in errors, errors
    assert "'\"/api/logout/{user_id}\"' is not assignable" in errors, errors
