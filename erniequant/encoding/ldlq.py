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

BLOCK = 64
"""Rows whose mutual feedback is applied one by one; the others receive it in one product per
block."""


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
    importance: torch.Tensor,
    encoder: Encoder,
    tile: int,
) -> EncodedMatrix:
    """Encode a matrix under error feedback.

    Args:
        weight: float32 ``[K, N]``, rotated, one row per input, in encoding order from the last row
            to the first.
        feedback: float32 ``[K, K]``, the unit lower triangular factor ``M`` in the same order.
        scale: float32 ``[N]``, positive: weight of output ``n`` = ``scale[n] * label``.
        importance: float32 ``[N]``, positive: how much the squared error of output ``n`` counts.
        encoder: the code.
        tile: weights per sequence; divides N.
    """
    rows, outputs = weight.shape
    tiles = outputs // tile
    labels = torch.empty_like(weight)
    error = torch.zeros_like(weight)
    words = np.zeros((rows, tiles, encoder.code.words_per_sequence(tile)), np.uint32)
    inverse = 1.0 / scale
    position_weight = normalised_importance(importance * scale**2, tile)
    for end in range(rows, 0, -BLOCK):
        start = max(end - BLOCK, 0)
        aim = weight[start:end] + feedback[end:, start:end].T @ error[end:]
        for k in range(end - 1, start - 1, -1):
            target = aim[k - start] + feedback[k + 1 : end, k] @ error[k + 1 : end]
            normalised = (target * inverse).view(tiles, tile).numpy()
            words[k], row_labels = encoder.encode(normalised, position_weight)
            labels[k] = torch.from_numpy(row_labels).view(-1)
            error[k] = weight[k] - labels[k] * scale
    return EncodedMatrix(labels, words)


def normalised_importance(importance: torch.Tensor, tile: int) -> np.ndarray:
    """Weights of the positions of each sequence, with mean 1: float32 ``[N / T, T]``."""
    by_tile = importance.view(-1, tile)
    return (by_tile / by_tile.mean(-1, keepdim=True)).float().numpy()
