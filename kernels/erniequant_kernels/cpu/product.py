"""Multiply tokens with packed weights, decoding as it goes.

One item is one tile of outputs of one expert for a block of tokens. Each weight is decoded into the
lane that holds its group and multiplied there with the inputs of every token of the block; sums
stay in registers through all inputs, or through a block of them where tokens are many. Where there
are more tokens than a group, labels of a block of inputs go through the first cache, decoded once
for all groups. Every sum is made by one thread in one order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from llvmlite import ir

from erniequant.codes.reference import decode as reference_decode
from erniequant.codes.spec import ConvolutionalCode
from erniequant_kernels.cpu.arithmetic import Arithmetic, LabelProducts
from erniequant_kernels.cpu.compiler import compile_function
from erniequant_kernels.cpu.lanes import LanePlan, lane_plan
from erniequant_kernels.cpu.machine import Machine
from erniequant_kernels.cpu.vector_code import (
    F32,
    I8,
    I16,
    I64,
    POINTER,
    Code,
    by_lane_first,
    integer,
    splat,
    vector,
    widened,
)

INPUT_BLOCK = 64
"""Inputs that all sums of a block of tokens pass before the next ones: their words, 4 to 8 KB, stay
in the first cache."""

INPUTS_FROM = {"pair": 2, "half_sum": 8}
"""Tokens from which two inputs are put side by side, by label."""

MOST_GROUPS = 8

GROUP_TOKENS = {"pair": 8, "half_sum": 12}
"""Rows of a group, by label, best by measurement; fewer where their sums do not fit the
registers."""

DOT_LANES = (4, 8, 16)


@dataclass(frozen=True)
class ProductSpec:
    """One compiled product.

    Attributes:
        inputs: K.
        tokens: rows that are multiplied together.
        bfloat16: inputs are bfloat16, else float32; bfloat16 needs the machine's instruction.
        grouped: blocks have any number of rows from ``tokens`` to `MOST_GROUPS` times as many.
            Labels are decoded once for all of them.
    """

    code: ConvolutionalCode
    tile: int
    inputs: int
    tokens: int
    bfloat16: bool
    grouped: bool = False


def takes_bfloat16(code: ConvolutionalCode, tile: int, inputs: int, machine: Machine) -> bool:
    """Whether there is a product of bfloat16 inputs: the machine has the instruction, and vectors
    are as long as it wants them."""
    lanes = lane_plan(code, tile, inputs, machine.lanes).lanes
    return machine.bfloat16_dot and lanes in DOT_LANES


def most_tokens(code: ConvolutionalCode, machine: Machine) -> int:
    """Tokens that are multiplied together at most: their sums of one step fit the registers."""
    return machine.most_sums // code.weights_per_step


def group_tokens(code: ConvolutionalCode, machine: Machine) -> int:
    """Rows of a group of grouped blocks."""
    return min(GROUP_TOKENS[code.label.name], most_tokens(code, machine))


def product_reference(
    x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, code: ConvolutionalCode, tile: int
) -> torch.Tensor:
    """Products with one expert in plain torch, float32 ``[rows, N]``.

    Args:
        x: rotated inputs ``[rows, K]``.
        packed: int32 ``[N / tile, K * words]``; scale: int16 ``[N]``, bfloat16 bit patterns.
    """
    weights = reference_decode(packed, code, tile) * scale.view(torch.bfloat16).float()[:, None]
    return x.float() @ weights.T


@cache
def product(spec: ProductSpec, machine: Machine) -> Callable[..., None]:
    """The compiled product.

    Its arguments are integers: address of the counter of items (int64, 0 at first), number of
    items, tiles, address of ``packed`` ``[E, tiles, K * words]``, bytes of an expert, addresses of
    ``block_expert``, ``block_first`` and ``block_rows``, int32: the expert of each block, its first
    row and its number of rows (``spec.tokens`` unless grouped); of ``x`` ``[rows, K]``, of
    ``scale`` int16 ``[E, N]`` and of ``out`` float32 ``[rows, N]``. Item ``i`` is tile ``i %
    tiles`` of block ``i // tiles``.
    """
    return compile_function(product_module(spec, machine), "product", machine)


def product_module(spec: ProductSpec, machine: Machine) -> ir.Module:
    """The code of `product`."""
    return _Product(spec, machine).module()


def _arithmetic(spec: ProductSpec, plan: LanePlan) -> Arithmetic:
    if not spec.bfloat16:
        return Arithmetic.FLOAT
    beside = spec.inputs % (2 * plan.rows) == 0
    several = spec.grouped or spec.tokens >= INPUTS_FROM[spec.code.label.name]
    return Arithmetic.INPUTS if beside and several else Arithmetic.HALVES


class _Product:
    def __init__(self, spec: ProductSpec, machine: Machine):
        self.spec = spec
        self.plan = lane_plan(spec.code, spec.tile, spec.inputs, machine.lanes)
        self.per_step = spec.code.weights_per_step
        self.code = Code("product", [POINTER, I64, I64, POINTER, I64, *[POINTER] * 6])
        arithmetic = _arithmetic(spec, self.plan)
        self.products = LabelProducts(self.code, self.plan, arithmetic, spec.inputs, spec.tokens)
        self.step, self.input_bytes = self.products.step, self.products.input_bytes
        # Sums by vector and step, so many at a time that they fit the registers.
        self.pairs = [(v, s) for v in range(self.plan.vectors) for s in range(self.plan.steps)]
        at_once = max(machine.sums // (self.per_step * spec.tokens), 1)
        self.passes = [self.pairs[i : i + at_once] for i in range(0, len(self.pairs), at_once)]
        # Bytes of the sums of a token, ``[vectors, steps, weights of a step, lanes]`` float32.
        self.vector_bytes = 4 * self.plan.lanes
        self.token_bytes = self.vector_bytes * len(self.pairs) * self.per_step

    def module(self) -> ir.Module:
        counter, items, *_ = self.code.function.args
        groups = MOST_GROUPS if self.spec.grouped else 1
        self.sums = self.code.scratch(I8, groups * self.spec.tokens * self.token_bytes)
        if self.spec.grouped:
            self.labels = self.code.scratch(I8, INPUT_BLOCK // self.step * self.token_bytes)
        self.code.claim_items(counter, items, self._item)
        return self.code.module

    def _kind(self, element: ir.Type) -> ir.VectorType:
        return vector(element, self.plan.lanes)

    def _item(self, item: ir.Value) -> None:
        code, at, spec = self.code, self.code.at, self.spec
        _, _, tiles, packed, expert_bytes, *tables, x, scale, out = code.function.args
        block, tile = at.udiv(item, tiles), at.urem(item, tiles)
        expert, row, rows = (code.entry(table, block) for table in tables)
        self.rows = rows if spec.grouped else integer(spec.tokens)
        row_bytes = 4 * self.plan.words
        words = at.add(at.mul(expert, expert_bytes), at.mul(tile, integer(spec.inputs * row_bytes)))
        self.words = code.address(packed, words)
        self.x = code.address(x, at.mul(row, integer(spec.inputs * self.input_bytes)))
        outputs = at.mul(tiles, integer(spec.tile))
        first = at.mul(tile, integer(spec.tile))
        scale = code.address(scale, at.mul(at.add(at.mul(expert, outputs), first), integer(2)))
        out = code.address(out, at.mul(at.add(at.mul(row, outputs), first), integer(4)))
        self._multiply()

        def group(number: ir.Value, _: Sequence[ir.Value]) -> Sequence[ir.Value]:
            sums, first_row = self._group_sums(number), self._group_row(number)

            def store(token: ir.Value, _: Sequence[ir.Value]) -> Sequence[ir.Value]:
                own = code.address(sums, code.at.mul(token, integer(self.token_bytes)))
                place = code.at.mul(code.at.add(first_row, token), outputs)
                place = code.address(out, code.at.mul(place, integer(4)))
                self._store_token(own, scale, place)
                return []

            code.loop(integer(0), integer(spec.tokens), 1, [], store)
            return []

        code.loop(integer(0), self._groups(), 1, [], group)

    def _groups(self) -> ir.Value:
        """Groups of the block."""
        at, tokens = self.code.at, self.spec.tokens
        return at.udiv(at.add(self.rows, integer(tokens - 1)), integer(tokens))

    def _group_sums(self, number: ir.Value) -> ir.Value:
        group_bytes = integer(self.spec.tokens * self.token_bytes)
        return self.code.address(self.sums, self.code.at.mul(number, group_bytes))

    def _group_row(self, number: ir.Value) -> ir.Value:
        """First row of a group. The last group is as large as the others, and does some rows of
        the one before once more, to the same bits."""
        at, tokens = self.code.at, integer(self.spec.tokens)
        row, last = at.mul(number, tokens), at.sub(self.rows, tokens)
        return at.select(at.icmp_unsigned("<", row, last), row, last)

    def _multiply(self) -> None:
        """All sums of the item, to scratch."""
        code, zero = self.code, splat(F32, self.plan.lanes, 0.0)
        inputs = integer(self.spec.inputs)
        if len(self.passes) == 1 and not self.spec.grouped:
            places = self._places(self.passes[0])
            turn = partial(self._turn, self.passes[0])
            sums = code.loop(integer(0), inputs, self.step, [zero] * len(places), turn)
            for value, place in zip(sums, places, strict=True):
                code.store(value, place)
            return
        group_bytes = integer(self.spec.tokens * self.token_bytes)
        code.clear(self.sums, code.at.mul(self._groups(), group_bytes), self._kind(F32))

        def block(first: ir.Value, _: Sequence[ir.Value]) -> Sequence[ir.Value]:
            end = code.at.add(first, integer(INPUT_BLOCK))
            end = code.at.select(code.at.icmp_unsigned("<", end, inputs), end, inputs)
            if self.spec.grouped:
                self._decode_and_multiply(first, end)
                return []
            for pairs in self.passes:
                self._add_to(self._places(pairs), first, end, partial(self._turn, pairs))
            return []

        code.loop(integer(0), inputs, INPUT_BLOCK, [], block)

    def _places(self, pairs: Sequence[tuple[int, int]]) -> list[ir.Value]:
        """Addresses of the sums of some vectors and steps, weights of a step and tokens."""
        found = []
        for v, s in pairs:
            for w in range(self.per_step):
                vector_number = (v * self.plan.steps + s) * self.per_step + w
                for token in range(self.spec.tokens):
                    offset = token * self.token_bytes + vector_number * self.vector_bytes
                    found.append(self.code.address(self.sums, offset))
        return found

    def _add_to(
        self, places: list[ir.Value], first: ir.Value, end: ir.Value,
        turn: Callable[[ir.Value, Sequence[ir.Value]], Sequence[ir.Value]],
    ) -> None:  # fmt: skip
        """Add inputs from ``first`` to ``end`` to sums in memory."""
        sums = [self.code.load(self._kind(F32), place) for place in places]
        sums = list(self.code.loop(first, end, self.step, sums, turn))
        for value, place in zip(sums, places, strict=True):
            self.code.store(value, place)

    def _turn(
        self, pairs: Sequence[tuple[int, int]], k: ir.Value, sums: Sequence[ir.Value]
    ) -> list[ir.Value]:
        """Add the next inputs to the sums of some vectors and steps."""
        x = self.code.address(self.x, self.code.at.mul(k, integer(self.input_bytes)))
        return self.products.added(self.products.factors(self.words, pairs, k), x, sums)

    def _decode_and_multiply(self, first: ir.Value, end: ir.Value) -> None:
        """Decode a block of inputs to scratch, once for all rows, then multiply group by group."""
        code, spec = self.code, self.spec
        pair_bytes = self.vector_bytes * self.per_step
        weights = range(self.per_step)

        def labels_of(k: ir.Value) -> ir.Value:
            offset = code.at.mul(code.at.sub(k, first), integer(self.token_bytes // self.step))
            return code.address(self.labels, offset)

        def decode(k: ir.Value, _: Sequence[ir.Value]) -> Sequence[ir.Value]:
            place = labels_of(k)
            for i, factors in enumerate(self.products.factors(self.words, self.pairs, k)):
                for w, factor in enumerate(factors):
                    code.store(factor, code.address(place, i * pair_bytes + w * self.vector_bytes))
            return []

        code.loop(first, end, self.step, [], decode)

        def group(number: ir.Value, _: Sequence[ir.Value]) -> Sequence[ir.Value]:
            sums = self._group_sums(number)
            x = code.at.mul(self._group_row(number), integer(spec.inputs * self.input_bytes))
            x = code.address(self.x, x)

            def pair(offset: ir.Value, _: Sequence[ir.Value]) -> Sequence[ir.Value]:
                def turn(k: ir.Value, totals: Sequence[ir.Value]) -> Sequence[ir.Value]:
                    source = code.address(labels_of(k), offset)
                    places = (code.address(source, w * self.vector_bytes) for w in weights)
                    factors = [code.load(self.products.factors_kind, place) for place in places]
                    inputs = code.address(x, code.at.mul(k, integer(self.input_bytes)))
                    return self.products.added([factors], inputs, totals)

                own = code.address(sums, offset)
                places = [
                    code.address(own, token * self.token_bytes + w * self.vector_bytes)
                    for w in weights for token in range(spec.tokens)
                ]  # fmt: skip
                self._add_to(places, first, end, turn)
                return []

            code.loop(integer(0), integer(self.token_bytes), pair_bytes, [], pair)
            return []

        code.loop(integer(0), self._groups(), 1, [], group)

    def _store_token(self, sums: ir.Value, scale: ir.Value, out: ir.Value) -> None:
        """Sums of a token in the order of outputs, times their scales."""
        code, plan = self.code, self.plan
        groups = min(plan.groups, plan.lanes)
        weights = plan.group_weights
        for v in range(plan.vectors):
            offsets = (4 * plan.lanes * (v * weights + i) for i in range(weights))
            by_weight = [code.load(self._kind(F32), code.address(sums, o)) for o in offsets]
            for i, values in enumerate(
                by_lane_first(code, [self._over_rows(s) for s in by_weight])
            ):
                first = v * plan.lanes * plan.group_weights + i * groups
                pattern = code.load(vector(I16, groups), code.address(scale, 2 * first))
                scaled = code.at.fmul(values, widened(code, pattern))
                code.store(scaled, code.address(out, 4 * first))

    def _over_rows(self, sums: ir.Value) -> ir.Value:
        """The sum over the rows of a pass: one lane for each group."""
        count = sums.type.count
        while count > self.plan.groups:
            count //= 2
            halves = (range(count), range(count, 2 * count))
            sums = self.code.at.fadd(*(self.code.shuffle(sums, half) for half in halves))
        return sums
