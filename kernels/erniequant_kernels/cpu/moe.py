"""The experts of a layer on packed weights, on the CPU.

Assignments are sorted by expert and cut into blocks of tokens; each block's weights are decoded as
they are multiplied, whatever the number of tokens, so nothing is ever kept decoded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from erniequant_kernels.cpu.combine import combine
from erniequant_kernels.cpu.machine import Machine, machine
from erniequant_kernels.cpu.product import (
    MOST_GROUPS,
    ProductSpec,
    group_tokens,
    most_tokens,
    product,
    takes_bfloat16,
)
from erniequant_kernels.cpu.rotation import RotationSpec, rotation
from erniequant_kernels.cpu.threads import run_items
from erniequant_kernels.matrices import PackedMatrices

DECODED_PER_MICROSECOND, ADDED_PER_MICROSECOND = 30_000, 80_000
"""Weights that one core decodes, and that it multiplies, roughly."""

FEW_ASSIGNMENTS = 64
"""Up to so many are sorted in Python, which takes less time than ten small operators."""

BLOCK_TOKENS = (1, 2, 3, 4, 6, 8, 12)
"""Rows of blocks that are not grouped. More sizes would fit an expert's rows better, and take
longer to compile."""


@dataclass(frozen=True)
class Blocks:
    """Blocks of rows for one compiled product.

    Attributes:
        tokens: rows that are multiplied together.
        grouped: blocks are of any number of rows from ``tokens`` on; otherwise of ``tokens``.
        expert, first, rows: int32 ``[blocks]``: the expert of each block, its first row and its
            number of rows.
    """

    tokens: int
    grouped: bool
    expert: torch.Tensor
    first: torch.Tensor
    rows: torch.Tensor


def cut_into_blocks(counts: list[int], most: int, group: int | None = None) -> list[Blocks]:
    """Blocks of rows that are sorted by expert, of which ``counts`` has the number for each.

    Args:
        most: rows of the largest block that is not grouped.
        group: rows of a group of grouped blocks; None for none. A rest of less than half a group
            is left to blocks that are not grouped.
    """
    sizes = [size for size in reversed(BLOCK_TOKENS) if size <= most]
    found: dict[tuple[int, bool], list[tuple[int, int, int]]] = {}
    row = 0
    for expert, count in enumerate(counts):
        end = row + count
        while group is not None and end - row >= group:
            rest = (end - row) % group
            whole = end - row - (rest if 2 * rest < group else 0)
            size = min(whole, MOST_GROUPS * group)
            found.setdefault((group, True), []).append((expert, row, size))
            row += size
        for size in sizes:
            while end - row >= size:
                found.setdefault((size, False), []).append((expert, row, size))
                row += size
    return [
        Blocks(tokens, grouped, *torch.tensor(blocks, dtype=torch.int32).T.contiguous())
        for (tokens, grouped), blocks in found.items()
    ]


Multiply = Callable[[torch.Tensor, torch.Tensor, list[int], bool], torch.Tensor]
"""Float32 rows, which of them to multiply, sorted by expert, how many each expert has, and whether
SwiGLU comes first, to the products, float32 ``[rows, N]``."""


def moe_experts_cpu(
    x: torch.Tensor, expert_index: torch.Tensor, routing: torch.Tensor, gate_up: PackedMatrices,
    down: PackedMatrices, *, on: Machine | None = None,
) -> torch.Tensor:  # fmt: skip
    """`run_experts` with native codes.

    Rotated activations are bfloat16 where ``x`` is and the processor multiplies bfloat16, else
    float32.

    on: the machine to make code for; this one unless given.
    """
    chosen = on or machine()

    def multiply(matrix: PackedMatrices) -> Multiply:
        return partial(multiply_packed, matrix, x.dtype == torch.bfloat16, chosen)

    return run_experts(
        x, expert_index, routing, gate_up.experts, multiply(gate_up), multiply(down), chosen
    )


def run_experts(
    x: torch.Tensor, expert_index: torch.Tensor, routing: torch.Tensor, experts: int,
    gate_up: Multiply, down: Multiply, on: Machine,
) -> torch.Tensor:  # fmt: skip
    """Weighted sum of ``down(silu(gate(x)) * up(x))`` over the chosen experts of each token; sums
    are float32.

    Args:
        x: ``[T, H]`` bfloat16, float16 or float32.
        expert_index: integer ``[T, k]``; an index outside ``[0, experts)`` contributes nothing.
        routing: float ``[T, k]``.

    Returns:
        ``[T, H]`` in the dtype of ``x``; the same bits for any number of threads.
    """
    top_k, width = expert_index.shape[1], x.shape[1]
    order, counts = _by_expert(expert_index, experts)
    out = torch.zeros(x.shape)
    if not order.numel():
        return out.to(x.dtype)
    token = order if top_k == 1 else order // top_k
    hidden = gate_up(x.float().contiguous(), token, counts, False)
    result = down(hidden, torch.arange(len(order)), counts, True)
    weights = routing.reshape(-1)[order].float()
    combine(width, on)(len(order), *(part.data_ptr() for part in (result, weights, token, out)))
    return out.to(x.dtype)


def _by_expert(expert_index: torch.Tensor, experts: int) -> tuple[torch.Tensor, list[int]]:
    """Assignments sorted by expert, int64, without those to no expert, and how many each has."""
    chosen = expert_index.reshape(-1)
    if chosen.numel() <= FEW_ASSIGNMENTS:
        listed = chosen.tolist()
        inside = [i for i, expert in enumerate(listed) if 0 <= expert < experts]
        counts = [0] * experts
        for i in inside:
            counts[listed[i]] += 1
        return torch.tensor(sorted(inside, key=listed.__getitem__), dtype=torch.int64), counts
    within = (chosen >= 0) & (chosen < experts)
    order = torch.where(within, chosen, experts).argsort(stable=True)
    counts = torch.bincount(chosen[within], minlength=experts).tolist()
    return order[: sum(counts)], counts


def multiply_packed(
    matrix: PackedMatrices, bfloat16: bool, on: Machine, x: torch.Tensor, rows: torch.Tensor,
    counts: list[int], swiglu: bool,
) -> torch.Tensor:  # fmt: skip
    """`Multiply` with native codes: rotate the rows, and multiply them with packed weights.

    bfloat16: round what is rotated to bfloat16 where there is a product for it.
    """
    code, tile, inputs = matrix.code, matrix.tile, matrix.inputs
    bfloat16 = bfloat16 and takes_bfloat16(code, tile, inputs, on)
    rotated = torch.empty(len(rows), inputs, dtype=torch.bfloat16 if bfloat16 else torch.float32)
    signs = matrix.signs.contiguous()
    rotate = rotation(RotationSpec(inputs, matrix.rotation_block, bfloat16, swiglu), on)
    rotate(len(rows), *(tensor.data_ptr() for tensor in (rows, x, signs, rotated)))
    out = torch.empty(len(rows), matrix.outputs)
    scale, packed = matrix.scale.contiguous(), matrix.packed.contiguous()
    tiles = matrix.outputs // tile
    for blocks in cut_into_blocks(counts, most_tokens(code, on), group_tokens(code, on)):
        spec = ProductSpec(code, tile, inputs, blocks.tokens, bfloat16, blocks.grouped)
        decoded = blocks.expert.numel() * matrix.outputs * inputs
        multiplied = int(blocks.rows.sum()) * matrix.outputs * inputs
        run_items(
            product(spec, on), tiles * blocks.expert.numel(), tiles, packed.data_ptr(),
            packed.stride(0) * packed.element_size(), blocks.expert.data_ptr(),
            blocks.first.data_ptr(), blocks.rows.data_ptr(), rotated.data_ptr(), scale.data_ptr(),
            out.data_ptr(),
            microseconds=decoded / DECODED_PER_MICROSECOND + multiplied / ADDED_PER_MICROSECOND,
        )  # fmt: skip
    return out
