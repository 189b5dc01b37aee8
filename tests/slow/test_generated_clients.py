"""TypeScript clients generated from the API description: they generate, compile, and work at run time."""

import os
import shutil
import subprocess

import pytest

from tests.helpers.server import ROOT, TIMEOUT

SOURCES = ("package.json", "tsconfig.json", "setup.ts", "openapi-typescript.ts", "hey-api.ts", "orval.ts")
GENERATORS = ("openapi-typescript", "hey-api", "orval")

pytestmark = pytest.mark.skipif(
    not (shutil.which("npm") and shutil.which("node")), reason="node and npm are not installed"
)


def run(folder, *command, **environ):
    """Run a command in a folder and return the finished process."""
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **environ},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=10 * TIMEOUT,
    )


def run_npm(folder, *arguments):
    """Run npm in a folder and assert that it succeeds."""
    process = run(folder, "npm", *arguments)
    assert process.returncode == 0, process.stdout + process.stderr


@pytest.fixture(scope="module")
def description(server):
    """The text of the API description as served."""
    with server.client() as client:
        return client.get("/api/openapi.json").body.decode()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of tests/typescript with the generators installed."""
    folder = tmp_path_factory.mktemp("clients")
    for name in SOURCES:
        shutil.copy(ROOT / "tests" / "typescript" / name, folder)
    run_npm(folder, "install", "--no-audit", "--no-fund")
    return folder


def generate(folder, description, script="generate"):
    """Generate clients of an API description by a script of package.json."""
    (folder / "openapi.json").write_text(description)
    run_npm(folder, "run", script)


@pytest.fixture(scope="module")
def clients(project, description):
    """The folder of the clients, generated, type-checked and built."""
    generate(project, description)
    run_npm(project, "run", "--silent", "check")
    run_npm(project, "run", "--silent", "build")
    return project


@pytest.mark.parametrize("generator", GENERATORS)
def test_generated_client_compiles_and_uses_the_api(clients, server, generator):
    process = run(clients, "node", f"build/{generator}.js", API=f"http://127.0.0.1:{server.port}")
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"sender":{', '"author":{'),
        ('"/api/logout/{user_id}":{', '"/api/sessions/{user_id}":{'),
        ('"name":"before"', '"name":"until"'),
        ('"required":["text"],"properties":{"text":{"type"', '"required":["body"],"properties":{"body":{"type"'),
    ],
)
def test_incompatible_description_fails_the_type_check(clients, description, old, new):
    assert old in description
    generate(clients, description.replace(old, new), "generate:openapi-typescript")
    assert "error TS" in run(clients, "npm", "run", "--silent", "check").stdout
