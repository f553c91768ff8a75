"""`erniequant.load`: what it refuses, and that every refusal names the tensor and the reason."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import erniequant
from erniequant.errors import ErnieQuantError
from erniequant.runtime.experts import PackedExperts

Edit = Callable[[dict[str, torch.Tensor]], None]
Damaged = Callable[[Edit], Path]
WithConfig = Callable[[Path, Callable[[dict[str, Any]], Any]], Path]
PREFIX = "model.layers.2.mlp.experts."


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(ErnieQuantError) as caught:
        erniequant.load(folder, device="cpu", **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def drop(name: str) -> Edit:
    return lambda tensors: tensors.__delitem__(name)


def put(name: str, tensor: torch.Tensor) -> Edit:
    return lambda tensors: tensors.__setitem__(name, tensor)


@pytest.mark.parametrize(
    "name",
    [
        *(f"{PREFIX}{p}_{s}" for p in ("gate_up_proj", "down_proj") for s in ("packed", "signs")),
        f"{PREFIX}down_proj_scale",
        f"{PREFIX}down_proj",
        # Not one of ours: transformers alone would fill it with random numbers and only warn.
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.gate.weight",
        "model.norm.weight",
    ],
)
def test_missing_tensor(damaged: Damaged, name: str) -> None:
    message = refusal(damaged(drop(name)))
    assert name in message and "missing" in message


def test_missing_correction_bias_is_zero(damaged: Damaged) -> None:
    name = "model.layers.1.mlp.moe_statics.e_score_correction_bias"
    model, _ = erniequant.load(damaged(drop(name)), device="cpu")
    assert not model.model.layers[1].mlp.gate.moe_statics.e_score_correction_bias.any()


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        # Same bytes, another type: neither transformers nor safetensors would notice.
        ("gate_up_proj_packed", torch.zeros(8, 4, 288), "dtype F32, expected int32"),
        ("down_proj_scale", torch.zeros(8, 96, 1).bfloat16(), "dtype BF16, expected int16"),
        ("down_proj_scale", torch.zeros(8, 96).short(), "shape [8, 96], expected [8, 96, 1]"),
        ("gate_up_proj_signs", torch.zeros(1, 1, 3).int(), "shape [1, 1, 3]"),
        ("down_proj", torch.zeros(8, 96, 64).bfloat16(), "shape [8, 96, 64], expected [1]"),
    ],
)
def test_wrong_dtype_or_shape(damaged: Damaged, name: str, tensor: torch.Tensor, said: str) -> None:
    message = refusal(damaged(put(PREFIX + name, tensor)))
    assert f"tensor {PREFIX}{name} has {said}" in message


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.mlp.experts.3.up_proj.weight",
        "model.layers.2.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.gate_up_proj_packed",
    ],
)
def test_orphan(damaged: Damaged, name: str) -> None:
    assert name in refusal(damaged(put(name, torch.zeros(2, dtype=torch.int32))))


def test_truncated_file(packed_ernie: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(packed_ernie, folder)
    shard = sorted(folder.glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-1])
    message = refusal(folder)
    assert shard.name in message and "truncated" in message and "tensor model." in message


def test_unknown_version(packed_ernie: Path, with_config: WithConfig) -> None:
    folder = with_config(packed_ernie, lambda c: c["quantization_config"].update(format_version=3))
    assert "format_version 3" in refusal(folder)
    from transformers import AutoModelForCausalLM

    with pytest.raises(ErnieQuantError, match="format_version 3"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_layer_missing_from_the_description(packed_ernie: Path, with_config: WithConfig) -> None:
    folder = with_config(packed_ernie, lambda c: c["quantization_config"]["layers"].pop("2"))
    assert "does not name layer 2" in refusal(folder)


def test_layer_that_the_model_lacks(packed_ernie: Path, with_config: WithConfig) -> None:
    def add(config: dict[str, Any]) -> None:
        layers = config["quantization_config"]["layers"]
        layers["0"] = layers["1"]

    assert "layers.0.mlp.experts" in refusal(with_config(packed_ernie, add))


def test_options(packed_ernie: Path) -> None:
    assert "no such dtype 'int8'" in refusal(packed_ernie, dtype="int8")
    with pytest.raises(ErnieQuantError, match="no such device 'tpu9x'"):
        erniequant.load(packed_ernie, device="tpu9x")
    model, tokenizer = erniequant.load(packed_ernie, dtype=torch.float32, keep_decoded=False)
    assert tokenizer is None and not model.training and model.dtype == torch.float32
    assert not any(m.keep_decoded for m in model.modules() if isinstance(m, PackedExperts))


def test_plain_checkpoint_loads_as_it_is(micro_ernie: Path) -> None:
    model, _ = erniequant.load(micro_ernie, device="cpu")
    assert type(model.model.layers[1].mlp.experts).__name__ == "Ernie4_5_MoeExperts"
    assert model.dtype == torch.bfloat16


IMPORT_ORDERS = {
    # Registration must neither load transformers nor miss it when it comes later.
    "erniequant first": "import erniequant, sys; assert 'transformers' not in sys.modules; "
    "assert 'torch' not in sys.modules; from transformers import AutoModelForCausalLM as A",
    "transformers first": "from transformers import AutoModelForCausalLM as A; import erniequant",
    "in use first": "from transformers import AutoModelForCausalLM as A, Ernie4_5_MoeForCausalLM; "
    "import erniequant",
}


@pytest.mark.parametrize("order", IMPORT_ORDERS)
def test_import_alone_is_enough(packed_ernie: Path, order: str) -> None:
    script = (
        f"{IMPORT_ORDERS[order]}; m, i = A.from_pretrained({str(packed_ernie)!r}, "
        "output_loading_info=True); assert not any(i.values()), i; "
        "print(type(m.model.layers[1].mlp.experts).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "PackedExperts", done.stderr


def test_stock_transformers_refuses(packed_ernie: Path) -> None:
    script = (
        "from transformers import AutoModelForCausalLM as A; import sys\n"
        f"try: A.from_pretrained({str(packed_ernie)!r})\n"
        "except RuntimeError as e: print('refused', e)\n"
        "assert 'erniequant' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "refused" in done.stdout and "size" in done.stdout
    assert "mlp.experts.down_proj " in done.stderr and "MISMATCH" in done.stderr
