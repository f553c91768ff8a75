"""A micro model that FastDeploy's layouts cover, made-up codes for its experts, and what both
mean."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import erniequant
from erniequant.checkpoint.reader import open_checkpoint
from erniequant.quantization.report import QuantizationReport
from testing.micro_model import add_tokenizer, write_micro_ernie
from tests.fastdeploy.codes import MadeUpExperts, decode_wint2
from tests.fastdeploy.writing import write_fastdeploy
from tests.micro import FASTDEPLOY, write_text

W4_END = 1
"""Layer 0 is dense, the experts of layer 1 are wint4, those of layers 2 and 3 WINT2."""

# Hidden 384 = 3 * 128 has three bytes of scales, and heads of 96. Two ranks hold 128 of each
# expert's 256 inner channels, the least there is, and 192 = 3 * 64 of the dense layer's.
SIZES = dict(hidden_size=384, intermediate_size=384, moe_intermediate_size=256, moe_num_experts=4,
             num_hidden_layers=4, moe_layer_end_index=3)  # fmt: skip

WriteModel = Callable[..., Path]


@pytest.fixture(autouse=True)
def _some_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the package of the codes is not there, the decoder of these tests takes its place."""
    if importlib.util.find_spec("erniequant.ccq") is None:
        stub = ModuleType("erniequant.ccq")
        stub.decode_wint2 = decode_wint2  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "erniequant.ccq", stub)


@pytest.fixture(scope="session")
def fd_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bf16 original, head tied, with a tokenizer."""
    folder = tmp_path_factory.mktemp("fastdeploy") / "source"
    return add_tokenizer(write_micro_ernie(folder, **SIZES))


@pytest.fixture(scope="session")
def untied_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `fd_source`, with a head of its own and no shared experts, in one dense layer fewer."""
    folder = tmp_path_factory.mktemp("fastdeploy") / "untied"
    changes = dict(tie_word_embeddings=False, moe_num_shared_experts=0, moe_layer_start_index=0,
                   num_hidden_layers=3, moe_layer_end_index=2)  # fmt: skip
    return write_micro_ernie(folder, **SIZES | changes)


def write(source: Path, folder: Path, k_order: str = "mma64", tensor_parallel: int = 1) -> Path:
    """A checkpoint with made-up experts, in several shards."""
    checkpoint = open_checkpoint(source)
    write_fastdeploy(
        checkpoint, folder, MadeUpExperts(checkpoint.config, W4_END).encoded, w4_end_layer=W4_END,
        k_order=k_order, tensor_parallel=tensor_parallel, max_shard_bytes=1_000_000,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def fd_single(fd_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`fd_source` for one rank."""
    return write(fd_source, tmp_path_factory.mktemp("fastdeploy") / "single")


@pytest.fixture(scope="session")
def fd_ranks(fd_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`fd_source` for two ranks."""
    folder = tmp_path_factory.mktemp("fastdeploy") / "ranks"
    return write(fd_source, folder, tensor_parallel=2)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a text to calibrate on."""
    return str(write_text(tmp_path_factory.mktemp("text") / "a.txt"))


@pytest.fixture(scope="session")
def quantized(
    fd_source: Path, text: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, QuantizationReport]:
    """`fd_source` quantised for FastDeploy, and the report."""
    folder = tmp_path_factory.mktemp("fd") / "q"
    return folder, erniequant.quantize(fd_source, folder, calib=text, **FASTDEPLOY)
