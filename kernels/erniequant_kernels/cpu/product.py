"""Multiply tokens with packed weights, decoding as it goes.

One item is one tile of outputs of one expert for a block of tokens. Each weight is decoded into the
lane that holds its group and multiplied there with the inputs of every token of the block; sums
stay in registers through all inputs, or through a block of them where tokens are many. Every sum is
made by one thread in one order.

Three ways to multiply (`Arithmetic`):

* ``FLOAT``: float32 labels, fused multiply-add. Any processor, any precision.
* ``HALVES``: both halves of a product are operands as they lie there, of the instruction that adds
  two bfloat16 products: with an input twice it sums them, with the input and zero it takes one.
* ``INPUTS``: the same instruction on labels of two inputs side by side. Half the multiplications,
  some work to put labels together: for several tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache, partial

import torch
from llvmlite import ir

from erniequant.codes.reference import decode as reference_decode
from erniequant.codes.spec import ConvolutionalCode
from erniequant_kernels.cpu import labels
from erniequant_kernels.cpu.compiler import compile_function
from erniequant_kernels.cpu.lanes import lane_plan
from erniequant_kernels.cpu.machine import Machine
from erniequant_kernels.cpu.vector_code import (
    F32,
    I8,
    I16,
    I32,
    I64,
    POINTER,
    Code,
    bfloat16_pairs_added,
    by_lane_first,
    integer,
    splat,
    vector,
)

INPUT_BLOCK = 64
"""Inputs that all sums of a block of tokens pass before the next ones: their words, 4 to 8 KB, stay
in the first cache."""

INPUTS_FROM = {"pair": 2, "half_sum": 8}
"""Tokens from which two inputs are put side by side, by label."""

DOT_LANES = (4, 8, 16)


class Arithmetic(Enum):
    """How labels and inputs are multiplied."""

    FLOAT = "float"
    HALVES = "halves"
    INPUTS = "inputs"


@dataclass(frozen=True)
class ProductSpec:
    """One compiled product.

    Attributes:
        inputs: K.
        tokens: of a block.
        bfloat16: inputs are bfloat16, else float32; bfloat16 needs the machine's instruction.
    """

    code: ConvolutionalCode
    tile: int
    inputs: int
    tokens: int
    bfloat16: bool


def takes_bfloat16(code: ConvolutionalCode, tile: int, inputs: int, machine: Machine) -> bool:
    """Whether there is a product of bfloat16 inputs: the machine has the instruction, and vectors
    are as long as it wants them."""
    lanes = lane_plan(code, tile, inputs, machine.lanes).lanes
    return machine.bfloat16_dot and lanes in DOT_LANES


def most_tokens(code: ConvolutionalCode, machine: Machine) -> int:
    """Tokens of the largest block: their sums of one step fit the registers."""
    return machine.most_sums // code.weights_per_step


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
    items, tiles, address of ``packed`` ``[E, tiles, K * words]``, bytes of an expert, address of
    ``block_expert`` and of ``block_row``, both int32: each block of ``spec.tokens`` rows has an
    expert and a first row; addresses of ``x`` ``[rows, K]``, of ``scale`` int16 ``[E, N]`` and of
    ``out`` float32 ``[rows, N]``. Item ``i`` is tile ``i % tiles`` of block ``i // tiles``.
    """
    return compile_function(product_module(spec, machine), "product", machine)


def product_module(spec: ProductSpec, machine: Machine) -> ir.Module:
    """The code of `product`."""
    return _Product(spec, machine).module()


