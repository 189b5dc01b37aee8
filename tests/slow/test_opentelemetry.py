"""The README's command for traces and metrics, with a collector on the loopback interface."""

import os
import shlex
import signal
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.conftest import CHEAP_HASH
from tests.helpers.model_server import ModelServer, running
from tests.helpers.readme import get_block
from tests.helpers.server import Server, wait_until

pytest.importorskip("opentelemetry.instrumentation.auto_instrumentation", reason="opentelemetry-distro is missing")
for package in ("proto", "instrumentation.threading", "instrumentation.urllib3"):
    pytest.importorskip(f"opentelemetry.{package}", reason=f"opentelemetry.{package} is not installed")

SEND = "POST /api/conversations/<id:conversation_id>/messages"


class Collector(ThreadingHTTPServer):
    """A collector of OTLP over HTTP: `spans` has what it got of traces, `metrics` the names of the metrics."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), CollectorHandler)
        self.spans, self.metrics = [], set()

    @property
    def settings(self):
        """The environment variables of a program that sends to this collector soon."""
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self.server_port}",
            "OTEL_BSP_SCHEDULE_DELAY": "200",
            "OTEL_METRIC_EXPORT_INTERVAL": "500",
        }

    def get_trace(self, name):
        """Return the spans of the first request of a name: its own, then those within it; empty without one."""
        for root in list(self.spans):
            if root.name == name:
                return [root, *(span for span in list(self.spans) if span.parent_span_id == root.span_id)]
        return []


class CollectorHandler(BaseHTTPRequestHandler):
    def do_POST(self):
        from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/v1/traces":
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                self.server.spans += [span for scope in resource.scope_spans for span in scope.spans]
        elif self.path == "/v1/metrics":
            for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics:
                self.server.metrics |= {metric.name for scope in resource.scope_metrics for metric in scope.metrics}
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        """Print nothing."""


@pytest.fixture
def collector():
    with running(Collector()) as collector:
        yield collector


@pytest.fixture
def server(collector, empty_database):
    """The program, started by the README's command, with a model that replies."""
    block = get_block("bash", "opentelemetry-instrument ").replace("\\\n", "")
    launcher, *arguments = shlex.split(block[block.index("opentelemetry-instrument ") :])
    assert arguments[-2:] == ["python", "run.py"]
    prefix = [Path(sys.executable).with_name(launcher), *arguments[:-2]]
    settings = {"DATABASE_URL": empty_database, "WEB_CONCURRENCY": 1, "PASSWORD_HASH_METHOD": CHEAP_HASH}
    with running(ModelServer()) as model:
        server = Server(prefix=prefix, **settings, **model.settings(), **collector.settings)
        yield server
        server.kill()


def send_message(server, username):
    with server.create_logged_in_client(username) as client:
        assert client.send_message(client.create_conversation()).json[1]["text"] == "Hello there."


def test_request_and_its_statements_are_spans_of_one_trace_and_requests_are_counted(server, collector):
    send_message(server, "ada")
    wait_until(lambda: len(collector.get_trace(SEND)) > 2)
    request, *statements = collector.get_trace(SEND)
    assert {span.trace_id for span in statements} == {request.trace_id}
    assert "INSERT" in {span.name.split()[0] for span in statements}
    wait_until(lambda: "http.server.duration" in collector.metrics)
    assert "MonkeyPatchWarning" not in server.output


def test_call_of_the_model_is_a_span_of_the_request_that_sent_the_message(server, collector):
    send_message(server, "ada")
    [call] = wait_until(lambda: [span for span in list(collector.spans) if span.name == "POST"])
    assert call in wait_until(lambda: collector.get_trace(SEND))
    attributes = {attribute.key: attribute.value for attribute in call.attributes}
    assert attributes["http.url"].string_value.endswith("/chat/completions")
    assert attributes["http.status_code"].int_value == 200


def test_worker_that_replaces_another_one_sends_spans(server, collector):
    [worker] = server.all_workers(1)
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: (workers := server.workers()) and worker not in workers)
    send_message(server, "ada")
    assert wait_until(lambda: collector.get_trace(SEND))


def test_spans_of_the_last_request_arrive_before_the_program_ends(server, collector):
    send_message(server, "ada")
    assert server.terminate() == 0
    assert collector.get_trace(SEND)
