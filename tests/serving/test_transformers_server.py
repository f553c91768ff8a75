"""transformers' own server on a quantised model, from the openai client's side."""

import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from erniequant.errors import ErnieQuantError
from erniequant.serving.installed import find_installed
from erniequant.serving.transformers_server import load_ready, manager_of

LACKING = find_installed().lacking
PROMPT = [{"role": "user", "content": "hello there"}]
TOKENS = 6


def need_server() -> None:
    if LACKING:
        pytest.skip(f"needs the extra `serving`: {', '.join(LACKING)} missing")


@pytest.fixture(scope="module")
def server(talker: Path) -> Iterator[SimpleNamespace]:
    """`erniequant serve` in a process of its own; `stop` ends it by TERM, for its exit code."""
    need_server()
    import socket

    with socket.socket() as candidate:
        candidate.bind(("127.0.0.1", 0))
        port = candidate.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "erniequant", "serve", str(talker), "--engine", "transformers",
         "--port", str(port), "--quiet", "--", "--device", "cpu", "--dtype", "float32"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip

    def stop() -> tuple[int, str]:
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    url = f"http://127.0.0.1:{port}"
    try:
        while process.poll() is None and not answers(f"{url}/health"):
            time.sleep(0.2)
        assert process.poll() is None, process.communicate()[0]
        yield SimpleNamespace(url=url, stop=stop)
    finally:
        process.kill()
        process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, ConnectionError):
        return False


@pytest.fixture(scope="module")
def client(server: SimpleNamespace) -> Any:
    import openai

    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def expected(talker: Path) -> str:
    """The greedy answer, by this library's own chat."""
    import erniequant
    from erniequant.generation import ChatSession

    model, tokenizer = erniequant.load(talker, device="cpu", dtype="float32")
    return ChatSession(model, tokenizer, max_new_tokens=TOKENS).say("hello there").text


def test_answers_are_those_of_the_model(client: Any, talker: Path, expected: str) -> None:
    (listed,) = client.models.list().data
    assert listed.id == talker.name
    asked = {"messages": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    answer = client.chat.completions.create(model=talker.name, **asked)
    assert answer.choices[0].message.content == expected and expected
    assert answer.model == talker.name
    assert answer.usage.completion_tokens == TOKENS
    chunks = list(client.chat.completions.create(model=talker.name, stream=True, **asked))
    pieces = [c.choices[0].delta.content for c in chunks if c.choices]
    assert "".join(filter(None, pieces)) == expected
    assert sum(map(bool, pieces)) > 1  # it streams


def test_it_serves_one_model_only(client: Any, server: SimpleNamespace, talker: Path) -> None:
    """And fetches no other from Hugging Face, whatever clients ask for."""
    import openai

    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="other/model", messages=PROMPT)
    assert "pinned to 'ernie-2bit'" in refused.value.response.text
    request = urllib.request.Request(
        f"{server.url}/load_model",
        b'{"model": "other/model"}',
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request) as response:
        assert b"this server has the model ernie-2bit only" in response.read()


def test_term_ends_it_in_good_order(server: SimpleNamespace, client: Any) -> None:
    """The last test of the server."""
    code, output = server.stop()
    assert code == 0, output
    assert "Application shutdown complete" in output and "KeyboardInterrupt" not in output


def test_the_model_is_that_of_load(talker: Path) -> None:
    """With the linear layers that are quick for one token, which from_pretrained leaves alone."""
    from erniequant.runtime.linear import CpuLinear

    model = load_ready(str(talker), "cpu", torch.float32, "eager")
    assert any(isinstance(module, CpuLinear) for module in model.modules())
    assert model.dtype == torch.float32 and not model.training
    assert model.config._attn_implementation == "eager"


class StockManager:
    """As transformers' class since 5.16: these attributes, and methods that are replaced."""

    force_model, device, dtype, attn_implementation = "name", "cpu", "auto", None
    quantization: str | None = None


def test_wint2_is_served_packed(fd_folder: Path) -> None:
    from erniequant.runtime.fastdeploy_experts import FastDeployExperts

    manager = manager_of(str(fd_folder), StockManager)()
    model = manager._load_model("name", tqdm_class=None, gguf_file=None)
    assert any(isinstance(module, FastDeployExperts) for module in model.modules())
    assert manager._load_processor("name", gguf_file=None).encode("ab") == [67, 68]
    assert manager.process_model_name("name") == "name"


def test_what_the_server_is_not_for(talker: Path) -> None:
    manager = manager_of(str(talker), StockManager)()
    for load in (manager._load_model, manager._load_processor):
        with pytest.raises(ErnieQuantError, match="this server has the model name only"):
            load("gpt2")
    manager.quantization = "bnb-4bit"
    with pytest.raises(ErnieQuantError, match="--quantization bnb-4bit: the model is served as it"):
        manager._load_model("name")


@pytest.fixture(scope="module")
def fd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from testing.micro_model import add_tokenizer, write_micro_ernie
    from tests.fastdeploy.conftest import SIZES, write

    root = tmp_path_factory.mktemp("wint2")
    return write(add_tokenizer(write_micro_ernie(root / "source", **SIZES)), root / "wint2")
