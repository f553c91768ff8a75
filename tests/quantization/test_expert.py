"""One expert: importance and corrected targets by definition, and bad or missing tokens."""

from dataclasses import replace

import torch
from torch.nn.functional import linear, silu

from erniequant.quantization.expert import (
    Evidence,
    ExpertWeights,
    LayerContext,
    corrected_target,
    inner_importance,
    quantize_expert,
)


def output(weights: ExpertWeights, x: torch.Tensor) -> torch.Tensor:
    return linear(silu(linear(x, weights.gate)) * linear(x, weights.up), weights.down)


def test_importance_is_the_diagonal_of_the_squared_jacobian(
    expert_weights: ExpertWeights, tokens: Evidence
) -> None:
    few = Evidence(tokens.x[:7], tokens.weights[:7])

    def of_inner(inner: torch.Tensor) -> torch.Tensor:
        gate, up = inner.chunk(2)
        return linear(silu(gate) * up, expert_weights.down)

    expected = torch.zeros(128)
    for x, weight in zip(few.x, few.weights, strict=True):
        inner = torch.cat([linear(x, expert_weights.gate), linear(x, expert_weights.up)])
        jacobian = torch.autograd.functional.jacobian(of_inner, inner)
        expected += weight * jacobian.square().sum(0)
    gate_and_up = linear(few.x, torch.cat([expert_weights.gate, expert_weights.up]))
    found = inner_importance(gate_and_up, few.weights, expert_weights.down)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_corrected_target_is_the_ridge_solution() -> None:
    generator = torch.Generator().manual_seed(1)
    down = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    before = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    after = before + 0.3 * torch.randn(30, 4, generator=generator, dtype=torch.float64)
    weights = torch.rand(30, generator=generator, dtype=torch.float64)
    found = corrected_target(down.float(), before.float(), after.float(), weights.float())
    # min |sqrt(c) (after V^T - before W^T)|^2 + ridge |V - W|^2, solved by stacking.
    ridge = 0.03 * float((weights[:, None] * after.square()).sum(0).mean())
    root = weights.sqrt()[:, None]
    left = torch.cat([root * after, ridge**0.5 * torch.eye(4, dtype=torch.float64)])
    right = torch.cat([root * (before @ down.T), ridge**0.5 * down.T])
    expected = torch.linalg.lstsq(left, right).solution.T
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_the_quantised_expert_computes_its_effective_weights(
    expert_weights: ExpertWeights, tokens: Evidence, layer: LayerContext
) -> None:
    found = quantize_expert(expert_weights, tokens, layer)
    gate, up = found.gate_up.effective.chunk(2)
    again = ExpertWeights(gate, up, found.down.effective)
    torch.testing.assert_close(found.forward(tokens.x), output(again, tokens.x))
    torch.testing.assert_close(found.output, output(again, tokens.x))
    assert found.dropped == 0
    true = output(expert_weights, tokens.x)
    relative = (found.forward(tokens.x) - true).square().sum() / true.square().sum()
    assert relative < 0.2


def test_correcting_down_lowers_the_output_error(
    expert_weights: ExpertWeights, tokens: Evidence, layer: LayerContext, monkeypatch: object
) -> None:
    from erniequant.quantization import expert as module

    true = output(expert_weights, tokens.x)

    def error() -> float:
        found = quantize_expert(expert_weights, tokens, layer).forward(tokens.x)
        return float((tokens.weights[:, None] * (found - true).square()).sum())

    corrected = error()
    monkeypatch.setattr(module, "corrected_target", lambda down, *_: down)  # type: ignore[attr-defined]
    assert corrected < 0.97 * error()


def test_an_expert_without_tokens_is_quantised_for_the_layer(
    expert_weights: ExpertWeights, tokens: Evidence, layer: LayerContext
) -> None:
    none = Evidence(torch.zeros(0, 96), torch.zeros(0))
    found = quantize_expert(expert_weights, none, layer)
    true = output(expert_weights, tokens.x)
    relative = (found.forward(tokens.x) - true).square().sum() / true.square().sum()
    # It never saw these tokens as its own, but the layer's sample stood in.
    assert relative < 0.35


def test_without_any_calibration_every_direction_counts_the_same(
    expert_weights: ExpertWeights, layer: LayerContext
) -> None:
    none = Evidence(torch.zeros(0, 96), torch.zeros(0))
    blank = replace(layer, pooled=torch.zeros(96, 96), sample=none)
    found = quantize_expert(expert_weights, none, blank)
    plain = (found.gate_up.effective - torch.cat([expert_weights.gate, expert_weights.up])).square()
    assert plain.sum() / torch.cat([expert_weights.gate, expert_weights.up]).square().sum() > 0.07
    assert found.gate_up.error < 0.12 and found.down.error < 0.12


def test_bad_tokens_are_dropped_and_counted(
    expert_weights: ExpertWeights, tokens: Evidence, layer: LayerContext
) -> None:
    x = tokens.x.clone()
    x[5, 7], x[100, 0] = float("inf"), float("nan")
    found = quantize_expert(expert_weights, Evidence(x, tokens.weights), layer)
    keep = [i for i in range(500) if i not in (5, 100)]
    clean = quantize_expert(expert_weights, Evidence(tokens.x[keep], tokens.weights[keep]), layer)
    assert found.dropped == 2
    assert torch.equal(found.gate_up.packed, clean.gate_up.packed)
    assert torch.equal(found.down.packed, clean.down.packed)


def test_few_tokens_and_zero_tokens_stay_finite(
    expert_weights: ExpertWeights, tokens: Evidence, layer: LayerContext
) -> None:
    # Three tokens for 96 inputs: rank 3. All-zero tokens: a zero Hessian of their own.
    for x in (tokens.x[:3], torch.zeros(4, 96)):
        found = quantize_expert(expert_weights, Evidence(x, torch.ones(len(x))), layer)
        assert torch.isfinite(found.gate_up.effective).all()
        assert torch.isfinite(found.down.effective).all()
        assert found.gate_up.error < 0.3
