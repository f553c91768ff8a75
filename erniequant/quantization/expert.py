"""Quantise one expert: gate and up together for the layer's inputs, then down for what they now
produce."""

from dataclasses import dataclass, replace

import torch
from torch.nn.functional import linear, silu

from erniequant.calibration.hessian import finite_rows, second_moments, shrink
from erniequant.codes.spec import ConvolutionalCode
from erniequant.quantization.matrix import QuantizedMatrix, Rotation, quantize_matrix


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """An expert's matrices, float32: gate and up ``[I, H]``, down ``[H, I]``."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True, eq=False)
class Evidence:
    """Tokens ``x`` float32 ``[n, H]`` that describe an input, and their weights ``[n]``."""

    x: torch.Tensor
    weights: torch.Tensor

    def finite(self) -> "Evidence":
        """Without tokens that hold an inf or nan."""
        keep = finite_rows(self.x) & torch.isfinite(self.weights)
        return self if bool(keep.all()) else Evidence(self.x[keep], self.weights[keep])


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

    ``pooled`` float32 ``[H, H]`` are the mean moments of all routed tokens, ``sample`` a few tokens
    of the layer that stand in where an expert has seen none.
    """

    codes: ProjectionCodes
    input_rotation: Rotation
    inner_rotation: Rotation
    pooled: torch.Tensor
    sample: Evidence


@dataclass(frozen=True, eq=False)
class QuantizedExpert:
    """Both packed projections of an expert.

    ``output`` float32 ``[n, H]`` is what it now makes of its routed tokens, before the routing
    weight; ``dropped`` of them were not finite and did not take part in the calibration.
    """

    gate_up: QuantizedMatrix
    down: QuantizedMatrix
    output: torch.Tensor
    dropped: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Output for tokens ``[n, H]``, before the routing weight."""
        return linear(_activate(linear(x, self.gate_up.effective)), self.down.effective)


PRIOR_TOKENS = 0.25
"""Strength of a layer's prior on each expert, in tokens per input channel."""

CORRECTION_RIDGE = 0.03
"""Ridge of the correction of down's targets, as a fraction of the mean diagonal."""


def quantize_expert(
    weights: ExpertWeights, routed: Evidence, layer: LayerContext
) -> QuantizedExpert:
    """Quantise an expert for the tokens routed to it.

    Args:
        weights: the source matrices.
        routed: inputs of the expert's tokens, each weighted by its squared routing weight.
        layer: rotations, codes and the prior.
    """
    inner_size, inputs = weights.gate.shape
    clean = routed.finite()
    own = second_moments(clean.x, clean.weights)
    unit = own.weight / own.tokens if own.tokens else 1.0
    input_hessian = shrink(own, layer.pooled, PRIOR_TOKENS * inputs * unit)
    evidence = _with_sample(clean, layer.sample, PRIOR_TOKENS * inner_size * unit)

    gate_up_weight = torch.cat([weights.gate, weights.up])
    gate_and_up = linear(evidence.x, gate_up_weight)
    gate_up = quantize_matrix(
        gate_up_weight,
        input_hessian,
        inner_importance(gate_and_up, evidence.weights, weights.down),
        layer.input_rotation,
        layer.codes.gate_up,
        layer.codes.gate_up_tile,
    )

    before = _activate(gate_and_up)
    after = _activate(linear(evidence.x, gate_up.effective))
    moments = second_moments(after, evidence.weights)
    inner_hessian = shrink(moments, torch.zeros_like(moments.total), 0.0)
    target = corrected_target(weights.down, before, after, evidence.weights)
    down = quantize_matrix(
        target,
        inner_hessian,
        torch.ones(weights.down.shape[0]),
        layer.inner_rotation,
        layer.codes.down,
        layer.codes.down_tile,
    )
    dropped = routed.x.shape[0] - clean.x.shape[0]
    result = QuantizedExpert(gate_up, down, torch.empty(0), dropped)
    output = result.forward(routed.x) if dropped else linear(after[: own.tokens], down.effective)
    return replace(result, output=output)


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
        torch.cat([routed.weights, sample.weights * (strength / total)]),
    )


def inner_importance(
    gate_and_up: torch.Tensor, weights: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """How much an error of each gate and up output disturbs the expert's output.

    First order: an error ``d`` of gate unit ``i`` moves the output by
    ``down[:, i] u_i silu'(g_i) d``, one of up unit ``i`` by ``down[:, i] silu(g_i) d``; squared and
    summed over the tokens.

    Args:
        gate_and_up: outputs of both projections, float32 ``[n, 2I]``.
        weights: of the tokens, ``[n]``.
        down: ``[H, I]``.

    Returns:
        float32 ``[2I]``; without tokens every unit's activation counts the same.
    """
    gate, up = gate_and_up.chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    slope = up * sigmoid * (1 + gate * (1 - sigmoid))
    squares = torch.cat([slope, gate * sigmoid], dim=-1).square()
    per_unit = weights @ squares if weights.numel() else torch.ones(gate_and_up.shape[-1])
    return per_unit * down.square().sum(0).repeat(2)


def corrected_target(
    down: torch.Tensor, before: torch.Tensor, after: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The down projection that best maps the quantised inner activations to the original outputs.

    Least squares with a ridge towards the original: ``W + W (C - H) (H + r I)^-1`` with
    ``C = sum_t c_t before_t after_t^T`` and ``H = sum_t c_t after_t after_t^T``.

    Args:
        down: ``W``, float32 ``[H, I]``.
        before, after: inner activations of the original and the quantised gate and up, ``[n, I]``.
        weights: ``c``, of the tokens, ``[n]``.
    """
    finite = finite_rows(before) & finite_rows(after)
    if not bool(finite.all()):
        before, after, weights = before[finite], after[finite], weights[finite]
    weighted = (after * weights[:, None]).T
    moments = weighted @ after
    ridge = CORRECTION_RIDGE * float(moments.diagonal().mean())
    damped = moments.double()
    damped.diagonal().add_(ridge)
    lower, info = torch.linalg.cholesky_ex(damped)
    if ridge <= 0 or int(info) != 0:
        return down
    # (C - H)^T = sum_t c_t after_t (before_t - after_t)^T
    difference = weighted @ (before - after)
    shift = torch.cholesky_solve(difference.double(), lower).T
    return down + down @ shift.float()
