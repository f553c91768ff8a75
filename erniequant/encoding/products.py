"""Products of large matrices in the type that the device multiplies fastest.

In bfloat16 factors are rounded to 8 bits, sums are float32, and each result is rounded once more:
2.1 times as fast as float32 with AVX512_BF16, more with AMX or on a GPU. Models run in it anyway.
Second moments, and whatever else has to be positive definite, are not computed in it: their errors
would be larger than their least eigenvalues. Metrics of outputs and refitted scales in bfloat16
made the errors of some matrices of the tiny vision-language model three times to forty times as
large.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from erniequant.system import product_dtype

MOMENT_BLOCK = 512
"""Columns of a symmetric product at once."""


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b``, float32; a factor that is in `product_dtype` already is not converted again."""
    dtype = product_dtype(a.device)
    return (a.to(dtype) @ b.to(dtype)).float()


def ready(a: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A matrix on a device and in `product_dtype`, as factor of many products there."""
    return a.to(device, product_dtype(device))


def add_moments(total: torch.Tensor, x: torch.Tensor, weighted: torch.Tensor) -> None:
    """Add ``weighted^T x`` to ``total`` float32 ``[K, K]``, below and on the diagonal only: half
    the work of a symmetric product. `mirror` completes it.

    Args:
        x: float32 ``[n, K]``.
        weighted: its rows, multiplied by their weights.
    """
    for start in range(0, total.shape[0], MOMENT_BLOCK):
        columns = slice(start, start + MOMENT_BLOCK)
        total[start:, columns].addmm_(weighted[:, start:].T, x[:, columns])


def mirror(total: torch.Tensor) -> None:
    """Copy what `add_moments` has summed to above the diagonal, in place."""
    for start in range(0, total.shape[0], MOMENT_BLOCK):
        rows = slice(start, start + MOMENT_BLOCK)
        block = total[rows, rows]
        block.copy_(block.tril() + block.tril(-1).T)
        total[rows, start + MOMENT_BLOCK :] = total[start + MOMENT_BLOCK :, rows].T


def symmetric_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a^T b`` float32 ``[N, N]`` for ``a`` and ``b`` ``[n, N]`` for which that is symmetric, at
    half the work."""
    total = torch.zeros(a.shape[1], a.shape[1], device=a.device)
    add_moments(total, b, a)
    mirror(total)
    return total


@contextmanager
def fast_products(device: torch.device, gradients: bool) -> Iterator[None]:
    """Have the products of modules be in `product_dtype`, on one thread, with or without gradients;
    all three settings belong to a thread."""
    dtype = product_dtype(device)
    torch.set_num_threads(1)
    with (
        torch.set_grad_enabled(gradients),
        torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16),
    ):
        yield
