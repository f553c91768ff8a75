"""Operations that quantising takes beside the search, and their time on one core of a server."""

from dataclasses import dataclass

import torch

from erniequant.quantization.expert import METRIC_TOKENS
from erniequant.quantization.layer import SAMPLE_TOKENS
from erniequant.system import product_dtype

_BFLOAT16_RATE = 180e9
"""Operations a second of large products in bfloat16, with AVX512_BF16 at 3.5 GHz."""

_FLOAT32_RATE = 90e9
_FLOAT64_RATE = 20e9
"""Of Cholesky factorisations."""


@dataclass(frozen=True)
class Work:
    """Floating-point operations of products in `product_dtype`, in float32, and in float64."""

    low: float = 0.0
    full: float = 0.0
    double: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.low + other.low, self.full + other.full, self.double + other.double)

    def times(self, count: float) -> "Work":
        """So many times this."""
        return Work(count * self.low, count * self.full, count * self.double)

    def seconds(self) -> float:
        """Time on one core."""
        fast = product_dtype(torch.device("cpu")) == torch.bfloat16
        low = _BFLOAT16_RATE if fast else _FLOAT32_RATE
        return self.low / low + self.full / _FLOAT32_RATE + self.double / _FLOAT64_RATE


def expert_work(hidden: int, inner: int, tokens: float) -> Work:
    """Work on one expert with as many tokens, in both models, but for the search."""
    if not tokens:
        return _of_matrices(hidden, inner)
    both = 2 * inner
    sample = min(tokens, SAMPLE_TOKENS)
    # Gate and up twice, down twice.
    forward = (tokens + sample) * 2 * hidden * both + tokens * 2 * inner * hidden
    cross = tokens * (hidden**2 + inner**2 + inner * hidden)
    slopes = min(tokens + sample, 2 * METRIC_TOKENS) * both**2
    moments = tokens * (hidden**2 + inner**2)
    # Of symmetric products half is computed.
    of_tokens = Work(low=2 * (forward + cross), full=moments + slopes)
    return of_tokens + _of_matrices(hidden, inner)


def _of_matrices(hidden: int, inner: int) -> Work:
    """Targets, factorisations, feedback and refitted scales."""
    both = 2 * inner
    targets = hidden**2 * both + inner**2 * hidden
    metric = inner**2 * hidden
    refit = 2 * hidden**2 * both + 2 * hidden * both**2 + 2 * inner**2 * hidden
    feedback = (hidden**2 * both + hidden * both**2 + inner**2 * hidden) / 2
    # Two for each Hessian, and the system of the scales.
    factors = (2 * hidden**3 + 2 * inner**3 + both**3) / 3
    solved = targets + metric + refit + both**3 / 6
    return Work(low=2 * (targets + feedback), full=2 * solved, double=factors)
