"""Experts in FastDeploy's formats take part in training and in every use as native ones do."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import erniequant
from erniequant.errors import ErnieQuantError
from erniequant.quantization.report import QuantizationReport

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def folders(
    quantized: tuple[Path, QuantizationReport], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A model with experts in wint4 and in WINT2, and its export in float32."""
    plain = tmp_path_factory.mktemp("fd") / "plain"
    erniequant.export(quantized[0], plain, "fp32")
    return quantized[0], plain


def load(folder: Path) -> Any:
    return erniequant.load(folder, device="cpu", dtype="float32")[0]


def adapter_gradients(model: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(model, LoraConfig(target_modules=targets, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model(IDS, labels=IDS).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("used", [False, True])
def test_gradients_of_an_adapter(folders: tuple[Path, Path], used: bool) -> None:
    """Also where decoded weights were kept in inference mode, by an evaluation before."""
    model = load(folders[0])
    if used:
        with torch.inference_mode():
            model(IDS)
    found = adapter_gradients(model)
    expected = adapter_gradients(AutoModelForCausalLM.from_pretrained(folders[1]))
    assert found.keys() == expected.keys() and found
    for name, grad in found.items():
        assert (grad - expected[name]).norm() <= 1e-4 * expected[name].norm(), name


def test_copies_and_compiled_layers_run(folders: tuple[Path, Path]) -> None:
    model = load(folders[0])
    expected = model(IDS).logits
    assert torch.equal(copy.deepcopy(model)(IDS).logits, expected)
    layer, x = model.model.layers[2].mlp, torch.randn(1, 5, 384)
    assert torch.equal(torch.compile(layer, backend="eager")(x), layer(x))


def test_saving_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """transformers would load the files with random experts."""
    with pytest.raises(ErnieQuantError, match="erniequant export"):
        load(folders[0]).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
