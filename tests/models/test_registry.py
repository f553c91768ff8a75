"""Another family with the mixture's experts is a class and a row of the registry, nothing else.

One is registered here, as CONTRIBUTING says, and goes from its checkpoint to a product and back.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeExperts

import erniequant
from erniequant.errors import ErnieQuantError
from erniequant.models.ernie45_moe import Ernie45Moe
from erniequant.models.registry import FAMILIES
from erniequant.runtime.experts import PackedExperts
from tests.micro import CALIBRATION, FASTDEPLOY

RENAMED = {"moe_num_experts": "toy_experts", "moe_intermediate_size": "toy_inner_size"}
IDS = torch.randint(3, 90, (2, 17), generator=torch.Generator().manual_seed(3))


class ToyConfig(Ernie4_5_MoeConfig):
    model_type = "toy_moe"
    attribute_map = {
        **Ernie4_5_MoeConfig.attribute_map,
        **{toy: stock for stock, toy in RENAMED.items()},
    }


class ToyExperts(Ernie4_5_MoeExperts):
    """Found by its name, which is another than that of its parent."""


class ToyForCausalLM(Ernie4_5_MoeForCausalLM):
    config_class = ToyConfig

    def __init__(self, config: Any):
        super().__init__(config)
        for layer in self.model.layers:
            if hasattr(layer.mlp, "experts"):
                layer.mlp.experts.__class__ = ToyExperts


class Toy(Ernie45Moe):
    model_type = "toy_moe"
    description = "toy MoE"
    model_class = "ToyForCausalLM"
    stock_module = "ToyExperts"
    expert_count_keys = ("toy_experts",)
    inner_size_key = "toy_inner_size"

    @classmethod
    def config_class(cls) -> type[Any]:
        return ToyConfig


@pytest.fixture(scope="module")
def known_to_transformers() -> Iterator[None]:
    stock = get_checkpoint_conversion_mapping("ernie4_5_moe")
    register_checkpoint_conversion_mapping("toy_moe", stock, overwrite=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIG_MAPPING._extra_content, "toy_moe", ToyConfig)
        patch.setitem(MODEL_FOR_CAUSAL_LM_MAPPING._extra_content, ToyConfig, ToyForCausalLM)
        yield


@pytest.fixture(scope="module")
def toy(micro_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`micro_source` under the names of the toy family."""
    folder = tmp_path_factory.mktemp("toy") / "toy"
    shutil.copytree(micro_source, folder)
    config = json.loads((folder / "config.json").read_text())
    config = {RENAMED.get(name, name): value for name, value in config.items()}
    config |= {"model_type": "toy_moe", "architectures": ["ClassOfItsOwnCode"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def quantized(
    known_to_transformers: None,
    toy: Path,
    micro_text: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Path]:
    """`toy` at 2 bits. The family is registered until the last test of the file."""
    folder = tmp_path_factory.mktemp("quantized") / "toy2"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "toy_moe", Toy)
        erniequant.quantize(
            toy, folder, bits=2, calib=str(micro_text), threads=1, device="cpu", **CALIBRATION
        )
        yield folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for shard in folder.glob("*.safetensors") for n, t in load_file(shard).items()}


@torch.no_grad()
def logits(folder: Path, kind: type) -> torch.Tensor:
    model, _ = erniequant.load(folder, device="cpu", dtype=torch.float32)
    assert type(model) is ToyForCausalLM and type(model.model.layers[2].mlp.experts) is kind
    return model(IDS).logits


def test_the_words_are_those_of_the_stock_family(
    quantized: Path, micro_source: Path, micro_text: Path, tmp_path: Path
) -> None:
    # Same weights, same text: the family's name must not change a byte.
    erniequant.quantize(
        micro_source, tmp_path / "q", bits=2, calib=str(micro_text), threads=1, device="cpu",
        **CALIBRATION,
    )  # fmt: skip
    found, expected = tensors_of(quantized), tensors_of(tmp_path / "q")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_it_loads_and_computes_what_its_export_does(quantized: Path, tmp_path: Path) -> None:
    assert json.loads((quantized / "config.json").read_text())["architectures"] == [
        "ToyForCausalLM"
    ]
    erniequant.export(quantized, tmp_path / "plain", to="fp32")
    expected = logits(tmp_path / "plain", ToyExperts)
    assert (logits(quantized, PackedExperts) - expected).norm() <= 1e-5 * expected.norm()


def test_it_is_inspected_and_verified(quantized: Path, toy: Path) -> None:
    summary = erniequant.inspect(quantized)
    assert summary.model_type == "toy_moe" and summary.quantized_layers == ("1", "2")
    # Three matrices of 64 x 96 for each of 8 experts in two layers.
    assert summary.expert_weights == 2 * 8 * 3 * 64 * 96
    assert erniequant.verify(quantized, reference=toy).ok


@pytest.mark.parametrize(
    ("key", "value", "packed", "said"),
    [
        ("toy_experts", None, True, "toy_experts None; expected a positive integer"),
        ("toy_experts", 7, True, r"shape \[8, 2, 384\], expected \[7, 2, 384\]"),
        ("toy_inner_size", 32, True, "tile 64 does not divide 32 outputs"),
        # A plain checkpoint: the largest of its tensors has 160 rows.
        ("toy_experts", 1000, False, "toy_experts 1000, which is more than the tensors"),
        ("toy_inner_size", 1000, False, "toy_inner_size 1000, which is more than"),
    ],
)
def test_its_own_config_keys_are_checked(
    quantized: Path, toy: Path, tmp_path: Path, key: str, value: Any, packed: bool, said: str
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(quantized if packed else toy, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ErnieQuantError, match=said):
        erniequant.load(folder, device="cpu")


def test_a_bias_that_the_family_calls_optional_may_be_missing(
    quantized: Path, toy: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "toy"
    shutil.copytree(toy, folder)
    kept = {n: t for n, t in tensors_of(toy).items() if not n.endswith("correction_bias")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    model, _ = erniequant.load(folder, device="cpu")
    assert not model.model.layers[1].mlp.gate.moe_statics.e_score_correction_bias.any()


def test_fastdeploy_does_not_know_it(
    quantized: Path, toy: Path, micro_text: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {**FASTDEPLOY, "calib": str(micro_text)}
    with pytest.raises(ErnieQuantError, match="not of an toy MoE; leave out --format"):
        erniequant.quantize(toy, tmp_path / "q", **options)


def test_without_its_row_it_is_refused(toy: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(FAMILIES, "toy_moe", raising=False)
        with pytest.raises(ErnieQuantError, match="model_type 'toy_moe'; supported: ernie4_5_moe"):
            erniequant.quantize(toy, tmp_path / "q", bits=2, no_calib=True)


def test_facts_do_not_wait_for_transformers() -> None:
    # They are asked for while transformers is being imported, when its models are not there yet.
    code = "import sys, erniequant.models.registry; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
