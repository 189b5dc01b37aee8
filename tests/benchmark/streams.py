"""`python -m tests.benchmark.streams` measures how fast the program relays a model's chunks, beside a peer.

The peer is tests/benchmark/peer.py; its packages are installed into a folder of their own, once. Both have two workers
and ask the same model on the loopback interface, which sends its chunks one by one, as fast as they are read.
"""

import argparse
import json
import multiprocessing
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from http.client import HTTPConnection
from pathlib import Path
from statistics import median

from tests.benchmark.driving import Program, alternate, note, sqlite_database, table
from tests.helpers.server import TIMEOUT, find_free_port, run_concurrently

PEER_PACKAGES = ["fastapi", "uvicorn[standard]", "openai"]
PEER_FOLDER = Path(tempfile.gettempdir()) / "chatbot-benchmark-peer"
WORD = "token "
FIRST_DELTA_COUNT, OPEN_STREAMS = 50, 200


def format_chunk(delta, finish_reason=None):
    """Return a chunk as hosted models send it: a server-sent event in an HTTP chunk of its own."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    completion = {
        "id": "chatcmpl-0123456789012345678901234567",
        "object": "chat.completion.chunk",
        "created": 1_800_000_000,
    }
    value = {**completion, "model": "tiny", "system_fingerprint": "fp_0123456789", "choices": [choice]}
    event = f"data: {json.dumps(value)}\n\n".encode()
    return b"%x\r\n%b\r\n" % (len(event), event)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNK = format_chunk({"content": WORD})
END = format_chunk({}, "stop") + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


def serve_model(port):
    """Serve a model: a request with the text `N` gets N chunks, one with `open` a single one and no end."""
    with socket.create_server(("127.0.0.1", port), backlog=1024) as listener:
        while True:
            connection, _ = listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=serve_connection, args=(connection,), daemon=True).start()


def serve_connection(connection):
    """Reply to the requests of a connection."""
    with connection, connection.makefile("rb") as file:
        while file.readline():
            length = 0
            while (line := file.readline().lower()) not in (b"\r\n", b""):
                if line.startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            text = json.loads(file.read(length))["messages"][-1]["content"].split()[-1]
            connection.sendall(HEAD)
            if text == "open":
                connection.sendall(CHUNK)
                connection.recv(1)
                return
            for _ in range(int(text)):
                connection.sendall(CHUNK)
            connection.sendall(END)


class Side:
    """The program or the peer, or the model itself: `paths` has the path of each stream."""

    def __init__(self, program, paths, headers=None):
        self.program = program
        self.paths = paths
        self.headers = {"Accept": "text/event-stream", "Content-Type": "application/json", **(headers or {})}

    def send(self, number, text):
        """Send a message on the stream of a number; return the connection and the response."""
        connection = HTTPConnection("127.0.0.1", self.program.port, timeout=TIMEOUT)
        connection.request("POST", self.paths[number], json.dumps({"text": text}), self.headers)
        response = connection.getresponse()
        assert response.status == 200 or response.status == 201, response.read()
        return connection, response

    def count_deltas(self, number, chunks):
        """Read a reply of so many chunks to its end; return how many of them arrived."""
        connection, response = self.send(number, str(chunks))
        body = response.read()
        connection.close()
        return sum(event.count(WORD.encode()) for event in body.split(b"\n\n") if b"event: delta" in event)

    def time_first_delta(self):
        """Return the milliseconds from a request to the first chunk of its reply."""
        start = time.perf_counter()
        connection, response = self.send(0, "1")
        while WORD.encode() not in response.read1():
            pass
        seconds = time.perf_counter() - start
        response.read()
        connection.close()
        return seconds * 1000

    def measure_stream_kilobytes(self):
        """Return the memory that an open stream takes."""
        before = self.program.memory()
        streams = [self.send(number % len(self.paths), "open") for number in range(OPEN_STREAMS)]
        for _, response in streams:
            response.read1()
        used = self.program.memory() - before
        for connection, _ in streams:
            connection.close()
        return used / OPEN_STREAMS / 1000


def start_program(stack, model_url, streams):
    """Serve the program on SQLite, and create a user with a conversation for each stream."""
    settings = {"DATABASE_URL": stack.enter_context(sqlite_database()), "MAX_CONCURRENT_REPLIES": "1000"}
    program = Program("run.py", BOT_MODEL="tiny", OPENAI_BASE_URL=model_url, **settings)
    stack.enter_context(program)
    client = stack.enter_context(program.signup("reader"))
    ids = [client.create_conversation() for _ in range(streams)]
    return Side(program, [f"/api/conversations/{id}/messages" for id in ids], {"Cookie": client.cookie})


def start_peer(stack, model_url, streams):
    """Install the peer's packages, if they are missing, and serve it."""
    if not PEER_FOLDER.exists():
        note(f"installing {', '.join(PEER_PACKAGES)} into {PEER_FOLDER}")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(PEER_FOLDER), *PEER_PACKAGES]
        subprocess.run(command, check=True)
    options = ["--host=127.0.0.1", "--port={port}", "--workers=2", "--no-access-log", "--timeout-worker-healthcheck=60"]
    settings = {"OPENAI_BASE_URL": model_url, "PYTHONPATH": str(PEER_FOLDER)}
    program = stack.enter_context(Program("-m", "uvicorn", "tests.benchmark.peer:app", *options, **settings))
    return Side(program, ["/messages"] * streams)


