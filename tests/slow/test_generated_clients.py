"""TypeScript clients generated from the API description: they generate, compile, and work at run time."""

import pytest

from tests.helpers.npm import install, needs_npm, run, run_npm

GENERATORS = ("openapi-typescript", "hey-api", "orval")

pytestmark = needs_npm


@pytest.fixture(scope="module")
def description(server):
    """The text of the API description as served."""
    with server.client() as client:
        return client.get("/api/openapi.json").body.decode()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of tests/typescript with the generators installed."""
    return install(".", tmp_path_factory.mktemp("clients"))


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
