"""Add weighted rows to the tokens that they belong to."""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from llvmlite import ir

from erniequant_kernels.cpu.compiler import compile_function
from erniequant_kernels.cpu.machine import Machine
from erniequant_kernels.cpu.vector_code import F32, I64, POINTER, Code, integer, vector


def combine_reference(
    rows: torch.Tensor, weights: torch.Tensor, token: torch.Tensor, tokens: int
) -> torch.Tensor:
    """`combine` in plain torch: float32 ``[rows, width]`` to ``[tokens, width]``."""
    out = torch.zeros(tokens, rows.shape[1])
    return out.index_add_(0, token, rows * weights[:, None])


@cache
def combine(width: int, machine: Machine) -> Callable[..., None]:
    """The compiled sum: one thread adds the rows in their order.

    Its arguments are integers: number of rows; addresses of ``rows`` float32 ``[n, width]``, of
    ``weights`` float32 ``[n]``, of ``token`` int64 ``[n]`` and of ``out`` float32 ``[any, width]``,
    which is added to.
    """
    return compile_function(combine_module(width, machine), "combine", machine)


def combine_module(width: int, machine: Machine) -> ir.Module:
    """The code of `combine`."""
    code = Code("combine", [I64, *[POINTER] * 4])
    count, rows, weights, tokens, out = code.function.args
    lanes = min(machine.lanes, width & -width)
    kind = vector(F32, lanes)

    def one_row(row: ir.Value, _: Sequence[ir.Value]) -> list[ir.Value]:
        at = code.at
        token = code.load(I64, code.address(tokens, at.mul(row, integer(8))))
        weight = code.load(F32, code.address(weights, at.mul(row, integer(4))))
        factor = code.repeat(weight, lanes)
        source = code.address(rows, at.mul(row, integer(4 * width)))
        target = code.address(out, at.mul(token, integer(4 * width)))

        def some(offset: ir.Value, _: Sequence[ir.Value]) -> list[ir.Value]:
            place = code.address(target, offset)
            values = code.load(kind, code.address(source, offset))
            code.store(code.fused(values, factor, code.load(kind, place)), place)
            return []

        code.loop(integer(0), integer(4 * width), 4 * lanes, [], some)
        return []

    code.loop(integer(0), count, 1, [], one_row)
    code.at.ret_void()
    return code.module
