"""Linear layers on the CPU: compiled for few tokens, torch's own for everything else."""

import copy

import pytest
import torch
from torch import nn

import erniequant
from erniequant.runtime.linear import CpuLinear, quicken


@pytest.fixture
def layer():
    module = nn.Linear(64, 12, bias=False).bfloat16()
    nn.init.normal_(module.weight)
    return module


@pytest.fixture
def calls(monkeypatch):
    from erniequant_kernels.cpu import dense

    real, seen = dense.linear, []

    def counted(x, weight):
        seen.append(tuple(x.shape))
        return real(x, weight)

    monkeypatch.setattr(dense, "linear", counted)
    return seen


def test_few_tokens_are_compiled_code(layer, calls):
    stock = copy.deepcopy(layer)
    quicken(layer)
    assert type(layer) is CpuLinear and isinstance(layer, nn.Linear)
    with torch.no_grad():
        for shape in ((1, 1, 64), (4, 64), (5, 64), (2, 3, 64), (0, 64)):
            x = torch.randn(shape).bfloat16()
            torch.testing.assert_close(layer(x), stock(x), rtol=2**-7, atol=1e-2)
    assert calls == [(1, 1, 64), (4, 64)]


def test_training_compiling_and_other_types_are_torch(layer, calls):
    quicken(layer)
    x = torch.randn(1, 64).bfloat16().requires_grad_(True)
    layer(x).sum().backward()
    assert x.grad is not None and layer.weight.grad is not None
    with torch.no_grad():
        torch.compile(layer, fullgraph=True, backend="aot_eager")(x.detach())
        layer.float()(x.detach().float())
    assert calls == []


def test_other_linear_layers_stay(calls):
    class Own(nn.Linear):
        pass

    model = nn.Sequential(Own(32, 4), nn.Linear(32, 4, bias=True).bfloat16())
    quicken(model)
    assert type(model[0]) is Own
    # A bias is added in float32 by torch; the layer keeps to it.
    with torch.no_grad():
        model[1](torch.randn(1, 32).bfloat16())
    assert calls == []


def test_loaded_models_use_it(packed_ernie, calls):
    model, _ = erniequant.load(packed_ernie, device="cpu", dtype="bfloat16")
    with torch.no_grad():
        model(torch.tensor([[3]]))
    assert calls
    names = set(model.state_dict())
    stock, _ = erniequant.load(packed_ernie, device="cpu", dtype="bfloat16")
    assert set(stock.state_dict()) == names
