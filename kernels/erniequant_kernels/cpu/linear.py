"""The product with one packed matrix on the CPU: as for a layer whose only expert has all rows."""

import torch

from erniequant_kernels.cpu.machine import Machine, machine
from erniequant_kernels.cpu.moe import multiply_packed
from erniequant_kernels.matrices import PackedMatrices


def packed_linear_cpu(
    x: torch.Tensor, matrix: PackedMatrices, *, on: Machine | None = None
) -> torch.Tensor:
    """``x @ W.T`` on packed weights; sums are float32.

    Rotated inputs are bfloat16 where ``x`` is and the processor multiplies bfloat16, else float32.

    Args:
        x: ``[T, K]`` bfloat16, float16 or float32.
        matrix: of one expert.
        on: the machine to make code for; this one unless given.

    Returns:
        ``[T, N]`` in the dtype of ``x``; the same bits for any number of threads.
    """
    if len(x) == 0:  # compiled loops begin with a turn
        return torch.empty(0, matrix.outputs, dtype=x.dtype)
    rows, bfloat16 = torch.arange(len(x)), x.dtype == torch.bfloat16
    given = x.float().contiguous()
    out = multiply_packed(matrix, bfloat16, on or machine(), given, rows, [len(x)], False)
    return out.to(x.dtype)
