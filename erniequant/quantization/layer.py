"""Quantise all experts of one layer.

Experts are independent given the layer's inputs, so they run on several threads; every product
runs on one thread, which makes results independent of the number of threads.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from erniequant.calibration.rows import RowPool, Rows
from erniequant.encoding.hessian import Moments
from erniequant.encoding.matrix import MatrixQuantizer, QuantizedMatrix
from erniequant.models.architecture import ExpertGroup, MoeInput
from erniequant.quantization.expert import (
    ExpertWeights,
    InnerActivations,
    LayerContext,
    activate,
    inner_activations,
    quantize_expert,
)
from erniequant.quantization.token_batches import CHUNK, TableTokens, TokenBatch

SAMPLE_TOKENS = 2048
"""Tokens of the layer that stand in for an expert's own where it has few."""


@dataclass(frozen=True, eq=False)
class LayerInput:
    """What a layer's experts are given for the calibration text.

    Attributes:
        quantized: in the quantised model.
        original: in the original model, whose router may choose other experts.
        drift: original minus quantised hidden states that the outputs are added to, float32
            ``[T, H]``.
        finite: bool ``[T]``: tokens without inf or nan in any of these.
        tables: the large ones of these tables.
    """

    quantized: MoeInput
    original: MoeInput
    drift: torch.Tensor
    finite: torch.Tensor
    tables: tuple[Rows, ...] = ()

    def evidence(self, row: torch.Tensor, weights: torch.Tensor) -> TokenBatch:
        """Tokens by row, with their weights, in memory."""
        found = TokenBatch(self.quantized.x[row], self.original.x[row], self.drift[row], weights)
        self.release()
        return found

    def tokens(self, row: torch.Tensor, weights: torch.Tensor) -> TableTokens:
        """The same, to be read in chunks; tokens that are not finite are left out."""
        keep = self.finite[row] & torch.isfinite(weights)
        return TableTokens(self.evidence, row[keep], weights[keep])

    def release(self) -> None:
        """Let go of what is in memory of tables on disk."""
        for table in self.tables:
            table.release()


@dataclass(frozen=True, eq=False)
class Contribution:
    """What an expert adds to hidden states: rows int64 ``[n]`` and values float32 ``[n, H]``."""

    rows: torch.Tensor
    values: Rows

    def add_to(self, states: Rows) -> None:
        """Add it to hidden states ``[T, H]`` in place."""
        for start in range(0, self.rows.numel(), CHUNK):
            part = slice(start, start + CHUNK)
            states.tensor.index_add_(0, self.rows[part], self.values.tensor[part])
            self.values.release()
            states.release()


@dataclass(frozen=True, eq=False)
class PackedExpert:
    """Both projections of an expert as they are stored and reported."""

    gate_up: QuantizedMatrix
    down: QuantizedMatrix

    def stored(self) -> "PackedExpert":
        """Without the float32 weights."""
        return PackedExpert(self.gate_up.stored(), self.down.stored())


@dataclass(frozen=True, eq=False)
class ExpertOutcome:
    """A quantised expert, the number of tokens routed to it and how many of these were not finite,
    and what it and its original add to the hidden states of either model."""

    expert: int
    packed: PackedExpert
    tokens: int
    dropped: int
    quantized: Contribution
    original: Contribution


