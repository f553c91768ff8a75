"""Multiply tokens with experts in Baidu's WINT2 format, decoding as it goes. docs/ccq.md describes
the format.

Lanes are outputs, which lie side by side. A byte and the map of its output make a word of four
labels; labels of a group of 64 inputs are multiplied as they are, from 0 to 63, and group by group
the sum of the inputs is taken off 32 times and the local scale is applied. float32 throughout.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from llvmlite import ir

from erniequant.codes.ccq.decode import BYTE_WEIGHTS, GROUP, decode_wint2
from erniequant_kernels.cpu.compiler import compile_function
from erniequant_kernels.cpu.machine import Machine
from erniequant_kernels.cpu.vector_code import (
    F32,
    I8,
    I16,
    I32,
    I64,
    POINTER,
    Code,
    integer,
    splat,
    vector,
    widened,
)

GROUP_BYTES = GROUP // BYTE_WEIGHTS
LABEL_SHIFTS = (9, 6, 3, 0)
LABEL_ZERO = 32.0

ITEM_OUTPUTS = 512


@dataclass(frozen=True)
class Wint2Spec:
    """One compiled product: K inputs, N outputs, tokens of a block."""

    inputs: int
    outputs: int
    tokens: int


@dataclass(frozen=True)
class Wint2Cut:
    """How N outputs are cut up.

    Attributes:
        lanes: outputs of a vector.
        vectors: of one *line*, whose sums of a group are in registers: four, a cache line of bytes,
            where N and the number of tokens allow.
        lines: of one item. Neighbours are read together: rows of bytes lie N apart, and single
            lines of so many pages would be fetched one by one.
    """

    lanes: int
    vectors: int
    lines: int

    @property
    def line(self) -> int:
        """Outputs of a line."""
        return self.lanes * self.vectors

    @property
    def item(self) -> int:
        """Outputs of an item."""
        return self.line * self.lines


def cut_outputs(outputs: int, tokens: int, machine: Machine) -> Wint2Cut:
    """Items of about 512 outputs, for blocks of ``tokens``."""

    def divisor(count: int, most: int) -> int:
        return next(d for d in range(most, 0, -1) if count % d == 0)

    lanes = min(machine.lanes, outputs & -outputs)
    vectors = divisor(outputs // lanes, 4 if 4 * tokens <= machine.sums else 2)
    line = lanes * vectors
    return Wint2Cut(lanes, vectors, divisor(outputs // line, max(ITEM_OUTPUTS // line, 1)))


def most_wint2_tokens(machine: Machine) -> int:
    """Tokens of the largest block: two vectors of sums each."""
    return machine.most_sums // 2


def wint2_reference(
    x: torch.Tensor, parts: Sequence[torch.Tensor], *, k_order: str
) -> torch.Tensor:
    """Products with one expert in plain torch, float32 ``[rows, N]``; ``parts`` as `decode_wint2`
    takes them."""
    return x.float() @ decode_wint2(*parts, k_order=k_order)


@cache
def wint2_product(spec: Wint2Spec, machine: Machine) -> Callable[..., None]:
    """The compiled product.

    Its arguments are integers: address of the counter of items (int64, 0 at first), number of
    items; addresses of ``block_expert`` and ``block_row``, both int32: each block of
    ``spec.tokens`` rows has an expert and a first row; of ``x`` float32 ``[rows, K]`` in the stored
    order of inputs; of the parts of all experts in the order of `decode_wint2`; and of ``out``
    float32 ``[rows, N]``.
    """
    return compile_function(_Wint2Product(spec, machine).module(), "wint2", machine)


class _Wint2Product:
    def __init__(self, spec: Wint2Spec, machine: Machine):
        self.spec = spec
        self.cut = cut_outputs(spec.outputs, spec.tokens, machine)
        self.lanes = self.cut.lanes
        self.code = Code("wint2", [POINTER, I64, *[POINTER] * 9])

    def module(self) -> ir.Module:
        counter, items, *_ = self.code.function.args
        # float32 [tokens, outputs of an item]
        self.sums = self.code.scratch(I8, 4 * self.spec.tokens * self.cut.item)
        self.code.claim_items(counter, items, self._item)
        return self.code.module

    def _kind(self, element: ir.Type) -> ir.VectorType:
        return vector(element, self.lanes)

    def _places(self) -> list[tuple[int, int]]:
        return [(v, token) for v in range(self.cut.vectors) for token in range(self.spec.tokens)]

    def _item(self, item: ir.Value) -> None:
        code, at, spec, cut = self.code, self.code.at, self.spec, self.cut
        _, _, block_expert, block_row, x, bytes_, scales, supers, maps, zeros, out = (
            code.function.args
        )
        parts = integer(spec.outputs // cut.item)
        block, first = at.udiv(item, parts), at.mul(at.urem(item, parts), integer(cut.item))

        expert, row = code.entry(block_expert, block), code.entry(block_row, block)

        def of_expert(base: ir.Value, rows: int, size: int) -> ir.Value:
            place = code.at.mul(expert, integer(rows * spec.outputs))
            return code.address(base, code.at.mul(code.at.add(place, first), integer(size)))

        self.bytes = of_expert(bytes_, spec.inputs // BYTE_WEIGHTS, 1)
        self.scales = of_expert(scales, spec.inputs // (2 * GROUP), 1)
        self.maps, self.zeros = of_expert(maps, 1, 4), of_expert(zeros, 1, 4)
        self.x = code.address(x, at.mul(row, integer(4 * spec.inputs)))

        code.clear(self.sums, integer(4 * spec.tokens * cut.item), self._kind(F32))
        code.loop(integer(0), integer(spec.inputs // GROUP), 1, [], self._group)
        supers = of_expert(supers, 1, 2)
        out = code.address(out, code.at.mul(first, integer(4)))
        for token in range(spec.tokens):
            place = code.at.mul(code.at.add(row, integer(token)), integer(4 * spec.outputs))
            self._store_token(token, supers, code.address(out, place))

    def _store_token(self, token: int, supers: ir.Value, out: ir.Value) -> None:
        code, lanes = self.code, self.lanes

        def store(i: ir.Value, _: Sequence[ir.Value]) -> Sequence[ir.Value]:
            pattern = code.load(self._kind(I16), code.address(supers, code.at.mul(i, integer(2))))
            place = code.at.mul(i, integer(4))
            sums = code.address(self.sums, 4 * token * self.cut.item)
            total = code.load(self._kind(F32), code.address(sums, place))
            total = code.at.fmul(total, widened(code, pattern))
            code.store(total, code.address(out, place))
            return []

        code.loop(integer(0), integer(self.cut.item), lanes, [], store)

    def _group(self, group: ir.Value, _: Sequence[ir.Value]) -> Sequence[ir.Value]:
        """Add 64 inputs to all sums."""
        code, at, spec = self.code, self.code.at, self.spec
        x = code.address(self.x, at.mul(group, integer(4 * GROUP)))
        inputs = [
            code.total(code.load(vector(F32, GROUP), code.address(x, 4 * token * spec.inputs)))
            for token in range(spec.tokens)
        ]
        rows = code.address(self.bytes, at.mul(group, integer(GROUP_BYTES * spec.outputs)))
        scales = at.mul(at.udiv(group, integer(2)), integer(spec.outputs))
        scales = code.address(self.scales, scales)
        # The high nibble belongs to the even group.
        odd = at.urem(group, integer(2))
        shift = at.trunc(at.sub(integer(4), at.mul(odd, integer(4))), I32)

        def line(first: ir.Value, _: Sequence[ir.Value]) -> Sequence[ir.Value]:
            totals = self._line(code.address(rows, first), x, first)
            for i, (v, token) in enumerate(self._places()):
                place = code.at.add(first, integer(v * self.lanes))
                nibble = code.load(self._kind(I8), code.address(scales, place))
                nibble = code.at.zext(nibble, self._kind(I32))
                nibble = code.at.lshr(nibble, code.repeat(shift, self.lanes))
                nibble = code.at.and_(nibble, splat(I32, self.lanes, 15))
                scale = code.at.sitofp(nibble, self._kind(F32))
                taken_off = splat(F32, self.lanes, -LABEL_ZERO)
                labels = code.fused(code.repeat(inputs[token], self.lanes), taken_off, totals[i])
                sums = code.address(self.sums, 4 * token * self.cut.item)
                sums = code.address(sums, code.at.mul(place, integer(4)))
                code.store(code.fused(labels, scale, code.load(self._kind(F32), sums)), sums)
            return []

        code.loop(integer(0), integer(self.cut.item), self.cut.line, [], line)
        return []

    def _line(self, rows: ir.Value, x: ir.Value, first: ir.Value) -> Sequence[ir.Value]:
        """Labels times inputs of a group, for the outputs of a line."""
        code = self.code
        maps = code.address(self.maps, code.at.mul(first, integer(4)))
        zeros = code.address(self.zeros, code.at.mul(first, integer(4)))

        def vectors(base: ir.Value) -> list[ir.Value]:
            places = (4 * v * self.lanes for v in range(self.cut.vectors))
            return [code.load(self._kind(F32), code.address(base, place)) for place in places]

        turn = partial(self._four_inputs, rows, x, vectors(maps), vectors(zeros))
        nothing = [splat(F32, self.lanes, 0.0)] * len(self._places())
        return code.loop(integer(0), integer(GROUP_BYTES), 1, nothing, turn)

    def _four_inputs(
        self, rows: ir.Value, x: ir.Value, maps: list[ir.Value], zeros: list[ir.Value],
        row: ir.Value, totals: Sequence[ir.Value],
    ) -> Sequence[ir.Value]:  # fmt: skip
        """Add the inputs of one row of bytes to the totals of its group."""
        code, at, lanes = self.code, self.code.at, self.lanes
        rows = code.address(rows, at.mul(row, integer(self.spec.outputs)))
        x = code.address(x, at.mul(row, integer(4 * BYTE_WEIGHTS)))
        updated = list(totals)
        for v, (scale, zero) in enumerate(zip(maps, zeros, strict=True)):
            byte = code.load(self._kind(I8), code.address(rows, v * lanes))
            byte = at.sitofp(at.zext(byte, self._kind(I32)), self._kind(F32))
            # Two roundings, as the reference has them.
            value = at.fadd(at.fmul(byte, scale), zero)
            word = self._saturated(at.fadd(value, splat(F32, lanes, 0.5)))
            for j, shift in enumerate(LABEL_SHIFTS):
                bits = at.lshr(word, splat(I32, lanes, shift)) if shift else word
                label = at.sitofp(at.and_(bits, splat(I32, lanes, 63)), self._kind(F32))
                for token in range(self.spec.tokens):
                    own = code.address(x, 4 * (token * self.spec.inputs + j))
                    factor = code.repeat(code.load(F32, own), lanes)
                    i = v * self.spec.tokens + token
                    updated[i] = code.fused(label, factor, updated[i])
        return updated

    def _saturated(self, value: ir.Value) -> ir.Value:
        """The largest integers that are not above float32 values; int32 where it ends.

        LLVM's own saturating conversion goes lane by lane.
        """
        code, at, kind = self.code, self.code.at, value.type
        floor = code.intrinsic(f"llvm.floor.v{self.lanes}f32", kind, [value])
        least, most = (splat(F32, self.lanes, limit) for limit in (-(2.0**31), 2.0**31 - 128))
        inside = at.select(at.fcmp_ordered("<", floor, least), least, floor)
        above = at.fcmp_ordered(">", inside, most)
        word = at.fptosi(at.select(above, most, inside), self._kind(I32))
        return at.select(above, splat(I32, self.lanes, 2**31 - 1), word)
