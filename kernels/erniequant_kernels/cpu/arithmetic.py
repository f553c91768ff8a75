"""How labels are multiplied with inputs, in vector code."""

from collections.abc import Callable, Sequence
from enum import Enum

from llvmlite import ir

from erniequant_kernels.cpu import labels
from erniequant_kernels.cpu.lanes import LanePlan
from erniequant_kernels.cpu.vector_code import (
    F32,
    I16,
    I32,
    Code,
    bfloat16_pairs_added,
    integer,
    splat,
    vector,
)


class Arithmetic(Enum):
    """Three ways to multiply.

    FLOAT: float32 labels, fused multiply-add. Any processor, any precision.
    HALVES: both halves of a product are operands as they lie there, of the instruction that adds
        two bfloat16 products: with an input twice it sums them, with the input and zero it takes
        one.
    INPUTS: the same instruction on labels of two inputs side by side. Half the multiplications,
        some work to put labels together: for several tokens.
    """

    FLOAT = "float"
    HALVES = "halves"
    INPUTS = "inputs"


class LabelProducts:
    """Code that adds labels times inputs to sums.

    Attributes:
        step: inputs that one turn takes.
        input_bytes: of one input in memory.
        factors_kind: vectors of the labels as they are multiplied.
    """

    def __init__(
        self, code: Code, plan: LanePlan, arithmetic: Arithmetic, inputs: int, tokens: int
    ):
        """inputs: of a token's row; tokens: rows that are multiplied together."""
        self.code, self.plan, self.arithmetic = code, plan, arithmetic
        self.row, self.tokens = inputs, tokens
        self.per_step = plan.code.weights_per_step
        self.step = plan.rows * (2 if arithmetic is Arithmetic.INPUTS else 1)
        self.input_bytes = 4 if arithmetic is Arithmetic.FLOAT else 2
        self.factors_kind = self._kind(F32 if arithmetic is Arithmetic.FLOAT else I32)

    def _kind(self, element: ir.Type) -> ir.VectorType:
        return vector(element, self.plan.lanes)

    def factors(
        self, packed: ir.Value, pairs: Sequence[tuple[int, int]], k: ir.Value
    ) -> list[list[ir.Value]]:
        """Labels of (vector, step) ``pairs`` as they are multiplied, by weight of the step, of the
        inputs from ``k`` on of a tile at ``packed``."""
        code, plan = self.code, self.plan
        words = code.address(packed, code.at.mul(k, integer(4 * plan.words)))
        windows = labels.load_windows(code, plan, words, pairs)
        next_windows = None
        if self.arithmetic is Arithmetic.INPUTS:
            following = code.address(words, 4 * plan.words * plan.rows)
            next_windows = labels.load_windows(code, plan, following, pairs)
        found = []
        for v, s in pairs:
            halves = labels.masked_products(code, plan, windows, v, s)
            if next_windows is not None:
                others = labels.masked_products(code, plan, next_windows, v, s)
                found.append(self._side_by_side(halves, others))
            elif self.arithmetic is Arithmetic.HALVES:
                found.append([halves] * self.per_step)
            else:
                low, high = labels.float_halves(code, halves)
                found.append([low, high] if self.per_step == 2 else [code.at.fadd(low, high)])
        return found

    def added(
        self, factors: list[list[ir.Value]], x: ir.Value, sums: Sequence[ir.Value]
    ) -> list[ir.Value]:
        """The sums, by factor and token, with the products of inputs at an address added."""
        operands = self._input_operands(x)
        remaining = iter(sums)
        return [
            self._add(next(remaining), factor, operands(token, w))
            for of_step in factors
            for w, factor in enumerate(of_step)
            for token in range(self.tokens)
        ]

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
            own = code.address(x, token * self.row * self.input_bytes)
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