def layer_context(
    inputs: LayerInput,
    group: ExpertGroup,
    gate_up: MatrixQuantizer,
    down: MatrixQuantizer,
    device: torch.device,
) -> LayerContext:
    """Pool the tokens of a group of experts: shared prior moments and an evenly spaced sample.

    A group that no token was routed to, such as the experts for images where there were none,
    takes the tokens of all groups.
    """
    counts = inputs.quantized.weight.float().square().sum(-1)
    rows = inputs.quantized.rows_of(group)
    if not rows.numel():
        rows = torch.arange(counts.numel())
    everything = inputs.tokens(rows, counts[rows])
    spaced = rows[:: max(rows.numel() // SAMPLE_TOKENS, 1)]
    sampled = inputs.tokens(spaced, counts[spaced])
    hidden = inputs.drift.shape[1]
    moments = Moments(hidden, (hidden,), device)
    for held in everything.chunks():
        chunk = held.to(device)
        moments.add(chunk.x, chunk.weights, chunk.original - chunk.x)
    moments.cpu()
    unit = max(moments.weight, 1e-30)
    return LayerContext(
        gate_up,
        down,
        moments.total.div_(unit),
        moments.cross[0].div_(unit),
        inputs.evidence(sampled.row, sampled.weights),
        device,
    )


def quantize_experts(
    inputs: LayerInput,
    context: LayerContext,
    experts: range,
    load: Callable[[int], ExpertWeights],
    known: Callable[[int], PackedExpert | None],
    pool: RowPool,
    at_once: int,
) -> Iterator[ExpertOutcome]:
    """Quantise experts by their numbers, ``at_once`` at a time; outcomes come in order.

    Args:
        load: the source matrices of an expert.
        known: an expert that was quantised before a restart, which is only run, or None.
        pool: where tables of activations come from.
    """

    def one(expert: int) -> ExpertOutcome:
        torch.set_num_threads(1)
        with torch.no_grad():
            return _expert(inputs, context, expert, load(expert), known(expert), pool)

    workers = ThreadPoolExecutor(at_once)
    try:
        waiting: deque[Future[ExpertOutcome]] = deque()
        for expert in experts:
            # An outcome that waits for its turn still holds its tables.
            if len(waiting) == at_once:
                yield waiting.popleft().result()
            waiting.append(workers.submit(one, expert))
        while waiting:
            yield waiting.popleft().result()
    finally:
        # Not waiting for experts under way: after Ctrl-C that could be minutes.
        workers.shutdown(wait=False, cancel_futures=True)


def _expert(
    inputs: LayerInput,
    context: LayerContext,
    expert: int,
    weights: ExpertWeights,
    known: PackedExpert | None,
    pool: RowPool,
) -> ExpertOutcome:
    row, weight = inputs.quantized.routed_to(expert)
    routed = inputs.tokens(row, weight.square())
    if known is None:
        result = quantize_expert(weights, routed, context, pool)
        packed, inner = PackedExpert(result.gate_up, result.down), result.inner
    else:
        packed = known
        effective = known.gate_up.effective
        inner = inner_activations(weights, effective, routed, context.device, pool)
    device = context.device
    quantized = _quantized_contribution(inputs, packed, inner, row, weight, routed, pool, device)
    original = _original_contribution(inputs, expert, weights, inner, routed, pool, device)
    dropped = row.numel() - routed.row.numel()
    return ExpertOutcome(expert, packed.stored(), row.numel(), dropped, quantized, original)


def _quantized_contribution(
    inputs: LayerInput,
    packed: PackedExpert,
    inner: InnerActivations,
    row: torch.Tensor,
    weight: torch.Tensor,
    routed: TableTokens,
    pool: RowPool,
    device: torch.device,
) -> Contribution:
    """What the quantised expert adds in the quantised model, to tokens that are not finite too."""
    down = packed.down.effective.to(device)
    own = torch.isin(row, routed.row)
    order = torch.cat([routed.row, row[~own]])
    weights = torch.cat([weight[own], weight[~own]])[:, None]
    values = pool.empty(order.numel(), down.shape[0])
    count = routed.row.numel()
    for start in range(0, count, CHUNK):
        place = slice(start, min(start + CHUNK, count))
        output = linear(inner.after.tensor[place].to(device), down).cpu()
        values.tensor[place] = output * weights[place]
        inner.release()
        values.release()
    if order.numel() > count:
        x = inputs.quantized.x[order[count:]].to(device)
        gate_up = packed.gate_up.effective.to(device)
        values.tensor[count:] = linear(activate(linear(x, gate_up)), down).cpu() * weights[count:]
    return Contribution(order, values)


def _original_contribution(
    inputs: LayerInput,
    expert: int,
    source: ExpertWeights,
    inner: InnerActivations,
    routed: TableTokens,
    pool: RowPool,
    device: torch.device,
) -> Contribution:
    """What the source expert adds in the original model.

    Both models send most tokens to the same experts; the inner activations of these are there
    already, only those of the others are computed.
    """
    row, weight = inputs.original.routed_to(expert)
    known = routed.row
    down = source.down().to(device)
    values = pool.empty(row.numel(), down.shape[0])
    for start in range(0, known.numel(), CHUNK):
        place = slice(start, min(start + CHUNK, known.numel()))
        shared = torch.isin(known[place], row)
        target = torch.searchsorted(row, known[place][shared])
        output = linear(inner.before.tensor[place].to(device), down).cpu()
        values.tensor[target] = output[shared] * weight[target, None]
        inner.release()
        values.release()
    others = torch.where(~torch.isin(row, known))[0]
    if others.numel():
        gate_up = source.gate_up().to(device)
        for target in others.split(CHUNK):
            x = inputs.original.x[row[target]].to(device)
            output = linear(activate(linear(x, gate_up)), down).cpu()
            values.tensor[target] = output * weight[target, None]
            inputs.release()
            values.release()
    return Contribution(row, values)
