"""GPTQ (arXiv 2210.17323) as the baseline of the WINT2 encoder: 2 bits, groups of 64 inputs,
asymmetric, clipped for the least squared error, inputs in their own order.

Columns are quantised from the first to the last; each error is spread over the columns that follow
by the rows of the Cholesky factor of the inverse Hessian. A group's range is taken from its weights
as the errors before it have left them.
"""

import torch

DAMPING = 0.01
"""Fraction of the mean diagonal that is added to the diagonal."""

SHRINK_STEPS, SMALLEST = 100, 0.2
"""Ranges tried: all of it, less in hundredths, down to a fifth."""


def gptq(
    weight: torch.Tensor, hessian: torch.Tensor, bits: int = 2, group: int = 64
) -> torch.Tensor:
    """Quantise ``weight`` ``[N, K]`` for second moments ``hessian`` ``[K, K]``: the same shape,
    float32. Scales keep float32 and zero points are integers."""
    w, h = weight.double().clone(), hessian.double().clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    w[:, dead] = 0
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    quantised, errors = torch.empty_like(w), torch.empty_like(w)
    for start in range(0, w.shape[1], group):
        end = min(start + group, w.shape[1])
        scale, zero = clipped_range(w[:, start:end].float(), bits)
        for k in range(start, end):
            code = (w[:, k] / scale).round().add_(zero).clamp_(0, 2**bits - 1)
            quantised[:, k] = (code - zero) * scale
            errors[:, k] = (w[:, k] - quantised[:, k]) / upper[k, k]
            w[:, k:end] -= errors[:, k, None] * upper[k, k:end]
        w[:, end:] -= errors[:, start:end] @ upper[start:end, end:]
    return quantised.float()


def clipped_range(part: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of each row ``[N, group]`` with the least squared error: ``[N]``."""
    levels = 2**bits - 1
    low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
    flat = high == low
    low, high = torch.where(flat, -1.0, low), torch.where(flat, 1.0, high)
    least = torch.full_like(low, torch.inf)
    best_scale, best_zero = torch.ones_like(low), torch.zeros_like(low)
    for step in range(int(SHRINK_STEPS * (1 - SMALLEST))):
        shrunk = 1 - step / SHRINK_STEPS
        scale = shrunk * (high - low) / levels
        zero = (-shrunk * low / scale).round()
        code = (part / scale[:, None]).round_().add_(zero[:, None]).clamp_(0, levels)
        loss = ((code - zero[:, None]) * scale[:, None] - part).square().sum(1)
        better = loss < least
        least = torch.where(better, loss, least)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def relative_error(weight: torch.Tensor, found: torch.Tensor, hessian: torch.Tensor) -> float:
    """``tr(E H E^T) / tr(W H W^T)`` of matrices ``[N, K]`` with the Hessian as it is."""
    h, w = hessian.double(), weight.double()
    error = w - found.double()
    return float(((error @ h) * error).sum() / ((w @ h) * w).sum())
