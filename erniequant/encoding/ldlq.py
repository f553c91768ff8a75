"""Error feedback (LDLQ, arXiv 2307.13304) with one input row per step and weighted sequences along
the outputs.

With the Hessian ``H = M D M^T`` (``M`` unit lower triangular), the loss ``tr(E H E^T)`` of the
error ``E = W - Q`` equals ``sum_k D_k |E_k + sum_{j>k} M_jk E_j|^2``. Rows are therefore encoded
from the last to the first, each aiming at its own weights plus the feedback of the rows already
encoded. Any order of rows may be chosen.
"""

from dataclasses import dataclass

import numpy as np
import torch

from erniequant.codes.viterbi import Encoder
from erniequant.encoding.products import product

BLOCK = 64
"""Rows whose mutual feedback is applied one by one; the others receive it in one product per
block."""


@dataclass(frozen=True, eq=False)
class OutputFactor:
    """How errors of outputs count, in units of their scales.

    With the metric ``G = L B L^T`` of the outputs (``L`` unit lower triangular by tiles), tiles are
    encoded from the last to the first, each making up for the errors of those after it.

    Attributes:
        weight: diagonal of ``B``, float32 ``[N]``, positive.
        feedback: ``L`` below its diagonal tiles, float32 ``[N, N]``; None for a diagonal metric.
    """

    weight: torch.Tensor
    feedback: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class EncodedMatrix:
    """A matrix after encoding: labels float32 ``[K, N]`` and words uint32 ``[K, N / T, T * bits /
    32]``."""

    labels: torch.Tensor
    words: np.ndarray


def encode_matrix(
    weight: torch.Tensor,
    feedback: torch.Tensor,
    scale: torch.Tensor,
    outputs: OutputFactor,
    encoder: Encoder,
    tile: int,
) -> EncodedMatrix:
    """Encode a matrix under error feedback from both sides.

    Args:
        weight: float32 ``[K, N]``, rotated, one row per input, in encoding order from the last row
            to the first.
        feedback: float32 ``[K, K]``, the unit lower triangular factor ``M`` in the same order.
        scale: float32 ``[N]``, positive: weight of output ``n`` = ``scale[n] * label``.
        outputs: how errors of outputs count, and make up for each other.
        encoder: the code.
        tile: weights per sequence; divides N.
    """
    if outputs.feedback is None:
        labels, words, _ = _encode_tiles(weight, weight, feedback, scale, outputs, encoder, tile)
        return EncodedMatrix(labels, words)
    columns = weight.shape[1]
    shaped = torch.empty_like(weight)
    parts = []
    for end in range(columns, 0, -tile):
        here, later = slice(end - tile, end), slice(end, columns)
        own = scale[here]
        missing = product(shaped[:, later], outputs.feedback[later, here]) * own
        part = OutputFactor(outputs.weight[here], None)
        begun = weight[:, here].contiguous()
        labels, words, aimed = _encode_tiles(
            begun + missing, begun, feedback, own, part, encoder, tile
        )
        shaped[:, here] = (aimed - missing) / own - labels
        parts.append((labels, words))
    labels = torch.cat([part[0] for part in reversed(parts)], dim=1)
    return EncodedMatrix(labels, np.concatenate([part[1] for part in reversed(parts)], axis=1))


def _encode_tiles(
    start: torch.Tensor,
    weight: torch.Tensor,
    feedback: torch.Tensor,
    scale: torch.Tensor,
    outputs: OutputFactor,
    encoder: Encoder,
    tile: int,
) -> tuple[torch.Tensor, np.ndarray, torch.Tensor]:
    """Encode ``weight`` ``[K, N]``, beginning to aim at ``start``; labels, words and the aims of
    all rows."""
    rows = weight.shape[0]
    labels, error, aims = torch.empty_like(weight), weight.clone(), start.clone()
    words = []
    position_weight = normalised_importance(outputs.weight, tile)
    for end in range(rows, 0, -BLOCK):
        block = slice(max(end - BLOCK, 0), end)
        aim = aims[block]
        aim += product(feedback[end:, block].T, error[end:])
        found, row_labels = encoder.encode_rows(
            aim.numpy(), feedback[block, block].contiguous().numpy(), scale.numpy(),
            position_weight, error[block].numpy(),
        )  # fmt: skip
        labels[block] = torch.from_numpy(row_labels)
        words.append(found)
    return labels, np.concatenate(words[::-1]), aims


def normalised_importance(importance: torch.Tensor, tile: int) -> np.ndarray:
    """Weights of the positions of each sequence, with mean 1: float32 ``[N / T, T]``."""
    by_tile = importance.view(-1, tile)
    return (by_tile / by_tile.mean(-1, keepdim=True)).float().numpy()
