"""What a matrix should aim at, and which of its outputs matter.

A matrix is not encoded for its own sake: it has to give the outputs of the original model from the
inputs of the quantised one. Both differ, because everything before it was quantised too.
"""

import torch

CORRECTION_RIDGE = 0.1
"""Ridge of the correction, as a fraction of the mean diagonal; .03 and .3 are both worse on real
weights."""


def corrected_target(
    weight: torch.Tensor, hessian: torch.Tensor, missing: torch.Tensor
) -> torch.Tensor:
    """The matrix that best makes up for what its inputs miss: least squares with a ridge.

    The solution of ``min_V sum_t c_t |V x_t - (W x_t + r_t)|^2 + ridge |V - W|^2``, which is
    ``W + M^T (H + ridge)^-1``. Two-sided calibration of this kind is in GPTAQ (arXiv 2504.02692).

    Args:
        weight: ``W``, float32 ``[N, K]``.
        hessian: ``H = sum_t c_t x_t x_t^T``, float32 ``[K, K]``.
        missing: ``M = sum_t c_t x_t r_t^T``, float32 ``[K, N]``, of what the outputs lack.

    Returns:
        float32 ``[N, K]``; ``weight`` itself where the moments cannot be used.
    """
    ridge = CORRECTION_RIDGE * float(hessian.diagonal().mean())
    damped = hessian.double()
    damped.diagonal().add_(ridge)
    lower, info = torch.linalg.cholesky_ex(damped)
    if not ridge > 0 or int(info) != 0:
        return weight
    corrected = weight + torch.cholesky_solve(missing.double(), lower).T.float()
    return corrected if bool(torch.isfinite(corrected).all()) else weight


def inner_sensitivity(gate_and_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """How much an error of each gate and up output disturbs the expert's output, token by token.

    First order: an error ``d`` of gate unit ``i`` moves the output by
    ``down[:, i] u_i silu'(g_i) d``, one of up unit ``i`` by ``down[:, i] silu(g_i) d``; the squared
    length of that for ``d = 1``.

    Args:
        gate_and_up: outputs of both projections, float32 ``[n, 2I]``.
        down: ``[H, I]``.

    Returns:
        float32 ``[n, 2I]``.
    """
    gate, up = gate_and_up.chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    slope = up * sigmoid * (1 + gate * (1 - sigmoid))
    squares = torch.cat([slope, gate * sigmoid], dim=-1).square_()
    return squares.mul_(down.square().sum(0).repeat(2))


def output_importance(
    sensitivity: torch.Tensor, weights: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """How much each gate and up output counts: its sensitivity over the tokens, float32 ``[2I]``.

    Without tokens all activations are taken to be alike, and only the columns of ``down`` differ.
    """
    if not weights.numel():
        return down.square().sum(0).repeat(2)
    return weights @ sensitivity


def token_emphasis(sensitivity: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weights of tokens in the Hessian of gate and up: those whose output suffers more from errors
    count more.

    The root of a token's sensitivity, not all of it, lest a few extreme tokens decide alone.

    Args:
        sensitivity: of `inner_sensitivity`, ``[n, 2I]``.
        weights: ``[n]``, whose sum is kept.

    Returns:
        float32 ``[n]``; ``weights`` itself where nothing is known.
    """
    emphasised = weights * sensitivity.sum(-1).sqrt()
    total = emphasised.sum()
    if not bool(torch.isfinite(total)) or not bool(total > 0):
        return weights
    return emphasised * (weights.sum() / total)