class _Product:
    def __init__(self, spec: ProductSpec, machine: Machine):
        self.spec, self.machine = spec, machine
        self.plan = lane_plan(spec.code, spec.tile, spec.inputs, machine.lanes)
        self.per_step = spec.code.weights_per_step
        self.arithmetic = Arithmetic.FLOAT
        if spec.bfloat16:
            beside = spec.inputs % (2 * self.plan.rows) == 0
            beside = beside and spec.tokens >= INPUTS_FROM[spec.code.label.name]
            self.arithmetic = Arithmetic.INPUTS if beside else Arithmetic.HALVES
        self.input_bytes = 2 if spec.bfloat16 else 4
        # Sums by vector and step, so many at a time that they fit the registers.
        pairs = [(v, s) for v in range(self.plan.vectors) for s in range(self.plan.steps)]
        at_once = max(machine.sums // (self.per_step * spec.tokens), 1)
        self.passes = [pairs[i : i + at_once] for i in range(0, len(pairs), at_once)]
        self.code = Code("product", [POINTER, I64, I64, POINTER, I64, *[POINTER] * 5])

    def module(self) -> ir.Module:
        counter, items, self.tiles, *_ = self.code.function.args
        self.sums = self.code.scratch(I8, self._sum_bytes)
        self.code.claim_items(counter, items, self._item)
        return self.code.module

    def _kind(self, element: ir.Type) -> ir.VectorType:
        return vector(element, self.plan.lanes)

    @property
    def _sum_bytes(self) -> int:
        """Bytes of the sums of all tokens, ``[tokens, vectors, steps, weights of a step, lanes]``
        float32."""
        return 4 * self.spec.tokens * self.plan.vectors * self.plan.lanes * self.plan.group_weights

    def _sum_address(self, token: int, v: int, step: int, weight: int) -> ir.Value:
        steps = (token * self.plan.vectors + v) * self.plan.steps + step
        place = steps * self.per_step + weight
        return self.code.address(self.sums, 4 * self.plan.lanes * place)

    def _item(self, item: ir.Value) -> None:
        code, at, spec = self.code, self.code.at, self.spec
        _, _, tiles, packed, expert_bytes, block_expert, block_row, x, scale, out = (
            code.function.args
        )
        block, tile = at.udiv(item, tiles), at.urem(item, tiles)

        def of_block(table: ir.Value) -> ir.Value:
            return at.zext(code.load(I32, code.address(table, at.mul(block, integer(4)))), I64)

        expert, row = of_block(block_expert), of_block(block_row)
        row_bytes = 4 * self.plan.words
        words = at.add(at.mul(expert, expert_bytes), at.mul(tile, integer(spec.inputs * row_bytes)))
        self.words = code.address(packed, words)
        self.x = code.address(x, at.mul(row, integer(spec.inputs * self.input_bytes)))
        self._multiply()
        at = code.at
        outputs = at.mul(tiles, integer(spec.tile))
        first = at.mul(tile, integer(spec.tile))
        scale = code.address(scale, at.mul(at.add(at.mul(expert, outputs), first), integer(2)))

        def store(token: ir.Value, _: Sequence[ir.Value]) -> Sequence[ir.Value]:
            place = code.at.mul(code.at.add(row, token), outputs)
            place = code.address(out, code.at.mul(code.at.add(place, first), integer(4)))
            sums = code.at.mul(token, integer(self._sum_bytes // spec.tokens))
            self._store_token(code.address(self.sums, sums), scale, place)
            return []

        code.loop(integer(0), integer(spec.tokens), 1, [], store)

    def _multiply(self) -> None:
        """All sums of the item, to scratch."""
        code, zero = self.code, splat(F32, self.plan.lanes, 0.0)
        step = self.plan.rows * (2 if self.arithmetic is Arithmetic.INPUTS else 1)
        places = [
            [self._sum_address(t, v, s, w) for v, s in pairs for w in range(self.per_step)
             for t in range(self.spec.tokens)]
            for pairs in self.passes
        ]  # fmt: skip
        if len(self.passes) == 1:
            turn = partial(self._turn, self.passes[0])
            nothing = [zero] * len(places[0])
            sums = code.loop(integer(0), integer(self.spec.inputs), step, nothing, turn)
            for value, place in zip(sums, places[0], strict=True):
                code.store(value, place)
            return

        def clear(offset: ir.Value, _: Sequence[ir.Value]) -> Sequence[ir.Value]:
            code.store(zero, code.address(self.sums, offset))
            return []

        code.loop(integer(0), integer(self._sum_bytes), 4 * self.plan.lanes, [], clear)

        def block(first: ir.Value, _: Sequence[ir.Value]) -> Sequence[ir.Value]:
            end = code.at.add(first, integer(INPUT_BLOCK))
            inside = code.at.icmp_unsigned("<", end, integer(self.spec.inputs))
            end = code.at.select(inside, end, integer(self.spec.inputs))
            for pairs, some in zip(self.passes, places, strict=True):
                turn = partial(self._turn, pairs)
                sums = [code.load(self._kind(F32), place) for place in some]
                sums = list(code.loop(first, end, step, sums, turn))
                for value, place in zip(sums, some, strict=True):
                    code.store(value, place)
            return []

        code.loop(integer(0), integer(self.spec.inputs), INPUT_BLOCK, [], block)

    def _turn(
        self, pairs: Sequence[tuple[int, int]], k: ir.Value, sums: Sequence[ir.Value]
    ) -> list[ir.Value]:
        """Add the next inputs to the sums of some vectors and steps."""
        code, plan = self.code, self.plan
        words = code.address(self.words, code.at.mul(k, integer(4 * plan.words)))
        x = code.address(self.x, code.at.mul(k, integer(self.input_bytes)))
        operands = self._input_operands(x)
        windows = labels.load_windows(code, plan, words, pairs)
        next_windows = None
        if self.arithmetic is Arithmetic.INPUTS:
            following = code.address(words, 4 * plan.words * plan.rows)
            next_windows = labels.load_windows(code, plan, following, pairs)
        updated = []
        remaining = iter(sums)
        for v, s in pairs:
            halves = labels.masked_products(code, plan, windows, v, s)
            if next_windows is not None:
                others = labels.masked_products(code, plan, next_windows, v, s)
                factors = self._side_by_side(halves, others)
            elif self.arithmetic is Arithmetic.HALVES:
                factors = [halves] * self.per_step
            else:
                low, high = labels.float_halves(code, halves)
                factors = [low, high] if self.per_step == 2 else [code.at.fadd(low, high)]
            for w, factor in enumerate(factors):
                for token in range(self.spec.tokens):
                    updated.append(self._add(next(remaining), factor, operands(token, w)))
        return updated

    def _side_by_side(self, first: ir.Value, second: ir.Value) -> list[ir.Value]:
        """Labels of two inputs as pairs of bfloat16, by weight of the step."""
        at, lanes, code = self.code.at, self.plan.lanes, self.code
        sixteen = splat(I32, lanes, 16)
        low, high = splat(I32, lanes, 0xFFFF), splat(I32, lanes, 0xFFFF0000)
        if self.per_step == 2:
            return [
                at.or_(at.and_(first, low), at.shl(second, sixteen)),
                at.or_(at.lshr(first, sixteen), at.and_(second, high)),
            ]
        # Sums of halves are exact in bfloat16: their low 16 bits are zero.
        one, other = (
            at.bitcast(at.fadd(*labels.float_halves(code, halves)), self._kind(I32))
            for halves in (first, second)
        )
        return [at.or_(at.lshr(one, sixteen), other)]

    def _input_operands(self, x: ir.Value) -> Callable[[int, int], ir.Value]:
        """Inputs of a token for a weight of the step, in every lane those of its row; each is built
        once."""
        code, plan, lanes = self.code, self.plan, self.plan.lanes
        built: dict[tuple[int, int], ir.Value] = {}

        def operand(token: int, weight: int) -> ir.Value:
            own = code.address(x, token * self.spec.inputs * self.input_bytes)
            if self.arithmetic is Arithmetic.FLOAT:
                return self._by_lane(F32, own)
            if self.arithmetic is Arithmetic.INPUTS:
                return self._neighbours(own)
            twice = code.load(vector(I16, plan.rows), own)
            index = [plan.row(lane // 2) for lane in range(2 * lanes)]
            both = code.at.bitcast(code.shuffle(twice, index), self._kind(I32))
            if self.per_step == 1:
                return both
            mask = 0xFFFF if weight == 0 else 0xFFFF0000
            return code.at.and_(both, splat(I32, lanes, mask))

        def once(token: int, weight: int) -> ir.Value:
            if self.arithmetic is not Arithmetic.HALVES or self.per_step == 1:
                weight = 0
            if (token, weight) not in built:
                built[token, weight] = operand(token, weight)
            return built[token, weight]

        return once

    def _by_lane(self, element: ir.Type, address: ir.Value) -> ir.Value:
        """Each lane's row of a pass from neighbouring numbers."""
        plan, code = self.plan, self.code
        if plan.rows == 1:
            return code.repeat(code.load(element, address), plan.lanes)
        rows = code.load(vector(element, plan.rows), address)
        return code.shuffle(rows, [plan.row(lane) for lane in range(plan.lanes)])

    def _neighbours(self, address: ir.Value) -> ir.Value:
        """The inputs of a pass and of the next, side by side in each lane."""
        plan, code = self.plan, self.code
        if plan.rows == 1:
            return self._by_lane(I32, address)
        rows = code.load(vector(I16, 2 * plan.rows), address)
        index = [plan.row(lane // 2) + lane % 2 * plan.rows for lane in range(2 * plan.lanes)]
        return code.at.bitcast(code.shuffle(rows, index), self._kind(I32))

    def _add(self, total: ir.Value, factor: ir.Value, x: ir.Value) -> ir.Value:
        if self.arithmetic is Arithmetic.FLOAT:
            return self.code.fused(factor, x, total)
        return bfloat16_pairs_added(self.code, total, factor, x)

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
                pattern = code.at.zext(pattern, vector(I32, groups))
                factor = code.at.shl(pattern, splat(I32, groups, 16))
                factor = code.at.bitcast(factor, vector(F32, groups))
                code.store(code.at.fmul(values, factor), code.address(out, 4 * first))

    def _over_rows(self, sums: ir.Value) -> ir.Value:
        """The sum over the rows of a pass: one lane for each group."""
        count = sums.type.count
        while count > self.plan.groups:
            count //= 2
            halves = (range(count), range(count, 2 * count))
            sums = self.code.at.fadd(*(self.code.shuffle(sums, half) for half in halves))
        return sums
