"""Multiply few tokens with a bfloat16 matrix, which is all that a new token does outside of the
experts.

A row of the matrix is read once, straight through, and multiplied in the registers with the inputs
of every token; four rows at a time, so that inputs are loaded once for four.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from llvmlite import ir
from torch.nn import functional

from erniequant_kernels.cpu.compiler import compile_function
from erniequant_kernels.cpu.labels import float_halves
from erniequant_kernels.cpu.machine import Machine, machine
from erniequant_kernels.cpu.threads import run_items
from erniequant_kernels.cpu.vector_code import (
    F32,
    I32,
    I64,
    POINTER,
    Code,
    bfloat16_pairs_added,
    integer,
    rounded_to_bfloat16,
    splat,
    vector,
)

ROWS = 4
"""Rows of the matrix that are multiplied together."""

ITEM_ROWS = 32
"""Rows of one item: 160 KB of the 21B's hidden size, 10 to 20 microseconds."""

MOST_TOKENS = 4
"""More are left to torch, which blocks its products for the caches."""


@dataclass(frozen=True)
class DenseSpec:
    """One compiled product: K inputs and a number of tokens."""

    inputs: int
    tokens: int


def takes_linear(x: torch.Tensor, weight: torch.Tensor, on: Machine | None = None) -> bool:
    """Whether `linear` multiplies these: few tokens, bfloat16, whole vectors and rows."""
    outputs, inputs = weight.shape
    pairs = 2 * (on or machine()).lanes
    return (
        x.dtype == weight.dtype == torch.bfloat16
        and x.device.type == weight.device.type == "cpu"
        and 0 < x.numel() <= MOST_TOKENS * inputs
        and inputs % pairs == 0
        and outputs % ROWS == 0
        and weight.is_contiguous()
    )


def linear_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`linear` in plain torch: float32 sums, rounded once."""
    return functional.linear(x.float(), weight.float()).bfloat16()


def linear(x: torch.Tensor, weight: torch.Tensor, on: Machine | None = None) -> torch.Tensor:
    """``x @ weight.T``.

    Args:
        x: bfloat16 ``[..., K]``, of at most `MOST_TOKENS` tokens.
        weight: bfloat16 ``[N, K]``; see `takes_linear`.
        on: the machine to make code for; this one unless given.

    Returns:
        bfloat16 ``[..., N]``, of float32 sums; the same bits for any number of threads.
    """
    outputs, inputs = weight.shape
    rows = x.reshape(-1, inputs).contiguous()
    out = torch.empty(*x.shape[:-1], outputs, dtype=torch.bfloat16)
    function = dense_product(DenseSpec(inputs, len(rows)), on or machine())
    run_items(
        function, -(-outputs // ITEM_ROWS), outputs, rows.data_ptr(), weight.data_ptr(),
        out.data_ptr(),
    )  # fmt: skip
    return out


@cache
def dense_product(spec: DenseSpec, machine: Machine) -> Callable[..., None]:
    """The compiled product.

    Its arguments are integers: address of the counter of items (int64, 0 at first), number of
    items, N; addresses of ``x`` bfloat16 ``[tokens, K]``, of the matrix ``[N, K]`` and of ``out``
    ``[tokens, N]``. Item ``i`` are `ITEM_ROWS` rows of the matrix from ``i * ITEM_ROWS`` on.
    """
    return compile_function(dense_module(spec, machine), "dense", machine)


def dense_module(spec: DenseSpec, machine: Machine) -> ir.Module:
    """The code of `dense_product`."""
    code = Code("dense", [POINTER, I64, I64, *[POINTER] * 3])
    counter, items, outputs, x, weight, out = code.function.args
    lanes = machine.lanes
    words = vector(I32, lanes)
    row_bytes = 2 * spec.inputs

    def some_rows(row: ir.Value, _: Sequence[ir.Value]) -> list[ir.Value]:
        base = code.address(weight, code.at.mul(row, integer(row_bytes)))

        def turn(offset: ir.Value, totals: Sequence[ir.Value]) -> list[ir.Value]:
            place, inputs = code.address(base, offset), code.address(x, offset)
            weights = [code.load(words, code.address(place, r * row_bytes)) for r in range(ROWS)]
            tokens = [code.load(words, code.address(inputs, t * row_bytes))
                      for t in range(spec.tokens)]  # fmt: skip
            pairs = [(w, t) for w in weights for t in tokens]
            return [
                _added(code, machine, total, *pair)
                for total, pair in zip(totals, pairs, strict=True)
            ]

        nothing = [splat(F32, lanes, 0.0)] * (ROWS * spec.tokens)
        totals = code.loop(integer(0), integer(row_bytes), 4 * lanes, nothing, turn)
        for token in range(spec.tokens):
            values: ir.Value = ir.Constant(vector(F32, ROWS), ir.Undefined)
            for r in range(ROWS):
                total = code.total(totals[r * spec.tokens + token])
                values = code.at.insert_element(values, total, ir.Constant(I32, r))
            target = code.at.add(code.at.mul(outputs, integer(token)), row)
            target = code.address(out, code.at.mul(target, integer(2)))
            code.store(rounded_to_bfloat16(code, values), target)
        return []

    def item(number: ir.Value) -> None:
        first = code.at.mul(number, integer(ITEM_ROWS))
        end = code.at.add(first, integer(ITEM_ROWS))
        end = code.at.select(code.at.icmp_unsigned("<", end, outputs), end, outputs)
        code.loop(first, end, ROWS, [], some_rows)

    code.claim_items(counter, items, item)
    return code.module


def _added(
    code: Code, machine: Machine, total: ir.Value, weights: ir.Value, inputs: ir.Value
) -> ir.Value:
    """The sum with pairs of bfloat16 products added."""
    if machine.bfloat16_dot:
        return bfloat16_pairs_added(code, total, weights, inputs)
    one, other = (float_halves(code, pair) for pair in (weights, inputs))
    return code.fused(one[1], other[1], code.fused(one[0], other[0], total))
