"""Second moments of the inputs of a matrix, and their factorisation for error feedback.

A Hessian is ``H = sum_t c_t x_t x_t^T / sum_t c_t`` over tokens with weights ``c``. Experts with
few tokens are shrunk towards a prior. A factorisation that fails is repeated with more damping
and, in the end, without feedback; what happened is returned, never raised, because one bad matrix
must not stop a run of hours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from erniequant.encoding.products import add_moments, mirror, product

ROW_BLOCK = 256
"""Rows looked at together where a whole matrix would need a copy."""

DAMPING_STEPS = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Damping tried in turn, as a fraction of the mean diagonal; above 0.1 a matrix counts as
degraded."""

DEGRADED_DAMPING = 0.1


class Moments:
    """Weighted moments of inputs, summed over chunks of tokens.

    Attributes:
        total: ``sum_t c_t x_t x_t^T``, float32 ``[K, K]``; above the diagonal only after `finish`.
        cross: for every other table given to `add`, ``sum_t c_t x_t y_t^T``, float32 ``[K, N]``.
        weight: ``sum_t c_t``.
    """

    def __init__(self, inputs: int, others: Sequence[int] = (), device: Any = "cpu"):
        """Empty sums for ``inputs`` channels and ``others`` channels of other tables."""
        self.total = torch.zeros(inputs, inputs, device=device)
        self.cross = [torch.zeros(inputs, columns, device=device) for columns in others]
        self.weight = 0.0

    def add(self, x: torch.Tensor, weights: torch.Tensor, *others: torch.Tensor) -> None:
        """Add tokens ``x`` float32 ``[n, K]`` with weights ``[n]`` and their ``others``
        ``[n, N]``; all have to be finite."""
        weighted = x * weights[:, None]
        add_moments(self.total, x, weighted)
        for cross, other in zip(self.cross, others, strict=True):
            cross.add_(product(weighted.T, other))
        self.weight += float(weights.double().sum())

    def blend(self, prior: torch.Tensor, strength: float) -> torch.Tensor:
        """Turn ``total`` into a mean, with a prior mean ``[K, K]`` that counts as ``strength``
        units of weight, and return it.

        Without tokens that is the prior; without a usable prior, the identity.
        """
        blended = self.total.add_(prior, alpha=strength).div_(max(self.weight + strength, 1e-30))
        if not all_finite(blended) or blended.diagonal().sum() <= 0:
            blended.zero_().fill_diagonal_(1)
        return blended

    def finish(self) -> "Moments":
        """Complete the sums, and bring them to the CPU."""
        mirror(self.total)
        self.total = self.total.cpu()
        self.cross = [cross.cpu() for cross in self.cross]
        return self


@dataclass(frozen=True, eq=False)
class Factor:
    """Outcome of a factorisation: ``M`` unit lower triangular float32 ``[K, K]`` and how it was
    obtained."""

    feedback: torch.Tensor
    damping: float
    fallback: str | None


def finite_rows(x: torch.Tensor) -> torch.Tensor:
    """Mask of the rows of ``[T, K]`` that hold neither inf nor nan, nor values whose sum
    overflows."""
    return torch.isfinite(x.sum(-1))


def all_finite(matrix: torch.Tensor) -> bool:
    """True if a matrix ``[N, K]`` holds neither inf nor nan, without a copy of it."""
    return all(bool(torch.isfinite(rows).all()) for rows in matrix.split(ROW_BLOCK))


def cholesky(
    hessian: torch.Tensor, ridge: float, dtype: torch.dtype = torch.float64
) -> torch.Tensor | None:
    """Lower Cholesky factor of a float32 Hessian ``[K, K]`` plus a ridge, computed in ``dtype``;
    None if it is not positive definite. float32 takes 0.4 of the time."""
    damped = hessian.to(dtype, copy=True)
    damped.diagonal().add_(ridge)
    lower, info = torch.linalg.cholesky_ex(damped)
    del damped
    return lower if int(info) == 0 and all_finite(lower) else None


def factorise(hessian: torch.Tensor) -> Factor:
    """Factor a damped Hessian ``[K, K]`` as ``M D M^T``; falls back to no feedback (``M = I``)."""
    mean = float(hessian.diagonal().double().mean())
    if not mean > 0 or not all_finite(hessian):
        return Factor(torch.eye(hessian.shape[-1]), 0.0, "no usable Hessian")
    for damping in DAMPING_STEPS:
        lower = cholesky(hessian, damping * mean)
        if lower is not None:
            return Factor(lower.div_(lower.diagonal().clone()).float(), damping, None)
    return Factor(
        torch.eye(hessian.shape[-1]),
        DAMPING_STEPS[-1],
        "no damping made the Hessian positive definite",
    )
