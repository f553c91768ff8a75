"""Input of the experts of one layer: tables of their tokens, and what is pooled from these."""

from dataclasses import dataclass

import torch

from erniequant.calibration.rows import Rows
from erniequant.encoding.hessian import Moments
from erniequant.encoding.matrix import MatrixQuantizer
from erniequant.models.architecture import ExpertGroup, MoeInput
from erniequant.quantization.expert import LayerContext
from erniequant.quantization.token_batches import TableTokens, TokenBatch

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
        fitted: bool ``[T]``: tokens that matrices are fitted to; the others are for training.
        tables: the large ones of these tables.
    """

    quantized: MoeInput
    original: MoeInput
    drift: torch.Tensor
    finite: torch.Tensor
    fitted: torch.Tensor
    tables: tuple[Rows, ...] = ()

    def evidence(self, row: torch.Tensor, weights: torch.Tensor) -> TokenBatch:
        """Tokens by row, with their weights, in memory."""
        found = TokenBatch(self.quantized.x[row], self.original.x[row], self.drift[row], weights)
        self.release()
        return found

    def tokens(self, row: torch.Tensor, weights: torch.Tensor) -> TableTokens:
        """The same, to be read in chunks; tokens that are not finite are left out, and those for
        training."""
        keep = self.fitted[row] & self.finite[row] & torch.isfinite(weights)
        return TableTokens(self.evidence, row[keep], weights[keep])

    def release(self) -> None:
        """Let go of what is in memory of tables on disk."""
        for table in self.tables:
            table.release()


def layer_context(
    inputs: LayerInput,
    group: ExpertGroup,
    gate_up: MatrixQuantizer,
    down: MatrixQuantizer,
    device: torch.device,
    gradient: torch.Tensor | None = None,
) -> LayerContext:
    """Pool the tokens of a group of experts: shared prior moments and an evenly spaced sample.

    A group that no token was routed to, such as the vision experts where there were no images,
    takes the tokens of all groups.
    """
    counts = inputs.quantized.weight.float().square().sum(-1)
    rows = inputs.quantized.rows_of(group)
    if not rows.numel():
        rows = torch.arange(counts.numel())
    everything = inputs.tokens(rows, counts[rows])
    fitted = rows[inputs.fitted[rows]]
    spaced = fitted[:: max(fitted.numel() // SAMPLE_TOKENS, 1)]
    sampled = inputs.tokens(spaced, counts[spaced])
    hidden = inputs.drift.shape[1]
    moments = Moments(hidden, (hidden,), device)
    for held in everything.chunks():
        chunk = held.to(device)
        moments.add(chunk.x, chunk.weights, chunk.original - chunk.x)
    moments.finish()
    unit = max(moments.weight, 1e-30)
    return LayerContext(
        gate_up,
        down,
        moments.total.div_(unit),
        moments.cross[0].div_(unit),
        inputs.evidence(sampled.row, sampled.weights),
        device,
        gradient,
    )
