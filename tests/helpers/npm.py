"""Projects in TypeScript: their packages from npm, and their commands."""

import os
import shutil
import subprocess

import pytest

from tests.helpers.server import ROOT, TIMEOUT

needs_npm = pytest.mark.skipif(
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


def install(source, folder):
    """Copy the files of a folder in tests/typescript into another folder, and install their packages there."""
    for path in (ROOT / "tests" / "typescript" / source).iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    run_npm(folder, "install", "--no-audit", "--no-fund", "--prefer-offline")
    return folder
