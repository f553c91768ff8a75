"""One expert: corrected targets by definition, and bad or missing tokens."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import linear, silu

from erniequant.calibration.rows import RowPool
from erniequant.models.architecture import MoeInput
from erniequant.quantization import expert as expert_module
from erniequant.quantization.expert import (
    ExpertWeights,
    LayerContext,
    QuantizedExpert,
    inner_activations,
)
from erniequant.quantization.layer import LayerInput
from erniequant.quantization.token_batches import CHUNK, TokenBatch, Tokens

pytestmark = pytest.mark.usefixtures("float32_products")


def tokens_of(x: torch.Tensor) -> TokenBatch:
    """Tokens that count alike, of a layer with nothing quantised before it."""
    return TokenBatch(x, x, torch.zeros_like(x), torch.ones(len(x)))


def quantize_expert(weights: ExpertWeights, routed: Tokens, layer: LayerContext) -> QuantizedExpert:
    return expert_module.quantize_expert(weights, routed, layer, RowPool())


def at_four_bits(layer: LayerContext) -> LayerContext:
    gate_up, down = (
        replace(quantizer, spec=replace(quantizer.spec, code="cc4"))
        for quantizer in (layer.gate_up, layer.down)
    )
    return replace(layer, gate_up=gate_up, down=down)


def mlp(gate_up: torch.Tensor, down: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2)
    return linear(silu(linear(x, gate)) * linear(x, up), down)


def output(weights: ExpertWeights, x: torch.Tensor) -> torch.Tensor:
    return mlp(weights.gate_up(), weights.down(), x)


def made(found: QuantizedExpert, x: torch.Tensor) -> torch.Tensor:
    """Output of the quantised expert."""
    return mlp(found.gate_up.effective, found.down.effective, x)


def test_the_quantised_expert_computes_its_effective_weights(
    expert_weights: ExpertWeights, tokens: TokenBatch, layer: LayerContext
) -> None:
    found = quantize_expert(expert_weights, tokens, layer)
    after = found.inner.after.tensor[:500]
    torch.testing.assert_close(
        linear(after, found.down.effective), made(found, tokens.x), rtol=1e-4, atol=1e-5
    )
    true = output(expert_weights, tokens.x)
    before = found.inner.before.tensor[:500]
    torch.testing.assert_close(linear(before, expert_weights.down()), true, rtol=1e-4, atol=1e-5)
    assert (made(found, tokens.x) - true).square().sum() / true.square().sum() < 0.2


def test_correcting_targets_lowers_the_output_error(
    expert_weights: ExpertWeights, tokens: TokenBatch, layer: LayerContext, monkeypatch: object
) -> None:
    true = output(expert_weights, tokens.x)

    def error() -> float:
        found = made(quantize_expert(expert_weights, tokens, layer), tokens.x)
        return float((tokens.weights[:, None] * (found - true).square()).sum())

    corrected = error()
    monkeypatch.setattr(expert_module, "corrected_target", lambda weight, *_: weight)  # type: ignore[attr-defined]
    assert corrected < 0.97 * error()


def test_an_expert_without_tokens_is_quantised_for_the_layer(
    expert_weights: ExpertWeights, tokens: TokenBatch, layer: LayerContext
) -> None:
    none = tokens_of(torch.zeros(0, 96))
    found = quantize_expert(expert_weights, none, layer)
    true = output(expert_weights, tokens.x)
    relative = (made(found, tokens.x) - true).square().sum() / true.square().sum()
    # It never saw these tokens as its own, but the layer's sample stood in.
    assert relative < 0.35


def test_without_any_calibration_every_direction_counts_the_same(
    expert_weights: ExpertWeights, layer: LayerContext
) -> None:
    none = tokens_of(torch.zeros(0, 96))
    blank = replace(layer, pooled=torch.zeros(96, 96), sample=none)
    found = quantize_expert(expert_weights, none, blank)
    source = expert_weights.gate_up()
    assert (found.gate_up.effective - source).square().sum() / source.square().sum() > 0.07
    assert found.gate_up.error < 0.12 and found.down.error < 0.12


def routed_rows(tokens: TokenBatch) -> Tokens:
    """The tokens as rows of a layer's tables."""
    nothing = torch.zeros(len(tokens.x), 1)
    quantized, original = (MoeInput(x, nothing, nothing) for x in (tokens.x, tokens.original))
    finite = torch.isfinite(tokens.x).all(-1)
    inputs = LayerInput(quantized, original, tokens.drift, finite, torch.ones_like(finite))
    return inputs.tokens(torch.arange(len(tokens.x)), tokens.weights)


