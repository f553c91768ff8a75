"""Gradients through packed experts are those through the decoded weights of an export."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from erniequant.packing.products import experts_backward, experts_forward
from erniequant.runtime.decoding_module import DecodingExperts
from erniequant.runtime.experts import PackedExperts
from tests.runtime.families import from_pretrained, inputs


def all_gradients(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of a language model's loss, for every parameter that can have one."""
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    model(**batch, labels=batch["input_ids"]).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def checkpointed(model: Any) -> Any:
    model.train()
    model.gradient_checkpointing_enable()
    return model


def keeping(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, DecodingExperts):
            module.keep_decoded = True
    return model


def used_before(model: Any) -> Any:
    """What the first call keeps must serve training."""
    with torch.inference_mode():
        keeping(model)(torch.arange(5)[None])
    return model


WAYS = {
    "eager": lambda model: model, "checkpointed": checkpointed,
    "decoded weights kept": keeping, "kept in inference mode": used_before,
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_every_parameter_gets_the_gradient_of_the_export(
    family: str, packed: Path, exported: Path, way: str
) -> None:
    batch = inputs(family)
    stock = all_gradients(from_pretrained(exported, dtype=torch.float32), batch)
    found = all_gradients(WAYS[way](from_pretrained(packed, dtype=torch.float32)), batch)
    # Whatever the export has more belongs to decoded experts.
    assert all(".experts." in name or ".mlp." in name for name in stock.keys() - found.keys())
    assert len(found) > 20 and found.keys() <= stock.keys()
    for name, grad in found.items():
        assert (grad - stock[name]).norm() <= 1e-4 * stock[name].norm(), name
    # The router learns through the weights that it gives, not only through what it passes on.
    routers = [g for n, g in found.items() if "gate.weight" in n or "router" in n]
    assert (family == "dense") != bool(routers) and all(bool(g.any()) for g in routers)


def test_compiled_without_graph_breaks_in_the_experts(packed_ernie: Path) -> None:
    """The operator and its gradient are one node each, forward and backward."""
    experts = from_pretrained(packed_ernie, dtype=torch.float32).model.layers[1].mlp.experts
    x = torch.randn(3, 96, requires_grad=True)
    index, routing = torch.tensor([[0, 3], [7, 1], [3, 3]]), torch.rand(3, 2, requires_grad=True)
    expected = torch.autograd.grad(experts(x, index, routing).square().sum(), (x, routing))
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(x, index, routing).square().sum(), (x, routing))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients(
    family: str, packed: Path, exported: Path, dtype: torch.dtype
) -> None:
    """Products in the dtype of the activations: within its rounding of the export's."""
    batch = inputs(family)
    stock = all_gradients(from_pretrained(exported, dtype=dtype), batch)
    found = all_gradients(from_pretrained(packed, dtype=dtype), batch)
    exact = all_gradients(from_pretrained(exported, dtype=torch.float32), batch)
    for name in found:
        size = exact[name].norm() + 1e-6
        ours, theirs = ((g[name].float() - exact[name]).norm() / size for g in (found, stock))
        assert ours <= 2 * theirs + 0.02, (name, ours, theirs)


def test_backward_against_automatic_differentiation() -> None:
    """A token may choose an expert twice, and indices beyond the experts do nothing."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 6, generator=generator).requires_grad_()
    routing = torch.rand(5, 2, generator=generator).requires_grad_()
    # Expert 1 has no tokens, 4 and -1 do not exist.
    index = torch.tensor([[0, 2], [2, 0], [2, 4], [0, -1], [2, 2]])
    tensors = {
        "gate_up_proj": torch.randn(4, 8, 6, generator=generator),
        "down_proj": torch.randn(4, 6, 4, generator=generator),
    }
    grad = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    out = torch.zeros(5, 6)
    for token in range(5):
        for slot in range(2):
            expert = int(index[token, slot])
            if 0 <= expert < 4:
                gate, up = (tensors["gate_up_proj"][expert] @ x[token]).chunk(2)
                inner = functional.silu(gate) * up
                out[token] = out[token] + routing[token, slot] * (
                    tensors["down_proj"][expert] @ inner
                )
    expected = torch.autograd.grad(out, (x, routing), grad)

    def weight(projection: str, expert: int) -> torch.Tensor:
        return tensors[projection][expert]

    arguments = (x.detach(), index, routing.detach(), 4, weight)
    assert torch.allclose(experts_forward(*arguments, "silu"), out, atol=1e-5)
    found = experts_backward(grad, *arguments)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert not found[1][3, 1] and not found[1][2, 1]


def test_operator_passes_the_checks_of_torch(packed_ernie: Path) -> None:
    experts = from_pretrained(packed_ernie, dtype=torch.float32).model.layers[1].mlp.experts
    x = torch.randn(3, 96, requires_grad=True)
    routing = torch.rand(3, 2, requires_grad=True)
    index = torch.tensor([[0, 3], [7, 1], [3, 3]])
    arguments = (
        x, index, routing, *experts._tensors("gate_up_proj"), *experts._tensors("down_proj"),
        experts._spec_text, "silu",
    )  # fmt: skip
    torch.library.opcheck(torch.ops.erniequant.moe_experts.default, arguments)


def test_backward_keeps_no_decoded_weights(packed_ernie: Path) -> None:
    """A step of training takes the memory of packed weights."""
    experts = from_pretrained(packed_ernie, dtype=torch.float32).model.layers[1].mlp.experts
    x = torch.randn(3, 96, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        experts(x, torch.tensor([[0, 3], [7, 1], [3, 3]]), torch.rand(3, 2)).sum().backward()
    parameters = {p.untyped_storage().data_ptr() for p in experts.parameters()}
    own = [t for t in saved if t.untyped_storage().data_ptr() not in parameters]
    assert own and sum(t.numel() for t in own) < 64 * 96


def test_autocast_as_the_stock_module(family: str, packed: Path, exported: Path) -> None:
    """Trainers keep float32 parameters and compute in bfloat16."""
    batch = inputs(family)
    logits = {}
    for name, folder in (("ours", packed), ("stock", exported)):
        model = from_pretrained(folder, dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits[name] = model(**batch).logits.detach().float()
        logits[f"{name} exact"] = model(**batch).logits.detach()
    ours, theirs = (
        float((logits[name] - logits[f"{name} exact"]).norm()) for name in ("ours", "stock")
    )
    assert ours == pytest.approx(theirs, rel=0.3)
    assert (logits["ours"] - logits["stock"]).norm() < 1.5 * theirs


def test_another_activation_still_has_a_gradient(packed_ernie: Path) -> None:
    experts = from_pretrained(packed_ernie, dtype=torch.float32).model.layers[1].mlp.experts
    assert isinstance(experts, PackedExperts)
    experts = copy.deepcopy(experts)
    experts.activation = "gelu"
    x = torch.randn(3, 96, requires_grad=True)
    index, routing = torch.tensor([[0, 3], [7, 1], [3, 3]]), torch.rand(3, 2)
    experts(x, index, routing).square().sum().backward()
    direction = torch.randn(3, 96)
    with torch.no_grad():
        up, low = (
            experts(x + step * direction, index, routing).double().square().sum()
            for step in (1e-3, -1e-3)
        )
    assert x.grad is not None
    slope = (x.grad * direction).sum()
    assert float(up - low) / 2e-3 == pytest.approx(float(slope), rel=1e-2)
