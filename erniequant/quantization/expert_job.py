"""The work on one expert as plain data: `run_job` turns an `ExpertJob` into an `ExpertOutcome`.

Jobs are independent given the layer that they share. All three can be pickled, so a job may run in
a thread, in another process or on another machine. It names its source matrices and its tokens;
they are read when it runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from erniequant.calibration.rows import RowPool, Rows
from erniequant.encoding.matrix import QuantizedMatrix
from erniequant.encoding.products import product, ready
from erniequant.models.architecture import TensorSource
from erniequant.quantization.expert import (
    ExpertWeights,
    InnerActivations,
    LayerContext,
    activate,
    inner_activations,
    quantize_expert,
)
from erniequant.quantization.layer import LayerInput
from erniequant.quantization.token_batches import CHUNK, TableTokens


@dataclass(frozen=True, eq=False)
class PackedExpert:
    """Both projections of an expert as they are stored and reported."""

    gate_up: QuantizedMatrix
    down: QuantizedMatrix

    def stored(self) -> "PackedExpert":
        """Without the float32 weights."""
        return PackedExpert(self.gate_up.stored(), self.down.stored())

    def decoded(self, context: LayerContext) -> "PackedExpert":
        """With the float32 weights that the stored parts stand for."""
        return PackedExpert(
            replace(self.gate_up, effective=context.gate_up.decode(self.gate_up.parts)),
            replace(self.down, effective=context.down.decode(self.down.parts)),
        )


@dataclass(frozen=True, eq=False)
class Routed:
    """Tokens that a router sent to an expert: their rows int64 ``[n]`` in the layer's tables,
    ascending, and their routing weights float32 ``[n]``."""

    rows: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True, eq=False)
class ExpertLayer:
    """A layer, or one group of its experts: what all jobs share. A worker needs it once.

    Workers may have their own ``source``, of which only source matrices of experts are read,
    ``pool``, which makes a job's own tables, and ``context.device``.
    """

    source: TensorSource
    inputs: LayerInput
    context: LayerContext
    pool: RowPool


@dataclass(frozen=True, eq=False)
class ExpertJob:
    """What to do for one expert of an `ExpertLayer`.

    Attributes:
        expert: its number within the layer.
        matrices: names of its source matrices in ``source``, by `EXPERT_MATRICES`.
        quantized: its tokens in the quantised model.
        original: its tokens in the original model; None if only the quantised one is run, once
            more.
        packed: the expert as it was quantised before a restart, `PackedExpert.stored`; it is only
            run then.
    """

    expert: int
    matrices: Mapping[str, str]
    quantized: Routed
    original: Routed | None
    packed: PackedExpert | None = None


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
class ExpertOutcome:
    """A quantised expert, the number of tokens that it was fitted to and how many of these were not
    finite,
    and what it and its original add to the hidden states of either model."""

    expert: int
    packed: PackedExpert
    tokens: int
    dropped: int
    quantized: Contribution
    original: Contribution | None


def run_job(job: ExpertJob, layer: ExpertLayer) -> ExpertOutcome:
    """Quantise an expert, or only run one that is packed already.

    The result depends on the arguments and the kind of processor alone: products run on one thread
    of the caller's, whatever else is at work.

    Raises:
        ErnieQuantError: a source matrix cannot be read, or the disk has no room for a table.
    """
    # This setting and the next belong to a thread.
    torch.set_num_threads(1)
    with torch.no_grad():
        return _run(job, layer)


def _run(job: ExpertJob, layer: ExpertLayer) -> ExpertOutcome:
    source = ExpertWeights(lambda matrix: layer.source.tensor(job.matrices[matrix]).float())
    tokens = int(layer.inputs.fitted[job.quantized.rows].sum())
    if job.original is None:
        assert job.packed is not None
        again = _run_again(job.quantized, layer, job.packed.decoded(layer.context))
        return ExpertOutcome(job.expert, job.packed, tokens, 0, again, None)
    routed = layer.inputs.tokens(job.quantized.rows, job.quantized.weights.square())
    if job.packed is None:
        result = quantize_expert(source, routed, layer.context, layer.pool)
        packed, inner = PackedExpert(result.gate_up, result.down), result.inner
    else:
        packed = job.packed.decoded(layer.context)
        effective, device = packed.gate_up.effective, layer.context.device
        inner = inner_activations(source, effective, routed, device, layer.pool)
    return ExpertOutcome(
        job.expert,
        packed.stored(),
        tokens,
        tokens - routed.row.numel(),
        _quantized_contribution(job.quantized, layer, packed, inner, routed),
        _original_contribution(job.original, layer, source, inner, routed),
    )


def _run_again(chosen: Routed, layer: ExpertLayer, packed: PackedExpert) -> Contribution:
    """What a packed expert adds in the quantised model."""
    device = layer.context.device
    gate_up = ready(packed.gate_up.effective, device).T
    down = ready(packed.down.effective, device).T
    values = layer.pool.empty(chosen.rows.numel(), down.shape[1])
    for start in range(0, chosen.rows.numel(), CHUNK):
        part = slice(start, start + CHUNK)
        x = layer.inputs.quantized.x[chosen.rows[part]].to(device)
        output = product(activate(product(x, gate_up)), down).cpu()
        values.tensor[part] = output * chosen.weights[part, None]
        layer.inputs.release()
        values.release()
    return Contribution(chosen.rows, values)


def _quantized_contribution(
    chosen: Routed,
    layer: ExpertLayer,
    packed: PackedExpert,
    inner: InnerActivations,
    routed: TableTokens,
) -> Contribution:
    """What the quantised expert adds in the quantised model, to all tokens that chose it."""
    row, weight, device = chosen.rows, chosen.weights, layer.context.device
    down = ready(packed.down.effective, device).T
    own = torch.isin(row, routed.row)
    order = torch.cat([routed.row, row[~own]])
    weights = torch.cat([weight[own], weight[~own]])[:, None]
    values = layer.pool.empty(order.numel(), down.shape[1])
    count = routed.row.numel()
    for start in range(0, count, CHUNK):
        place = slice(start, min(start + CHUNK, count))
        output = product(inner.after.tensor[place].to(device), down).cpu()
        values.tensor[place] = output * weights[place]
        inner.release()
        values.release()
    if order.numel() > count:
        gate_up = ready(packed.gate_up.effective, device).T
        for start in range(count, order.numel(), CHUNK):
            place = slice(start, start + CHUNK)
            x = layer.inputs.quantized.x[order[place]].to(device)
            output = product(activate(product(x, gate_up)), down).cpu()
            values.tensor[place] = output * weights[place]
            layer.inputs.release()
            values.release()
    return Contribution(order, values)


def _original_contribution(
    chosen: Routed,
    layer: ExpertLayer,
    source: ExpertWeights,
    inner: InnerActivations,
    routed: TableTokens,
) -> Contribution:
    """What the source expert adds in the original model.

    Both models send most tokens to the same experts; the inner activations of these are there
    already, only those of the others are computed.
    """
    row, weight, device = chosen.rows, chosen.weights, layer.context.device
    known = routed.row
    down = ready(source.down(), device).T
    values = layer.pool.empty(row.numel(), down.shape[1])
    for start in range(0, known.numel(), CHUNK):
        place = slice(start, min(start + CHUNK, known.numel()))
        shared = torch.isin(known[place], row)
        target = torch.searchsorted(row, known[place][shared])
        output = product(inner.before.tensor[place].to(device), down).cpu()
        values.tensor[target] = output[shared] * weight[target, None]
        inner.release()
        values.release()
    others = torch.where(~torch.isin(row, known))[0]
    if others.numel():
        gate_up = ready(source.gate_up(), device).T
        for target in others.split(CHUNK):
            x = layer.inputs.original.x[row[target]].to(device)
            output = product(activate(product(x, gate_up)), down).cpu()
            values.tensor[target] = output * weight[target, None]
            layer.inputs.release()
            values.release()
    return Contribution(row, values)
