"""Quantise one expert: gate and up together for the layer's inputs, then down for what they now
produce.

Both aim at what the original model computes for the same tokens, so each expert also mends, as far
as its inputs allow, what earlier layers have lost.
"""

from dataclasses import dataclass, replace

import torch
from torch.nn.functional import linear, silu

from erniequant.calibration.hessian import (
    cross_moments,
    finite_rows,
    second_moments,
    shrink,
)
from erniequant.codes.spec import ConvolutionalCode
from erniequant.quantization.matrix import QuantizedMatrix, Rotation, quantize_matrix
from erniequant.quantization.targets import (
    corrected_target,
    inner_sensitivity,
    output_importance,
    token_emphasis,
)

PRIOR_TOKENS = 0.25
"""Strength of a layer's prior on each expert, in tokens per input channel."""


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """An expert's matrices, float32: gate and up ``[I, H]``, down ``[H, I]``."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Output for tokens ``[n, H]``, before the routing weight."""
        return linear(silu(linear(x, self.gate)) * linear(x, self.up), self.down)


@dataclass(frozen=True, eq=False)
class Evidence:
    """Tokens that an expert is quantised for.

    Attributes:
        x: their inputs in the quantised model, float32 ``[n, H]``.
        original: their inputs in the original model, float32 ``[n, H]``.
        drift: what their hidden states lack at this layer, original minus quantised, ``[n, H]``.
        weights: how much each counts, ``[n]``.
    """

    x: torch.Tensor
    original: torch.Tensor
    drift: torch.Tensor
    weights: torch.Tensor

    def rows(self, which: torch.Tensor) -> "Evidence":
        """Some of the tokens, by index or mask."""
        return Evidence(self.x[which], self.original[which], self.drift[which], self.weights[which])

    def finite(self) -> "Evidence":
        """Without tokens that hold an inf or nan."""
        keep = finite_rows(self.x) & finite_rows(self.original) & finite_rows(self.drift)
        keep &= torch.isfinite(self.weights)
        return self if bool(keep.all()) else self.rows(keep)


@dataclass(frozen=True)
class ProjectionCodes:
    """Code and tile of the two projections of a layer."""

    gate_up: ConvolutionalCode
    gate_up_tile: int
    down: ConvolutionalCode
    down_tile: int


@dataclass(frozen=True, eq=False)
class LayerContext:
    """What all experts of a layer share.

    Attributes:
        pooled: mean second moments of the inputs of all routed tokens, float32 ``[H, H]``.
        pooled_missing: mean cross moments of what the inputs miss, float32 ``[H, H]``.
        sample: a few tokens of the layer that stand in where an expert has seen none.
    """

    codes: ProjectionCodes
    input_rotation: Rotation
    inner_rotation: Rotation
    pooled: torch.Tensor
    pooled_missing: torch.Tensor
    sample: Evidence


