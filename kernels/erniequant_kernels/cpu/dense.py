"""Multiply few tokens with a bfloat16 matrix, which is all that a new token does outside of the
experts.

The matrix is read straight through, row by row, which is what processors fetch ahead best: 19 GB/s
on one core of an AMD EPYC, where four rows at a time gave 15. Every token's inputs are multiplied
with the row in the registers.
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
"""Outputs that are written together."""

UNROLLED = 4
"""Vectors of a row that are multiplied in one turn, each with sums of its own, where K allows."""

ITEM_ROWS = 32
"""Rows of one item: 160 KB of the 21B's hidden size, 10 to 20 microseconds."""

BYTES_PER_MICROSECOND = 15_000
"""Bytes of a matrix that one core reads, roughly."""

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
        out.data_ptr(), microseconds=weight.nbytes / BYTES_PER_MICROSECOND,
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
    vectors = spec.inputs // (2 * lanes)
    unrolled = min(UNROLLED, vectors & -vectors)
    row_bytes = 2 * spec.inputs

    def one_row(row: ir.Value) -> list[ir.Value]:
        """Sums of each token."""
        base = code.address(weight, code.at.mul(row, integer(row_bytes)))

        def turn(offset: ir.Value, totals: Sequence[ir.Value]) -> list[ir.Value]:
            found = []
            for part in range(unrolled):
                place = code.at.add(offset, integer(4 * lanes * part))
                weights = code.load(words, code.address(base, place))
                for token in range(spec.tokens):
                    inputs = code.address(x, code.at.add(place, integer(token * row_bytes)))
                    total = totals[part * spec.tokens + token]
                    found.append(_added(code, machine, total, weights, code.load(words, inputs)))
            return found

        nothing = [splat(F32, lanes, 0.0)] * (unrolled * spec.tokens)
        step = 4 * lanes * unrolled
        totals = code.loop(integer(0), integer(row_bytes), step, nothing, turn)
        sums = list(totals[: spec.tokens])
        for part in range(1, unrolled):
            own = totals[part * spec.tokens : (part + 1) * spec.tokens]
            sums = [code.at.fadd(*pair) for pair in zip(sums, own, strict=True)]
        return [code.total(values) for values in sums]

    def some_rows(row: ir.Value, _: Sequence[ir.Value]) -> list[ir.Value]:
        nothing = ir.Constant(vector(F32, ROWS), ir.Undefined)
        found: list[ir.Value] = [nothing] * spec.tokens
        for r in range(ROWS):
            totals = one_row(code.at.add(row, integer(r)))
            index = ir.Constant(I32, r)
            found = [
                code.at.insert_element(*pair, index) for pair in zip(found, totals, strict=True)
            ]
        for token, values in enumerate(found):
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
