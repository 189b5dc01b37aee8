"""The time from a clone to the first answer in a page: the README's commands and its example, in Chromium.

Run it as `python -m tests.benchmark.first_answer`; it needs git, Chromium and the package playwright.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from playwright.sync_api import sync_playwright

from tests.helpers.model_server import running
from tests.helpers.readme import get_block
from tests.helpers.server import ROOT, TIMEOUT, find_free_port, find_listed_port


class PageHandler(BaseHTTPRequestHandler):
    """Sends an empty page."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html>")

    def log_message(self, *args):
        """Log nothing."""


def start(folder, port):
    """Run the README's first command in a folder; return the process as soon as the program is listening."""
    process = subprocess.Popen(
        ["bash", "-c", get_block("bash", ".venv/bin/python run.py")],
        cwd=folder,
        env={**os.environ, "PORT": str(port)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    for line in process.stdout:
        if "Listening at" in line:
            return process
    sys.exit("The program did not start")


def chat(port, page_port):
    """Run the README's example in a page until the reply has ended; return what the page shows."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(TIMEOUT * 1000)
        page.goto(f"http://localhost:{page_port}/")
        script = get_block("js", "EventSource(").replace(":5000", f":{port}")
        page.evaluate(f"async () => {{ {script} }}")
        page.locator("br").wait_for(state="attached")
        answer = page.locator("body").inner_text().strip()
        browser.close()
        return answer


def main():
    """Print the seconds since the beginning after each step."""
    port, page_port, started_at = find_free_port(), find_listed_port(), time.monotonic()

    def report(step):
        sys.stdout.write(f"{time.monotonic() - started_at:5.1f} s  {step}\n")

    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "-q", ROOT, folder], check=True)
        report("cloned")
        process = start(folder, port)
        report("installed and started")
        try:
            with running(ThreadingHTTPServer(("127.0.0.1", page_port), PageHandler)):
                answer = chat(port, page_port)
            report(f"the page shows: {answer}")
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


if __name__ == "__main__":
    main()