def test_bad_tokens_are_dropped(
    expert_weights: ExpertWeights, tokens: TokenBatch, layer: LayerContext
) -> None:
    x = tokens.x.clone()
    x[5, 7], x[100, 0] = float("inf"), float("nan")
    found = quantize_expert(expert_weights, routed_rows(replace(tokens, x=x)), layer)
    keep = [i for i in range(500) if i not in (5, 100)]
    clean = quantize_expert(expert_weights, tokens.rows(torch.tensor(keep)), layer)
    assert torch.equal(found.gate_up.parts["packed"], clean.gate_up.parts["packed"])
    assert torch.equal(found.down.parts["packed"], clean.down.parts["packed"])


def test_few_tokens_and_zero_tokens_stay_finite(
    expert_weights: ExpertWeights, tokens: TokenBatch, layer: LayerContext
) -> None:
    # Three tokens for 96 inputs: rank 3. All-zero tokens: a zero Hessian of their own.
    for x in (tokens.x[:3], torch.zeros(4, 96)):
        found = quantize_expert(expert_weights, tokens_of(x), layer)
        assert torch.isfinite(found.gate_up.effective).all()
        assert torch.isfinite(found.down.effective).all()
        assert found.gate_up.error < 0.3


def test_an_expert_makes_up_for_what_earlier_layers_lost(
    expert_weights: ExpertWeights, tokens: TokenBatch, layer: LayerContext
) -> None:
    # Inputs 3 % too small and a hidden state that lacks a tenth of the expert's own output: both
    # are linear in what the expert sees, so it can mend them. 4 bits, whose own error is less.
    layer = at_four_bits(layer)
    original = tokens.x / 0.97
    wanted = output(expert_weights, original)
    moved = TokenBatch(tokens.x, original, 0.1 * wanted, tokens.weights)
    found = quantize_expert(expert_weights, moved, layer)

    def error(found: QuantizedExpert) -> float:
        missed = made(found, tokens.x) - 1.1 * wanted
        return float(missed.square().sum() / wanted.square().sum())

    assert error(found) < 0.5 * error(quantize_expert(expert_weights, tokens, layer))


def test_gate_and_up_aim_at_their_outputs_for_the_original_inputs(
    expert_weights: ExpertWeights, tokens: TokenBatch, layer: LayerContext
) -> None:
    layer = at_four_bits(layer)
    source = expert_weights.gate_up()

    def size(evidence: TokenBatch) -> float:
        found = quantize_expert(expert_weights, evidence, layer).gate_up.effective
        return float((found * source).sum() / source.square().sum())

    # Inputs that have shrunk to nine tenths ask for weights of 1.11; the ridge takes a part back.
    assert 1.05 < size(replace(tokens, x=0.9 * tokens.original)) < 1.12
    assert abs(size(tokens) - 1) < 0.01


