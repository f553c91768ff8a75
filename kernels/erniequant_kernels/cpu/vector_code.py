"""Building blocks of vector code: types, addresses, loops, items that threads claim."""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32 = ir.FloatType()
POINTER = ir.PointerType()


class BFloat16(ir.Type):
    """LLVM's ``bfloat``, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat16)

    def __hash__(self) -> int:
        return hash("bfloat")


def vector(element: ir.Type, lanes: int) -> ir.VectorType:
    """Type of a vector."""
    return ir.VectorType(element, lanes)


def splat(element: ir.Type, lanes: int, value: float) -> ir.Constant:
    """A vector of one number."""
    return ir.Constant(vector(element, lanes), [value] * lanes)


def integer(value: int) -> ir.Constant:
    """A 64-bit constant."""
    return ir.Constant(I64, value)


class Code:
    """A function under construction: the position where the next instruction goes, and shorthands.

    Addresses are byte addresses; loads and stores assume the alignment of an element.
    """

    def __init__(self, name: str, parameters: Sequence[ir.Type]):
        self.module = ir.Module(name)
        self.function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), parameters), name)
        self.at = ir.IRBuilder(self.function.append_basic_block("entry"))

    def intrinsic(self, name: str, result: ir.Type, arguments: Sequence[ir.Value]) -> ir.Value:
        """Call one of LLVM's intrinsics."""
        function = self.module.globals.get(name)
        if function is None:
            types = [argument.type for argument in arguments]
            function = ir.Function(self.module, ir.FunctionType(result, types), name)
        return self.at.call(function, arguments)

    def funnel(self, high: ir.Value, low: ir.Value, shift: ir.Value) -> ir.Value:
        """The low half of ``high:low`` shifted right, lane by lane."""
        name = f"llvm.fshr.v{high.type.count}i{high.type.element.width}"
        return self.intrinsic(name, high.type, [high, low, shift])

    def fused(self, a: ir.Value, b: ir.Value, total: ir.Value) -> ir.Value:
        """``a * b + total`` with one rounding."""
        return self.intrinsic(f"llvm.fma.v{a.type.count}f32", a.type, [a, b, total])

    def shuffle(
        self, values: ir.Value, lanes: Sequence[int], others: ir.Value | None = None
    ) -> ir.Value:
        """Lanes of ``values``, followed by ``others``, by number."""
        if others is None:
            others = ir.Constant(values.type, ir.Undefined)
        return self.at.shuffle_vector(
            values, others, ir.Constant(vector(I32, len(lanes)), list(lanes))
        )

    def repeat(self, value: ir.Value, lanes: int) -> ir.Value:
        """A vector of one number that is known when it runs."""
        nothing = ir.Constant(vector(value.type, lanes), ir.Undefined)
        first = self.at.insert_element(nothing, value, ir.Constant(I32, 0))
        return self.shuffle(first, [0] * lanes)

    def total(self, values: ir.Value) -> ir.Value:
        """The sum of a vector's lanes."""
        count = values.type.count
        while count > 1:
            count //= 2
            halves = (range(count), range(count, 2 * count))
            values = self.at.fadd(*(self.shuffle(values, half) for half in halves))
        return self.at.extract_element(values, ir.Constant(I32, 0))

    def address(self, base: ir.Value, offset: ir.Value | int) -> ir.Value:
        """``base`` plus bytes."""
        if isinstance(offset, int):
            offset = integer(offset)
        return self.at.gep(base, [offset], source_etype=I8)

    def load(self, kind: ir.Type, address: ir.Value) -> ir.Value:
        """Read a number or a vector."""
        loaded = self.at.load(address, typ=kind)
        loaded.align = _alignment(kind)
        return loaded

    def store(self, value: ir.Value, address: ir.Value) -> None:
        """Write a number or a vector."""
        self.at.store(value, address).align = _alignment(value.type)

    def scratch(self, kind: ir.Type, count: int) -> ir.Value:
        """Address of ``count`` elements on the stack; call it before any loop."""
        space = self.at.alloca(ir.ArrayType(kind, count))
        space.align = 64
        return self.at.inttoptr(self.at.ptrtoint(space, I64), POINTER)

    def entry(self, table: ir.Value, index: ir.Value) -> ir.Value:
        """An element of an int32 table, which is not negative, as 64 bits."""
        place = self.address(table, self.at.mul(index, integer(4)))
        return self.at.zext(self.load(I32, place), I64)

    def clear(self, base: ir.Value, size: ir.Value, kind: ir.VectorType) -> None:
        """Fill memory with float32 zeros, vector by vector; ``size`` in bytes."""

        def one(offset: ir.Value, _: Sequence[ir.Value]) -> Sequence[ir.Value]:
            self.store(splat(F32, kind.count, 0.0), self.address(base, offset))
            return []

        self.loop(integer(0), size, 4 * kind.count, [], one)

    def loop(
        self, start: ir.Value, end: ir.Value, step: int, carried: Sequence[ir.Value],
        body: Callable[[ir.Value, Sequence[ir.Value]], Sequence[ir.Value]],
    ) -> Sequence[ir.Value]:  # fmt: skip
        """``for i in range(start, end, step)``, at least once; values that a turn hands to the
        next."""
        before = self.at.block
        head = self.function.append_basic_block("turn")
        self.at.branch(head)
        self.at = ir.IRBuilder(head)
        index = self.at.phi(I64)
        index.add_incoming(start, before)
        current = []
        for value in carried:
            current.append(self.at.phi(value.type))
            current[-1].add_incoming(value, before)
        updated = body(index, current)
        following = self.at.add(index, integer(step))
        index.add_incoming(following, self.at.block)
        for phi, value in zip(current, updated, strict=True):
            phi.add_incoming(value, self.at.block)
        after = self.function.append_basic_block("after")
        self.at.cbranch(self.at.icmp_unsigned("<", following, end), head, after)
        self.at = ir.IRBuilder(after)
        return updated

    def claim_items(
        self, counter: ir.Value, items: ir.Value, body: Callable[[ir.Value], None]
    ) -> None:
        """Do items until none is left; every thread runs the same function on one counter. Ends the
        function."""
        claim, work, done = (self.function.append_basic_block(n) for n in ("claim", "work", "done"))
        self.at.branch(claim)
        self.at = ir.IRBuilder(claim)
        item = self.at.atomic_rmw("add", counter, integer(1), "monotonic")
        self.at.cbranch(self.at.icmp_unsigned("<", item, items), work, done)
        ir.IRBuilder(done).ret_void()
        self.at = ir.IRBuilder(work)
        body(item)
        self.at.branch(claim)