def measure_rate(side, streams, chunks, cpu_times):
    """Return how many chunks a second arrive over so many streams at once; add the CPU time to a Counter."""
    cpu, start = side.program.cpu_seconds(), time.perf_counter()
    counts = run_concurrently(streams, lambda number: side.count_deltas(number, chunks))
    seconds = time.perf_counter() - start
    assert counts == [chunks] * streams, counts
    cpu_times[side] += side.program.cpu_seconds() - cpu
    return streams * chunks / seconds


def time_model(port):
    """Return the milliseconds from a request to the model itself to its first chunk."""
    start = time.perf_counter()
    connection = HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    connection.request("POST", "/v1/chat/completions", json.dumps({"messages": [{"content": "1"}]}))
    response = connection.getresponse()
    response.read1()
    seconds = time.perf_counter() - start
    response.read()
    connection.close()
    return seconds * 1000


def compare(ours, theirs, model_port, rounds, streams, chunks):
    """Yield the rows of the table."""
    cpu_times = Counter()
    note(f"{streams} streams of {chunks} chunks, {rounds} rounds")
    rates = alternate(
        rounds, *(lambda side=side: measure_rate(side, streams, chunks, cpu_times) for side in (ours, theirs))
    )
    yield "chunks relayed, 1/s", *rates, f"{rates[0] / rates[1]:.1f}"
    cpu = [cpu_times[side] / (rounds * streams * chunks) * 1e6 for side in (ours, theirs)]
    yield "CPU time of a chunk, us", *cpu, f"{cpu[0] / cpu[1]:.2f}"
    note("first delta")
    model = median(time_model(model_port) for _ in range(FIRST_DELTA_COUNT))
    delays = alternate(FIRST_DELTA_COUNT, ours.time_first_delta, theirs.time_first_delta)
    delays = [delay - model for delay in delays]
    yield f"time to the first delta over the model's own {model:.1f} ms, ms", *delays, f"{delays[0] / delays[1]:.2f}"
    note("memory")
    memory = [side.measure_stream_kilobytes() for side in (ours, theirs)]
    yield f"memory of each of {OPEN_STREAMS} open streams, kB", *memory, f"{memory[0] / memory[1]:.2f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=20)
    parser.add_argument("--chunks", type=int, default=500)
    arguments = parser.parse_args()
    port = find_free_port()
    model_url = f"http://127.0.0.1:{port}/v1"
    process = multiprocessing.get_context("spawn").Process(target=serve_model, args=(port,), daemon=True)
    process.start()
    try:
        with ExitStack() as stack:
            ours = start_program(stack, model_url, arguments.streams)
            theirs = start_peer(stack, model_url, arguments.streams)
            rows = compare(ours, theirs, port, arguments.rounds, arguments.streams, arguments.chunks)
            table(("", "the program", "FastAPI, uvicorn, openai", "ratio"), *rows)
    finally:
        process.terminate()
        process.join()


if __name__ == "__main__":
    main()
