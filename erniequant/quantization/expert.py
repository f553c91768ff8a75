"""Quantise one expert: gate and up together for the layer's inputs, then down for what they now
produce."""

from dataclasses import dataclass

import torch
from torch.nn.functional import linear, silu

from erniequant.calibration.hessian import Moments, second_moments, shrink
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
    """Tokens that describe an expert's inputs: ``x`` float32 ``[n, H]`` and how much each counts
    ``[n]``."""

    x: torch.Tensor
    weights: torch.Tensor

    def finite(self) -> "Evidence":
        """Without tokens that hold an inf or nan."""
        keep = torch.isfinite(self.x).all(-1) & torch.isfinite(self.weights)
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

    ``pooled`` float32 ``[H, H]`` are the mean moments of all routed tokens, ``sample`` a few
    tokens of the layer that stand in where an expert has seen none.
    """

    codes: ProjectionCodes
    input_rotation: Rotation
    inner_rotation: Rotation
    pooled: torch.Tensor
    sample: Evidence


@dataclass(frozen=True, eq=False)
class QuantizedExpert:
    """Both packed projections of an expert, and how many routed tokens were dropped as
    non-finite."""

    gate_up: QuantizedMatrix
    down: QuantizedMatrix
    dropped: int

    @property
    def inner_size(self) -> int:
        """Outputs of gate and of up."""
        return self.gate_up.effective.shape[0] // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Output of the quantised expert for tokens ``[n, H]``, before the routing weight."""
        return linear(_inner(x, self.gate_up.effective), self.down.effective)


PRIOR_TOKENS = 0.25
"""Strength of a layer's prior on each expert, in tokens per input channel."""

CORRECTION_RIDGE = 0.03
"""Ridge of the correction of down's targets, as a fraction of the mean diagonal."""


def quantize_expert(
    weights: ExpertWeights, routed: Evidence, layer: LayerContext
) -> QuantizedExpert:
    """Quantise an expert for the tokens routed to it.

    Args: weights: the source matrices. routed: the layer inputs of the expert's tokens, each
        weighted by its squared routing weight. layer: rotations, codes and the prior.
    """
    inputs, inner_size = weights.gate.shape[1], weights.gate.shape[0]
    clean = routed.finite()
    own = second_moments(clean.x, clean.weights)
    unit = own.weight / own.tokens if own.tokens else 1.0
    input_hessian = shrink(own, layer.pooled, PRIOR_TOKENS * inputs * unit)
    evidence = _with_sample(clean, layer.sample, PRIOR_TOKENS * inner_size * unit)

    gate_up_weight = torch.cat([weights.gate, weights.up])
    gate_up = quantize_matrix(
        gate_up_weight,
        input_hessian,
        inner_importance(weights, evidence),
        layer.input_rotation,
        layer.codes.gate_up,
        layer.codes.gate_up_tile,
    )

    before = _inner(evidence.x, gate_up_weight)
    after = _inner(evidence.x, gate_up.effective)
    moments = second_moments(after, evidence.weights)
    inner_hessian = shrink(moments, torch.zeros_like(moments.total), 0.0)
    target = corrected_target(weights.down, before, after, evidence.weights, moments)
    down = quantize_matrix(
        target,
        inner_hessian,
        torch.ones(weights.down.shape[0]),
        layer.inner_rotation,
        layer.codes.down,
        layer.codes.down_tile,
    )
    return QuantizedExpert(gate_up, down, routed.x.shape[0] - clean.x.shape[0])


def _inner(x: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """Inputs of the down projection: ``silu(gate x) * up x`` for ``gate_up`` ``[2I, H]``."""
    gate, up = linear(x, gate_up).chunk(2, dim=-1)
    return silu(gate) * up


def _with_sample(routed: Evidence, sample: Evidence, strength: float) -> Evidence:
    """Routed tokens plus the layer's sample, which counts as ``strength`` in all."""
    total = float(sample.weights.sum())
    if total <= 0:
        return routed
    return Evidence(
        torch.cat([routed.x, sample.x]),
        torch.cat([routed.weights, sample.weights * (strength / total)]),
    )


def inner_importance(weights: ExpertWeights, evidence: Evidence) -> torch.Tensor:
    """How much an error of each gate and up output disturbs the expert's output: float32 ``[2I]``.

    First order: an error ``d`` of gate unit ``i`` changes the output by ``down[:, i] u_i
        silu'(g_i) d``, one of up unit
    ``i`` by ``down[:, i] silu(g_i) d``; squared and averaged over the tokens.
    """
    gate, up = linear(evidence.x, weights.gate), linear(evidence.x, weights.up)
    sigmoid = torch.sigmoid(gate)
    slope = up * sigmoid * (1 + gate * (1 - sigmoid))
    squares = torch.cat([slope, gate * sigmoid], dim=-1).square()
    per_unit = evidence.weights @ squares if evidence.x.shape[0] else torch.ones(2 * gate.shape[-1])
    return per_unit * weights.down.square().sum(0).repeat(2)


def corrected_target(
    down: torch.Tensor,
    before: torch.Tensor,
    after: torch.Tensor,
    weights: torch.Tensor,
    moments: Moments,
) -> torch.Tensor:
    """The down projection that best maps the quantised inner activations to the original outputs.

    Least squares with a ridge towards ``down``: ``W + W (C - H) (H + r I)^-1`` with ``C = sum c
        before after^T`` and
    ``H = sum c after after^T``. Args: down ``[H, I]``, before and after ``[n, I]``, weights
    ``[n]``.
    """
    finite = torch.isfinite(before).all(-1) & torch.isfinite(after).all(-1)
    before, after, weights = before[finite], after[finite], weights[finite]
    size = after.shape[-1]
    cross = (before * weights[:, None]).T @ after
    ridge = CORRECTION_RIDGE * float(moments.total.diagonal().mean())
    damped = moments.total.double() + ridge * torch.eye(size, dtype=torch.float64)
    lower, info = torch.linalg.cholesky_ex(damped)
    if ridge <= 0 or int(info) != 0:
        return down
    shift = torch.cholesky_solve((cross - moments.total).double().T, lower).T
    return down + down @ shift.float()