def test_tokens_whose_output_cannot_suffer_do_not_shape_gate_and_up(
    expert_weights: ExpertWeights, layer: LayerContext, monkeypatch: object
) -> None:
    # Half of the tokens live in the first 48 channels, half in the others; there, one channel
    # closes every gate, so that no error of gate or up reaches the output.
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(800, 96, generator=generator)
    x[:400, 48:] = 0
    x[400:, :48] = 0
    x[400:, 48] = 4
    gate = expert_weights.load("gate_proj").clone()
    gate[:, 48] = -8
    weights = ExpertWeights(lambda name: gate if name == "gate_proj" else expert_weights.load(name))
    evidence, true = tokens_of(x), output(weights, x)
    blank = replace(layer, pooled=torch.zeros(96, 96), sample=evidence.rows(torch.arange(0)))

    def error() -> float:
        found = made(quantize_expert(weights, evidence, blank), x)
        return float((found - true).square().sum() / true.square().sum())

    emphasised = error()
    monkeypatch.setattr(expert_module, "token_emphasis", lambda _, weights: weights)  # type: ignore[attr-defined]
    assert emphasised < 0.97 * error()


def test_chunks_of_tokens_do_not_matter(expert_weights: ExpertWeights, layer: LayerContext) -> None:
    # One token more than two chunks, so the last chunk holds a single row; against the moments of
    # all tokens at once, in float64.
    x = torch.randn(2 * CHUNK + 1, 96, generator=torch.Generator().manual_seed(1))
    tokens = replace(tokens_of(x), original=x + 0.1 * x.roll(1, 1))
    evidence = expert_module._WithSample(tokens, layer.sample, 0.0)
    before = RowPool().empty(evidence.count, 64)
    moments, _ = expert_module._gate_up_moments(
        expert_weights.gate_up(), torch.ones(64), evidence, before, layer, emphasise=False
    )
    exact = x.double()
    scale = float((exact.T @ exact).abs().max())
    assert (moments.total - exact.T @ exact).abs().max() < 1e-5 * scale
    missing = (tokens.original - x).double()
    assert (moments.cross[0] - exact.T @ missing).abs().max() < 1e-5 * scale
    assert moments.weight == len(x)


def test_a_known_expert_gives_the_same_activations_to_the_last_bit(
    expert_weights: ExpertWeights, layer: LayerContext
) -> None:
    x = torch.randn(CHUNK + 7, 96, generator=torch.Generator().manual_seed(2))
    tokens = replace(tokens_of(x), original=1.1 * x)
    found = quantize_expert(expert_weights, tokens, layer)
    again = inner_activations(
        expert_weights, found.gate_up.effective, tokens, torch.device("cpu"), RowPool()
    )
    for first, second in ((found.inner.before, again.before), (found.inner.after, again.after)):
        assert torch.equal(first.tensor[: len(x)], second.tensor)


def test_tokens_without_any_sensitivity_count_by_their_weights(
    expert_weights: ExpertWeights, tokens: TokenBatch, layer: LayerContext
) -> None:
    evidence = expert_module._WithSample(tokens, layer.sample, 0.0)
    before = RowPool().empty(evidence.count, 64)
    moments, _ = expert_module._gate_up_moments(
        expert_weights.gate_up(), torch.zeros(64), evidence, before, layer
    )
    expected = (tokens.x * tokens.weights[:, None]).T @ tokens.x
    torch.testing.assert_close(moments.total, expected, rtol=1e-3, atol=1e-3)


def test_the_sample_has_no_part_in_the_moments_of_gate_and_up(
    expert_weights: ExpertWeights, tokens: TokenBatch, layer: LayerContext
) -> None:
    # It counts for outputs and for down; for gate and up the layer's pooled moments stand in.
    evidence = expert_module._WithSample(tokens, tokens_of(100 * torch.ones(9, 96)), 50.0)
    before = RowPool().empty(evidence.count, 64)
    moments, slopes = expert_module._gate_up_moments(
        expert_weights.gate_up(), torch.ones(64), evidence, before, layer, emphasise=False
    )
    expected = (tokens.x * tokens.weights[:, None]).T @ tokens.x
    torch.testing.assert_close(moments.total, expected, rtol=1e-3, atol=1e-3)
    own = expert_module._WithSample(tokens, tokens_of(torch.zeros(0, 96)), 0.0)
    _, less = expert_module._gate_up_moments(
        expert_weights.gate_up(), torch.ones(64), own, before, layer, emphasise=False
    )
    assert slopes.trace() > 2 * less.trace()
