"""The tokens that an expert is quantised for, read a chunk at a time from tables that may lie on
disk."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

CHUNK = 1024
"""Tokens in memory at once. At the largest model's size that is 33 MB for each table."""

PATCHES_AT_ONCE = 4096
"""Image patches that pass through the vision tower together: its weights are read once for all of
them, and the widest of their activations has 84 MB in the largest tower."""


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Tokens in memory.

    Attributes:
        x: their inputs in the quantised model, float32 ``[n, H]``.
        original: their inputs in the original model, float32 ``[n, H]``.
        drift: difference of their hidden states at this layer, original minus quantised, ``[n,
            H]``.
        weights: weight of each token, ``[n]``.
    """

    x: torch.Tensor
    original: torch.Tensor
    drift: torch.Tensor
    weights: torch.Tensor

    def rows(self, which: torch.Tensor | slice) -> "TokenBatch":
        """Some of the tokens."""
        return TokenBatch(
            self.x[which], self.original[which], self.drift[which], self.weights[which]
        )

    def chunks(self) -> Iterator["TokenBatch"]:
        """All of them, `CHUNK` at a time."""
        for start in range(0, self.weights.numel(), CHUNK):
            yield self.rows(slice(start, start + CHUNK))

    def to(self, device: torch.device) -> "TokenBatch":
        """The same on a device."""
        tables = (self.x, self.original, self.drift, self.weights)
        return TokenBatch(*(table.to(device) for table in tables))


class Tokens(Protocol):
    """Tokens with their weights ``[n]``: a `TokenBatch`, or rows of a layer's tables."""

    @property
    def weights(self) -> torch.Tensor:
        """Weight of each token, ``[n]``."""

    def chunks(self) -> Iterator[TokenBatch]:
        """All tokens, at most `CHUNK` at a time."""


@dataclass(frozen=True, eq=False)
class TableTokens:
    """Tokens by their rows in the tables of a layer.

    ``read`` returns the batch of some rows (int64 ``[n]``) with their weights.
    """

    read: Callable[[torch.Tensor, torch.Tensor], TokenBatch]
    row: torch.Tensor
    weights: torch.Tensor

    def chunks(self) -> Iterator[TokenBatch]:
        """All tokens, `CHUNK` at a time."""
        for row, weights in zip(self.row.split(CHUNK), self.weights.split(CHUNK), strict=True):
            if row.numel():
                yield self.read(row, weights)
