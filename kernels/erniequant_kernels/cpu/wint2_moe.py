"""The experts of a layer in Baidu's WINT2 format, on the CPU, on packed weights."""

from functools import partial

import torch
from torch.nn import functional

from erniequant.codes.ccq.order import stored_rows
from erniequant_kernels.cpu.machine import Machine, machine
from erniequant_kernels.cpu.moe import Multiply, cut_into_blocks, run_experts
from erniequant_kernels.cpu.threads import run_items
from erniequant_kernels.cpu.wint2 import (
    Wint2Spec,
    cut_outputs,
    most_wint2_tokens,
    wint2_product,
)
from erniequant_kernels.matrices import Wint2Matrices


def moe_experts_wint2_cpu(
    x: torch.Tensor, expert_index: torch.Tensor, routing: torch.Tensor, gate_up: Wint2Matrices,
    down: Wint2Matrices, *, on: Machine | None = None,
) -> torch.Tensor:  # fmt: skip
    """`run_experts` with WINT2, in float32.

    on: the machine to make code for; this one unless given.
    """
    chosen = on or machine()

    def multiply(matrix: Wint2Matrices) -> Multiply:
        return partial(_multiply, matrix, chosen)

    return run_experts(
        x, expert_index, routing, gate_up.experts, multiply(gate_up), multiply(down), chosen
    )


def _multiply(
    matrix: Wint2Matrices, on: Machine, x: torch.Tensor, rows: torch.Tensor, counts: list[int],
    swiglu: bool,
) -> torch.Tensor:  # fmt: skip
    stored = x[rows]
    if swiglu:
        gate, up = stored.chunk(2, dim=-1)
        stored = functional.silu(gate) * up
    if matrix.k_order != "plain":
        stored = stored[:, stored_rows(matrix.inputs, matrix.k_order)]
    stored = stored.contiguous()
    parts = [part.contiguous() for part in matrix.parts]
    out = torch.empty(len(rows), matrix.outputs)
    for blocks in cut_into_blocks(counts, most_wint2_tokens(on)):
        cut = cut_outputs(matrix.outputs, blocks.tokens, on)
        function = wint2_product(Wint2Spec(matrix.inputs, matrix.outputs, blocks.tokens), on)
        run_items(
            function, blocks.expert.numel() * (matrix.outputs // cut.item),
            blocks.expert.data_ptr(), blocks.first.data_ptr(), stored.data_ptr(),
            *(part.data_ptr() for part in parts), out.data_ptr(),
            microseconds=int(blocks.rows.sum()) * matrix.outputs * matrix.inputs / 20_000,
        )  # fmt: skip
    return out
