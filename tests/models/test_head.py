"""The end of a model against the stock model's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from erniequant.checkpoint.reader import open_checkpoint
from erniequant.models.head import NORM, load_head
from erniequant.models.registry import architecture_of
from testing.micro_model import write_micro_ernie

CPU = torch.device("cpu")


def write(folder: Path, **changes: Any) -> Path:
    """A micro model whose last norm is not all ones, and a bias of the head, if any, not zero."""
    write_micro_ernie(folder, **changes)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in (NORM, "lm_head.bias"):
        if name in tensors:
            tensors[name] = torch.rand(tensors[name].shape).to(tensors[name].dtype) + 0.5
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("tied", "bias"), [(True, False), (False, False), (False, True), (True, True)]
)
def test_logits_are_the_stock_models(tmp_path: Path, tied: bool, bias: bool) -> None:
    # An epsilon that shows: hidden states of the last rows are as small as its root.
    folder = write(
        tmp_path / "m", tie_word_embeddings=tied, use_bias=bias, rms_norm_eps=1e-2,
        num_hidden_layers=2, moe_layer_end_index=1,
    )  # fmt: skip
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    source = open_checkpoint(folder)
    head = load_head(source, architecture_of(source.config), CPU)
    assert (head.bias is not None) == (bias and "lm_head.bias" in source.headers)
    assert bias == (head.bias is not None)
    hidden = torch.randn(37, 96) * torch.logspace(1, -2, 37)[:, None]
    with torch.no_grad():
        expected = stock.lm_head(stock.model.norm(hidden))
    found = head.logits(hidden)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_another_norm_takes_its_place_and_has_a_gradient(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", num_hidden_layers=2, moe_layer_end_index=1)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    source = open_checkpoint(folder)
    head = load_head(source, architecture_of(source.config), CPU)
    other = (torch.rand(96) + 0.5).requires_grad_()
    stock.model.norm.weight.data.copy_(other)
    hidden = torch.randn(5, 96)
    direction = torch.randn(5, 128)
    expected = stock.lm_head(stock.model.norm(hidden))
    (expected * direction).sum().backward()
    found = head.logits(hidden, other)
    (found * direction).sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(other.grad, stock.model.norm.weight.grad, rtol=1e-4, atol=1e-4)
