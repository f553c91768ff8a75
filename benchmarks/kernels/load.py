"""How a batch spreads over experts: evenly, or as a trained router spreads it."""

from dataclasses import dataclass
from functools import cache

import torch

from erniequant_kernels.bench.problem import Shape

EXPONENT = 0.3
"""Popularity of the experts in a skewed routing: the i-th most popular one is chosen with a weight
of ``i ** -EXPONENT``, so the first one 2.5 times as often as the average. 64 tokens that choose 6
of 64 experts then need 75 row tiles of 8 tokens on average; 72 if all experts are equally popular,
and 64 if they were to get the same numbers."""
DRAWS = 32


@dataclass(frozen=True)
class Load:
    """Averages over many batches.

    Attributes:
        active: experts with at least one token.
        counts: assignments per expert, one row a batch.
    """

    active: float
    counts: torch.Tensor

    def row_tiles(self, block_m: int) -> int:
        """Row tiles of ``block_m`` tokens, rounded."""
        return round(float((-(-self.counts // block_m)).sum(1).float().mean()))


@cache
def load(shape: Shape, tokens: int, exponent: float = EXPONENT) -> Load:
    """The load of ``tokens`` that each choose ``top_k`` different experts."""
    generator = torch.Generator().manual_seed(tokens)
    popularity = torch.arange(1, shape.experts + 1).double() ** -exponent
    size = (DRAWS, tokens, shape.experts)
    # Of exponential waiting times with these rates, the first k are k experts without replacement.
    waiting = -torch.rand(size, generator=generator, dtype=torch.float64).log() / popularity
    chosen = waiting.topk(shape.top_k, largest=False).indices.reshape(DRAWS, -1)
    counts = torch.zeros(DRAWS, shape.experts, dtype=torch.int64)
    counts.scatter_add_(1, chosen, torch.ones_like(chosen))
    return Load(float((counts > 0).sum(1).float().mean()), counts)


def even_load(shape: Shape, tokens: int) -> Load:
    """The load with as equal numbers as possible."""
    total = tokens * shape.top_k
    counts = torch.full((1, shape.experts), total // shape.experts)
    counts[0, : total % shape.experts] += 1
    return Load(float((counts > 0).sum()), counts)
