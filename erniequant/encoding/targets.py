"""The target of a matrix and the importance of its outputs.

A matrix is not encoded for its own sake: it has to give the outputs of the original model from the
inputs of the quantised one. Both differ, because everything before it was quantised too.
"""

from collections.abc import Callable

import torch

from erniequant.encoding.hessian import ROW_BLOCK, all_finite, cholesky

CORRECTION_RIDGE = 0.1
"""Ridge of the correction, as a fraction of the mean diagonal; .03 and .3 are both worse on real
weights."""


def corrected_target(
    weight: torch.Tensor, hessian: torch.Tensor, missing: Callable[[slice], torch.Tensor]
) -> torch.Tensor:
    """The matrix that best makes up for what its inputs miss: least squares with a ridge.

    The solution of ``min_V sum_t c_t |V x_t - (W x_t + r_t)|^2 + ridge |V - W|^2``, which is
    ``W + M^T (H + ridge)^-1``. Two-sided calibration of this kind is in GPTAQ (arXiv 2504.02692).

    Args:
        weight: ``W``, float32 ``[N, K]``.
        hessian: ``H = sum_t c_t x_t x_t^T``, float32 ``[K, K]``.
        missing: gives columns of ``M = sum_t c_t x_t r_t^T``, float32 ``[K, n]``: moments of what
            a slice of the outputs lacks.

    Returns:
        float32 ``[N, K]``; ``weight`` itself where the moments cannot be used.
    """
    ridge = CORRECTION_RIDGE * float(hessian.diagonal().mean())
    lower = cholesky(hessian, ridge) if ridge > 0 else None
    if lower is None:
        return weight
    # The ridge is large enough to solve in float32, though not to factorise.
    lower = lower.float()
    corrected = torch.empty_like(weight)
    # Block by block: moments of all outputs would be as large as the Hessian.
    for start in range(0, weight.shape[0], ROW_BLOCK):
        rows = slice(start, start + ROW_BLOCK)
        change = torch.cholesky_solve(missing(rows), lower).T
        corrected[rows] = weight[rows] + change
    return corrected if all_finite(corrected) else weight


def inner_slopes(gate_and_up: torch.Tensor) -> torch.Tensor:
    """Slopes of an expert's inner activations ``silu(g) u``, token by token: ``u silu'(g)`` for its
    gate outputs, ``silu(g)`` for its up outputs.

    Args:
        gate_and_up: outputs of both projections, float32 ``[n, 2I]``.

    Returns:
        float32 ``[n, 2I]``.
    """
    gate, up = gate_and_up.chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    return torch.cat([up * sigmoid * (1 + gate * (1 - sigmoid)), gate * sigmoid], dim=-1)


def token_emphasis(sensitivity: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weights of tokens in the Hessian of gate and up: those whose output suffers more from errors
    count more.

    The root of a token's sensitivity, not all of it, lest a few extreme tokens decide alone.

    Args:
        sensitivity: how far equal errors of all gate and up outputs move the expert's output,
            squared, ``[n]``.
        weights: ``[n]``.

    Returns:
        float32 ``[n]``, up to a common factor; 0 for a token whose sensitivity overflows.
    """
    emphasised = weights * sensitivity.sqrt()
    return torch.where(torch.isfinite(emphasised), emphasised, 0.0)