def by_lane_first(code: Code, vectors: list[ir.Value]) -> list[ir.Value]:
    """Turn ``n`` vectors (a power of two) so that element ``i`` of vector ``j`` comes ``i * n +
    j``-th."""
    lanes, half = vectors[0].type.count, len(vectors) // 2
    if half == 0:
        return vectors
    # Each turn interleaves the first half of the vectors with the second.
    index = [lane // 2 + lane % 2 * lanes for lane in range(2 * lanes)]
    turns = half.bit_length()
    for _ in range(turns):
        vectors = [
            code.shuffle(vectors[j], index[part * lanes : (part + 1) * lanes], vectors[j + half])
            for j in range(half) for part in range(2)
        ]  # fmt: skip
    return vectors


def rounded_to_bfloat16(code: Code, values: ir.Value) -> ir.Value:
    """float32 to bfloat16 patterns: to nearest, ties to even; nan stays nan."""
    at, lanes = code.at, values.type.count
    pattern = at.bitcast(values, vector(I32, lanes))
    odd = at.and_(at.lshr(pattern, splat(I32, lanes, 16)), splat(I32, lanes, 1))
    rounded = at.add(at.add(pattern, splat(I32, lanes, 0x7FFF)), odd)
    is_nan = at.fcmp_unordered("uno", values, values)
    kept = at.select(is_nan, splat(I32, lanes, 0x7FC00000), rounded)
    return at.trunc(at.lshr(kept, splat(I32, lanes, 16)), vector(I16, lanes))


def widened(code: Code, patterns: ir.Value) -> ir.Value:
    """bfloat16 patterns, 16 bits each, to float32."""
    lanes = patterns.type.count
    wide = code.at.zext(patterns, vector(I32, lanes))
    return code.at.bitcast(code.at.shl(wide, splat(I32, lanes, 16)), vector(F32, lanes))


def bfloat16_pairs_added(code: Code, total: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
    """``total`` plus the products of two bfloat16 pairs in each lane, by AVX-512's instruction."""
    lanes = total.type.count
    pairs = vector(BFloat16(), 2 * lanes)
    operands = [code.at.bitcast(value, pairs) for value in (a, b)]
    name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * lanes}"
    return code.intrinsic(name, total.type, [total, *operands])


def _alignment(kind: ir.Type) -> int:
    """Bytes of an element."""
    element: Any = kind.element if isinstance(kind, ir.VectorType) else kind
    return element.width // 8 if isinstance(element, ir.IntType) else 4
