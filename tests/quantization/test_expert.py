"""One expert: importance and corrected targets by definition, and bad or missing tokens."""

from dataclasses import replace

import torch
from torch.nn.functional import linear, silu

from erniequant.codes import get_code
from erniequant.quantization.expert import (
    Evidence,
    ExpertWeights,
    LayerContext,
    ProjectionCodes,
    quantize_expert,
)


def tokens_of(x: torch.Tensor) -> Evidence:
    """Tokens that count alike, of a layer with nothing quantised before it."""
    return Evidence(x, x, torch.zeros_like(x), torch.ones(len(x)))


def output(weights: ExpertWeights, x: torch.Tensor) -> torch.Tensor:
    return linear(silu(linear(x, weights.gate)) * linear(x, weights.up), weights.down)


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


def test_correcting_targets_lowers_the_output_error(
    expert_weights: ExpertWeights, tokens: Evidence, layer: LayerContext, monkeypatch: object
) -> None:
    from erniequant.quantization import expert as module

    true = output(expert_weights, tokens.x)

    def error() -> float:
        found = quantize_expert(expert_weights, tokens, layer).forward(tokens.x)
        return float((tokens.weights[:, None] * (found - true).square()).sum())

    corrected = error()
    monkeypatch.setattr(module, "corrected_target", lambda weight, *_: weight)  # type: ignore[attr-defined]
    assert corrected < 0.97 * error()


def test_an_expert_without_tokens_is_quantised_for_the_layer(
    expert_weights: ExpertWeights, tokens: Evidence, layer: LayerContext
) -> None:
    none = tokens_of(torch.zeros(0, 96))
    found = quantize_expert(expert_weights, none, layer)
    true = output(expert_weights, tokens.x)
    relative = (found.forward(tokens.x) - true).square().sum() / true.square().sum()
    # It never saw these tokens as its own, but the layer's sample stood in.
    assert relative < 0.35


def test_without_any_calibration_every_direction_counts_the_same(
    expert_weights: ExpertWeights, layer: LayerContext
) -> None:
    none = tokens_of(torch.zeros(0, 96))
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
    found = quantize_expert(expert_weights, replace(tokens, x=x), layer)
    keep = [i for i in range(500) if i not in (5, 100)]
    clean = quantize_expert(expert_weights, tokens.rows(torch.tensor(keep)), layer)
    assert found.dropped == 2
    assert torch.equal(found.gate_up.packed, clean.gate_up.packed)
    assert torch.equal(found.down.packed, clean.down.packed)


def test_few_tokens_and_zero_tokens_stay_finite(
    expert_weights: ExpertWeights, tokens: Evidence, layer: LayerContext
) -> None:
    # Three tokens for 96 inputs: rank 3. All-zero tokens: a zero Hessian of their own.
    for x in (tokens.x[:3], torch.zeros(4, 96)):
        found = quantize_expert(expert_weights, tokens_of(x), layer)
        assert torch.isfinite(found.gate_up.effective).all()
        assert torch.isfinite(found.down.effective).all()
        assert found.gate_up.error < 0.3


def test_an_expert_makes_up_for_what_earlier_layers_lost(
    expert_weights: ExpertWeights, tokens: Evidence, layer: LayerContext
) -> None:
    # Inputs 3 % too small and a hidden state that lacks a tenth of the expert's own output: both
    # are linear in what the expert sees, so it can mend them. 4 bits, whose own error is less.
    code = get_code("cc4", 10)
    layer = replace(layer, codes=ProjectionCodes(code, 32, code, 32))
    original = tokens.x / 0.97
    wanted = output(expert_weights, original)
    moved = Evidence(tokens.x, original, 0.1 * wanted, tokens.weights)
    found = quantize_expert(expert_weights, moved, layer)
    torch.testing.assert_close(found.original, wanted)

    def error(made: torch.Tensor) -> float:
        return float((made - 1.1 * wanted).square().sum() / wanted.square().sum())

    unaware = quantize_expert(expert_weights, tokens, layer)
    assert error(found.output) < 0.5 * error(unaware.output)


def test_gate_and_up_aim_at_their_outputs_for_the_original_inputs(
    expert_weights: ExpertWeights, tokens: Evidence, layer: LayerContext
) -> None:
    code = get_code("cc4", 10)
    layer = replace(layer, codes=ProjectionCodes(code, 32, code, 32))
    source = torch.cat([expert_weights.gate, expert_weights.up])

    def size(evidence: Evidence) -> float:
        made = quantize_expert(expert_weights, evidence, layer).gate_up.effective
        return float((made * source).sum() / source.square().sum())

    # Inputs that have shrunk to nine tenths ask for weights of 1.11; the ridge takes a part back.
    assert 1.05 < size(replace(tokens, x=0.9 * tokens.original)) < 1.12
    assert abs(size(tokens) - 1) < 0.01


def test_tokens_whose_output_cannot_suffer_do_not_shape_gate_and_up(
    expert_weights: ExpertWeights, layer: LayerContext, monkeypatch: object
) -> None:
    from erniequant.quantization import expert as module

    # Half of the tokens live in the first 48 channels, half in the others; there, one channel
    # closes every gate, so that no error of gate or up reaches the output.
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(800, 96, generator=generator)
    x[:400, 48:] = 0
    x[400:, :48] = 0
    x[400:, 48] = 4
    gate = expert_weights.gate.clone()
    gate[:, 48] = -8
    weights = replace(expert_weights, gate=gate)
    evidence, true = tokens_of(x), output(weights, x)
    blank = replace(layer, pooled=torch.zeros(96, 96), sample=evidence.rows(torch.arange(0)))

    def error() -> float:
        found = quantize_expert(weights, evidence, blank).output
        return float((found - true).square().sum() / true.square().sum())

    emphasised = error()
    monkeypatch.setattr(module, "token_emphasis", lambda _, weights: weights)  # type: ignore[attr-defined]
    assert emphasised < 0.97 * error()