@dataclass(frozen=True, eq=False)
class QuantizedExpert:
    """Both packed projections of an expert.

    Attributes:
        output: what it now makes of its routed tokens, before the routing weight, ``[n, H]``.
        original: what the source expert makes of the same tokens in the original model, ``[n, H]``.
        dropped: tokens that were not finite and took no part in the calibration.
    """

    gate_up: QuantizedMatrix
    down: QuantizedMatrix
    output: torch.Tensor
    original: torch.Tensor
    dropped: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Output for tokens ``[n, H]``, before the routing weight."""
        return linear(_activate(linear(x, self.gate_up.effective)), self.down.effective)


def quantize_expert(
    weights: ExpertWeights, routed: Evidence, layer: LayerContext
) -> QuantizedExpert:
    """Quantise an expert for the tokens routed to it.

    Args:
        weights: the source matrices.
        routed: the expert's tokens, each weighted by its squared routing weight.
        layer: rotations, codes and the prior.
    """
    inner_size, inputs = weights.gate.shape
    clean = routed.finite()
    tokens = clean.weights.numel()
    unit = float(clean.weights.double().mean()) if tokens else 1.0
    evidence = _with_sample(clean, layer.sample, PRIOR_TOKENS * inner_size * unit)

    gate_up_weight = torch.cat([weights.gate, weights.up])
    gate_and_up = linear(evidence.original, gate_up_weight)
    sensitivity = inner_sensitivity(gate_and_up, weights.down)
    emphasis = token_emphasis(sensitivity[:tokens], clean.weights)
    gate_up = _quantize_gate_up(
        gate_up_weight,
        replace(clean, weights=emphasis),
        PRIOR_TOKENS * inputs * unit,
        output_importance(sensitivity, evidence.weights, weights.down),
        layer,
    )
    del sensitivity

    before = _activate(gate_and_up)
    after = _activate(linear(evidence.x, gate_up.effective))
    down = _quantize_down(weights.down, before, after, evidence, layer)

    dropped = routed.x.shape[0] - clean.x.shape[0]
    result = QuantizedExpert(gate_up, down, torch.empty(0), torch.empty(0), dropped)
    if dropped:
        return replace(
            result, output=result.forward(routed.x), original=weights.forward(routed.original)
        )
    return replace(
        result,
        output=linear(after[:tokens], down.effective),
        original=linear(before[:tokens], weights.down),
    )


def _quantize_gate_up(
    weight: torch.Tensor,
    tokens: Evidence,
    strength: float,
    importance: torch.Tensor,
    layer: LayerContext,
) -> QuantizedMatrix:
    """Gate and up ``[2I, H]``, aiming at their outputs for the original inputs."""
    own = second_moments(tokens.x, tokens.weights)
    hessian = shrink(own, layer.pooled, strength)
    missing = cross_moments(tokens.x, tokens.original - tokens.x, tokens.weights)
    missing = (missing + strength * layer.pooled_missing) / max(own.weight + strength, 1e-30)
    return quantize_matrix(
        corrected_target(weight, hessian, missing @ weight.T),
        hessian,
        importance,
        layer.input_rotation,
        layer.codes.gate_up,
        layer.codes.gate_up_tile,
    )


def _quantize_down(
    weight: torch.Tensor,
    before: torch.Tensor,
    after: torch.Tensor,
    evidence: Evidence,
    layer: LayerContext,
) -> QuantizedMatrix:
    """Down ``[H, I]``, aiming at its original outputs plus what the hidden states lack.

    Routing weights sum to one over the experts of a token, so that each may add the whole drift.

    Args:
        before, after: inner activations of the original and the quantised gate and up, ``[n, I]``.
    """
    finite = finite_rows(before) & finite_rows(after)
    drift, weights = evidence.drift, evidence.weights
    if not bool(finite.all()):
        before, after, drift, weights = (t[finite] for t in (before, after, drift, weights))
    moments = second_moments(after, weights)
    hessian = shrink(moments, torch.zeros_like(moments.total), 0.0)
    missing = cross_moments(after, before - after, weights) @ weight.T
    missing = (missing + cross_moments(after, drift, weights)) / max(moments.weight, 1e-30)
    return quantize_matrix(
        corrected_target(weight, hessian, missing),
        hessian,
        torch.ones(weight.shape[0]),
        layer.inner_rotation,
        layer.codes.down,
        layer.codes.down_tile,
    )


def _activate(gate_and_up: torch.Tensor) -> torch.Tensor:
    """Inputs of the down projection: ``silu(gate) * up`` for ``[n, 2I]``."""
    gate, up = gate_and_up.chunk(2, dim=-1)
    return silu(gate) * up


def _with_sample(routed: Evidence, sample: Evidence, strength: float) -> Evidence:
    """Routed tokens, followed by the layer's sample, which counts as ``strength`` in all."""
    total = float(sample.weights.sum())
    if total <= 0:
        return routed
    return Evidence(
        torch.cat([routed.x, sample.x]),
        torch.cat([routed.original, sample.original]),
        torch.cat([routed.drift, sample.drift]),
        torch.cat([routed.weights, sample.weights * (strength / total)]),
    )
