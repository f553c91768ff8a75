"""Quantise one expert: gate and up together for the layer's inputs, then down for what they now
produce.

Both aim at what the original model computes for the same tokens, so each expert also mends, as far
as its inputs allow, what earlier layers have lost. Tokens pass in chunks, and nothing of the size
of all of them is held but the inner activations, whose tables may lie on disk.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import silu

from erniequant.calibration.rows import RowPool, Rows
from erniequant.encoding.hessian import Moments, finite_rows
from erniequant.encoding.matrix import MatrixQuantizer, QuantizedMatrix
from erniequant.encoding.products import add_moments, mirror, product, ready
from erniequant.encoding.targets import corrected_target, inner_slopes, token_emphasis
from erniequant.quantization.token_batches import CHUNK, TokenBatch, Tokens

METRIC_TOKENS = 4096
"""Tokens of an expert that are enough for the metric of the outputs of gate and up."""

PRIOR_TOKENS = 0.25
"""Strength of a layer's prior on each expert, in tokens per input channel."""


@dataclass(frozen=True)
class ExpertWeights:
    """An expert's source matrices, read anew whenever they are needed.

    ``load`` gives ``gate_proj`` and ``up_proj`` ``[I, H]`` or ``down_proj`` ``[H, I]``, float32.
    """

    load: Callable[[str], torch.Tensor]

    def gate_up(self) -> torch.Tensor:
        """Gate over up, float32 ``[2I, H]``."""
        gate = self.load("gate_proj")
        both = torch.empty(2 * gate.shape[0], gate.shape[1])
        both[: gate.shape[0]] = gate
        del gate
        both[both.shape[0] // 2 :] = self.load("up_proj")
        return both

    def down(self) -> torch.Tensor:
        """Down, float32 ``[H, I]``."""
        return self.load("down_proj")


@dataclass(frozen=True, eq=False)
class LayerContext:
    """What all experts of a layer share.

    Attributes:
        gate_up, down: how matrices of either projection are coded.
        pooled: mean second moments of the inputs of all routed tokens, float32 ``[H, H]``.
        pooled_missing: mean cross moments of what the inputs miss, float32 ``[H, H]``.
        sample: a few tokens of the layer that stand in where an expert has seen none.
        device: where products with tokens are computed.
        gradient: second moments of the loss's gradients with respect to the experts' outputs,
            float32 ``[H, H]``; None means that all directions count the same.
    """

    gate_up: MatrixQuantizer
    down: MatrixQuantizer
    pooled: torch.Tensor
    pooled_missing: torch.Tensor
    sample: TokenBatch
    device: torch.device = torch.device("cpu")
    gradient: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class InnerActivations:
    """Inputs of down, ``[n + s, I]``, for an expert's ``n`` tokens followed by the ``s`` of the
    layer's sample: of the source matrices for the original inputs, and of the quantised ones for
    the inputs they are given."""

    before: Rows
    after: Rows

    def release(self) -> None:
        """Let go of what is in memory of tables on disk."""
        self.before.release()
        self.after.release()


@dataclass(frozen=True, eq=False)
class QuantizedExpert:
    """Both packed projections of an expert, and its inner activations."""

    gate_up: QuantizedMatrix
    down: QuantizedMatrix
    inner: InnerActivations


def quantize_expert(
    weights: ExpertWeights, routed: Tokens, layer: LayerContext, pool: RowPool
) -> QuantizedExpert:
    """Quantise an expert for the tokens routed to it.

    Args:
        weights: the source matrices.
        routed: the expert's tokens, each weighted by its squared routing weight.
        layer: rotations, codes and the prior.
        pool: where tables of activations come from.
    """
    tokens = routed.weights.numel()
    unit = float(routed.weights.double().mean()) if tokens else 1.0
    inner_size = layer.down.inputs
    evidence = _WithSample(routed, layer.sample, PRIOR_TOKENS * inner_size * unit)
    inner = InnerActivations(
        pool.empty(evidence.count, inner_size), pool.empty(evidence.count, inner_size)
    )
    gate_up = _quantize_gate_up(weights, evidence, unit, inner.before, layer)
    down = _quantize_down(weights, evidence, gate_up.effective, inner, layer)
    return QuantizedExpert(gate_up, down, inner)


class _WithSample:
    """Routed tokens, followed by the layer's sample, which counts as ``strength`` in all."""

    def __init__(self, routed: Tokens, sample: TokenBatch, strength: float):
        total = float(sample.weights.sum())
        self.own = routed.weights.numel()
        self._routed = routed
        self._sample = None
        if total > 0:
            weights = sample.weights * (strength / total)
            self._sample = TokenBatch(sample.x, sample.original, sample.drift, weights)
        self.count = self.own + (self._sample.weights.numel() if self._sample else 0)

    def chunks(self) -> Iterator[tuple[slice, TokenBatch]]:
        """Chunks with their places; none holds both kinds."""
        start = 0
        for source in (self._routed, self._sample):
            if source is None:
                continue
            for chunk in source.chunks():
                stop = start + chunk.weights.numel()
                yield slice(start, stop), chunk
                start = stop


def activate(gate_and_up: torch.Tensor) -> torch.Tensor:
    """Inputs of the down projection: ``silu(gate) * up`` for ``[n, 2I]``."""
    gate, up = gate_and_up.chunk(2, dim=-1)
    return silu(gate) * up


def _quantize_gate_up(
    weights: ExpertWeights,
    evidence: _WithSample,
    unit: float,
    before: Rows,
    layer: LayerContext,
) -> QuantizedMatrix:
    """Gate and up ``[2I, H]``, aiming at their outputs for the original inputs; fills ``before``
    with the activations of these."""
    target, hessian, importance = _gate_up_target(weights, evidence, unit, before, layer)
    return layer.gate_up.quantize(target, hessian, importance)


def _gate_up_target(
    weights: ExpertWeights,
    evidence: _WithSample,
    unit: float,
    before: Rows,
    layer: LayerContext,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Target ``[2I, H]``, Hessian ``[H, H]`` and metric ``[2I, 2I]`` of gate and up."""
    gate_up = weights.gate_up()
    reach = weights.down().square().sum(0)
    moments, slopes = _gate_up_moments(gate_up, reach, evidence, before, layer)
    importance = _gate_up_metric(weights.down(), slopes, layer.gradient)
    strength = PRIOR_TOKENS * gate_up.shape[1] * unit
    missing = moments.cross[0]
    missing.add_(layer.pooled_missing, alpha=strength).div_(max(moments.weight + strength, 1e-30))
    hessian = moments.blend(layer.pooled, strength)
    low = ready(missing, missing.device)
    target = corrected_target(gate_up, hessian, lambda rows: product(low, gate_up[rows].T))
    return target, hessian, importance


def _gate_up_moments(
    gate_up: torch.Tensor,
    reach: torch.Tensor,
    evidence: _WithSample,
    before: Rows,
    layer: LayerContext,
    emphasise: bool = True,
) -> tuple[Moments, torch.Tensor]:
    """Moments of an expert's own inputs and of what they miss, and second moments ``[2I, 2I]`` of
    the slopes of the inner activations.

    Tokens count by their emphasis, whose sum is that of their weights. Without any tokens all
    slopes are taken to be alike and independent.
    """
    device, hidden = layer.device, gate_up.shape[1]
    weight, column = ready(gate_up, device), reach.to(device)
    moments = Moments(hidden, (hidden,), device)
    slopes = torch.zeros(gate_up.shape[0], gate_up.shape[0], device=device)
    spacing = max(evidence.count // METRIC_TOKENS, 1)
    plain = 0.0
    for place, held in evidence.chunks():
        chunk = held.to(device)
        outputs = product(chunk.original, weight.T)
        before.tensor[place] = activate(outputs).cpu()
        before.release()
        slope = inner_slopes(outputs)
        some = slope[::spacing]
        add_moments(slopes, some, some * chunk.weights[::spacing, None])
        if place.start < evidence.own:
            counts = chunk.weights
            plain += float(counts.double().sum())
            if emphasise:
                counts = token_emphasis(slope.square_() @ column.repeat(2), counts)
            moments.add(chunk.x, counts, chunk.original - chunk.x)
    if emphasise and plain > 0:
        if not moments.weight > 0:
            return _gate_up_moments(gate_up, reach, evidence, before, layer, emphasise=False)
        factor = plain / moments.weight
        moments.total.mul_(factor)
        moments.cross[0].mul_(factor)
        moments.weight = plain
    mirror(slopes)
    return moments.finish(), slopes.cpu() if evidence.count else torch.eye(len(slopes))


def _gate_up_metric(
    down: torch.Tensor, slopes: torch.Tensor, gradient: torch.Tensor | None
) -> torch.Tensor:
    """How errors of the outputs of gate and up count: ``(W^T G W) * E[s s^T]``, elementwise,
    ``[2I, 2I]``, with the weights ``W`` of down and the slopes ``s``; its diagonal ``[2I]`` if not
    all is finite.

    To first order, errors ``e`` of the outputs move the expert's output by ``W (s * e)``.
    """
    moved = down if gradient is None else gradient @ down
    metric = (down.T @ moved).repeat(2, 2).mul_(slopes)
    if bool(torch.isfinite(metric).all()):
        return metric
    diagonal = metric.diagonal().clone()
    return torch.where(torch.isfinite(diagonal), diagonal, torch.zeros(1))


def _quantize_down(
    weights: ExpertWeights,
    evidence: _WithSample,
    gate_up: torch.Tensor,
    inner: InnerActivations,
    layer: LayerContext,
) -> QuantizedMatrix:
    """Down ``[H, I]``, aiming at its original outputs plus what the hidden states lack; fills
    ``inner.after``.

    Routing weights sum to one over the experts of a token, so that each may add the whole drift.
    """
    target, hessian = _down_target(weights, evidence, gate_up, inner, layer)
    importance = torch.ones(target.shape[0]) if layer.gradient is None else layer.gradient
    return layer.down.quantize(target, hessian, importance)


def _down_target(
    weights: ExpertWeights,
    evidence: _WithSample,
    gate_up: torch.Tensor,
    inner: InnerActivations,
    layer: LayerContext,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Target ``[H, I]`` and Hessian ``[I, I]`` of down."""
    device, hidden, size = layer.device, gate_up.shape[1], gate_up.shape[0] // 2
    effective = ready(gate_up, device)
    moments = Moments(size, (size, hidden), device)
    for place, held in evidence.chunks():
        chunk = held.to(device)
        after = activate(product(chunk.x, effective.T))
        before = inner.before.tensor[place].to(device)
        inner.after.tensor[place] = after.cpu()
        finite = finite_rows(before) & finite_rows(after)
        if not bool(finite.all()):
            before, after, chunk = before[finite], after[finite], chunk.rows(finite)
        moments.add(after, chunk.weights, before - after, chunk.drift)
        inner.release()
    moments.finish()
    down = weights.down()
    changed, drift = ready(moments.cross[0], down.device), moments.cross[1]
    unit = max(moments.weight, 1e-30)
    hessian = moments.blend(torch.zeros(1), 0.0)
    target = corrected_target(
        down, hessian, lambda rows: (product(changed, down[rows].T) + drift[:, rows]) / unit
    )
    return target, hessian


def inner_activations(
    weights: ExpertWeights,
    effective: torch.Tensor,
    routed: Tokens,
    device: torch.device,
    pool: RowPool,
) -> InnerActivations:
    """What `quantize_expert` made of an expert's own tokens, to the last bit, from the weights
    ``[2I, H]`` that gate and up were quantised to."""
    source, given = ready(weights.gate_up(), device), ready(effective, device)
    count, size = routed.weights.numel(), effective.shape[0] // 2
    inner = InnerActivations(pool.empty(count, size), pool.empty(count, size))
    for start, held in zip(range(0, count, CHUNK), routed.chunks(), strict=True):
        chunk = held.to(device)
        place = slice(start, start + chunk.weights.numel())
        inner.before.tensor[place] = activate(product(chunk.original, source.T)).cpu()
        inner.after.tensor[place] = activate(product(chunk.x, given.T)).cpu()
        inner.release()
    return inner
