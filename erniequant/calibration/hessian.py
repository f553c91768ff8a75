"""Second moments of the inputs of a matrix, and their factorisation for error feedback.

A Hessian is ``H = sum_t c_t x_t x_t^T / sum_t c_t`` over tokens with weights ``c``. Experts with
few tokens are shrunk towards a prior. A factorisation that fails is repeated with more damping
and, in the end, without feedback; what happened is returned, never raised, because one bad matrix
must not stop a run of hours.
"""

from dataclasses import dataclass

import torch

CHUNK = 4096
"""Tokens per matrix product; bounds the float32 copy of the weighted inputs."""

DAMPING_STEPS = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Damping tried in turn, as a fraction of the mean diagonal; above 0.1 a matrix counts as
degraded."""

DEGRADED_DAMPING = 0.1


@dataclass(frozen=True, eq=False)
class Moments:
    """Weighted second moments of inputs: ``total`` float32 ``[K, K]``, ``weight`` the sum of token
    weights."""

    total: torch.Tensor
    weight: float
    tokens: int
    dropped: int

    def mean(self) -> torch.Tensor:
        """Second moment per unit of weight, or zeros without any weight."""
        return self.total / self.weight if self.weight > 0 else torch.zeros_like(self.total)


@dataclass(frozen=True, eq=False)
class Factor:
    """Outcome of a factorisation: ``M`` unit lower triangular float32 ``[K, K]`` and how it was
    obtained."""

    feedback: torch.Tensor
    damping: float
    fallback: str | None


def finite_rows(x: torch.Tensor) -> torch.Tensor:
    """Which rows of ``[T, K]`` hold neither inf nor nan, nor values whose sum overflows."""
    return torch.isfinite(x.sum(-1))


def second_moments(x: torch.Tensor, weights: torch.Tensor) -> Moments:
    """Accumulate the moments of tokens ``x`` ``[T, K]`` with weights ``[T]``; non-finite tokens
    are dropped."""
    finite = finite_rows(x) & torch.isfinite(weights)
    dropped = int((~finite).sum())
    if dropped:
        x, weights = x[finite], weights[finite]
    total = torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float32, device=x.device)
    for start in range(0, x.shape[0], CHUNK):
        part = x[start : start + CHUNK].float()
        total += (part * weights[start : start + CHUNK, None].float()).T @ part
    return Moments(total, float(weights.double().sum()), x.shape[0], dropped)


def cross_moments(x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """``sum_t c_t x_t y_t^T`` float32 ``[K, N]`` of finite tokens ``[T, K]``, ``[T, N]`` with
    weights ``[T]``."""
    total = torch.zeros(x.shape[-1], y.shape[-1], dtype=torch.float32, device=x.device)
    for start in range(0, x.shape[0], CHUNK):
        part = slice(start, start + CHUNK)
        total += (x[part].float() * weights[part, None].float()).T @ y[part].float()
    return total


def shrink(own: Moments, prior: torch.Tensor, strength: float) -> torch.Tensor:
    """Blend an expert's moments with a prior mean that counts as ``strength`` units of token
    weight.

    Without tokens of its own the expert gets the prior; without a usable prior, the identity.
    """
    blended = (own.total + strength * prior) / max(own.weight + strength, 1e-30)
    if not torch.isfinite(blended).all() or blended.diagonal().sum() <= 0:
        return torch.eye(prior.shape[-1], device=prior.device)
    return blended


def factorise(hessian: torch.Tensor) -> Factor:
    """Factor a damped Hessian ``[K, K]`` as ``M D M^T``; falls back to no feedback (``M = I``)."""
    size = hessian.shape[-1]
    identity = torch.eye(size, dtype=torch.float32)
    mean = hessian.diagonal().double().mean()
    if not torch.isfinite(hessian).all() or mean <= 0:
        return Factor(identity, 0.0, "no usable Hessian")
    for damping in DAMPING_STEPS:
        damped = hessian.double()
        damped.diagonal().add_(damping * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0 and bool(torch.isfinite(lower).all()):
            return Factor((lower / lower.diagonal()).float(), damping, None)
    return Factor(identity, DAMPING_STEPS[-1], "no damping made the Hessian positive definite")
