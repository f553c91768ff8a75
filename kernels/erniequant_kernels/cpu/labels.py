"""Vector code from words to labels; `erniequant.codes.labels` says what they are."""

from collections.abc import Sequence

from llvmlite import ir

from erniequant.codes.labels import KEEP_BITS, TOGGLE_BITS
from erniequant_kernels.cpu.lanes import LanePlan
from erniequant_kernels.cpu.vector_code import F32, I32, Code, splat, vector

Windows = dict[int, tuple[ir.Value, ir.Value | None]]
"""By vector: the 32 bits that end with each lane's group, and the 32 before if any step needs
them."""


def load_windows(
    code: Code, plan: LanePlan, words: ir.Value, pairs: Sequence[tuple[int, int]]
) -> Windows:
    """Load what the (vector, step) ``pairs`` need of a pass whose words begin at an address."""
    windows: Windows = {}
    for v in sorted({v for v, _ in pairs}):
        newest = [plan.newest(v * plan.lanes + i) for i in range(plan.lanes)]
        length = plan.code.register_length
        long = any(plan.shift(s) + length > 32 for w, s in pairs if w == v)

        def gather(back: int, newest: Sequence[tuple[int, int]] = newest) -> ir.Value:
            return _gather(code, plan, words, [plan.before(w, back) for w, _ in newest])

        shifts = [shift for _, shift in newest]
        current = gather(0)
        before = gather(1) if long or any(shifts) else None
        if any(shifts):
            amount = ir.Constant(vector(I32, plan.lanes), shifts)
            current, before = (
                code.funnel(before, current, amount),
                code.funnel(gather(2), before, amount) if long else None,
            )
        windows[v] = current, before
    return windows


def _gather(code: Code, plan: LanePlan, words: ir.Value, index: list[int]) -> ir.Value:
    """Words of a pass by number: one load where they are neighbours, else a shuffle of all."""
    first = index[0]
    if index == list(range(first, first + plan.lanes)):
        return code.load(vector(I32, plan.lanes), code.address(words, 4 * first))
    return code.shuffle(code.load(vector(I32, plan.rows * plan.words), words), index)


def masked_products(code: Code, plan: LanePlan, windows: Windows, v: int, step: int) -> ir.Value:
    """The two bfloat16 halves of a step's product in each lane of vector ``v``, low half first."""
    lanes, length, at = plan.lanes, plan.code.register_length, code.at
    current, before = windows[v]
    shift = plan.shift(step)
    if shift == 0:
        register = current
    elif shift + length <= 32:
        register = at.lshr(current, splat(I32, lanes, shift))
    else:
        register = code.funnel(before, current, splat(I32, lanes, shift))
    if shift == 0 or shift + length != 32:
        register = at.and_(register, splat(I32, lanes, (1 << length) - 1))
    product = at.mul(register, splat(I32, lanes, plan.code.multiplier))
    kept = at.and_(product, splat(I32, lanes, KEEP_BITS))
    return at.xor(kept, splat(I32, lanes, TOGGLE_BITS))


def float_halves(code: Code, halves: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Both halves as float32 vectors."""
    lanes = halves.type.count
    low = code.at.shl(halves, splat(I32, lanes, 16))
    high = code.at.and_(halves, splat(I32, lanes, 0xFFFF0000))
    kind = vector(F32, lanes)
    return code.at.bitcast(low, kind), code.at.bitcast(high, kind)
