# mypy: disallow-untyped-defs=False, check-untyped-defs=False, disable-error-code=assignment
"""The smallest complete decode-and-multiply kernel; `erniequant_kernels.static` counts its code.

Each step of a group has its own accumulators: words are read straight into the layout of the matrix
instruction's weight operand, no weight moves between lanes, and storing puts outputs in order.
"""

import triton
import triton.language as tl

from erniequant_kernels import decode


@triton.jit
def decode_dot_tile(
    x_ptr,
    packed_ptr,
    constants_ptr,
    out_ptr,
    inputs,
    STEP_BITS: tl.constexpr,
    WEIGHTS_PER_STEP: tl.constexpr,
    LENGTH: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    GROUP_BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One tile of outputs per program: ``out[n, m] = sum over k of label[n, k] * x[m, k]``.

    ``x`` bf16 ``[BLOCK_M, inputs]``, ``packed`` int32 ``[tiles, inputs * words]``, ``constants`` as
    from `decode.constants`, ``out`` float32 ``[tiles * outputs, BLOCK_M]``; ``inputs`` is a
    multiple of BLOCK_K, GROUPS is the number of groups in a sequence.
    """
    STEPS: tl.constexpr = GROUP_BITS // STEP_BITS
    WORDS: tl.constexpr = GROUPS * GROUP_BITS // 32
    tile = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    token = tl.arange(0, BLOCK_M)
    last_word = decode.last_word(group, GROUP_BITS)
    previous_word = (last_word + WORDS - 1) % WORDS

    sums = ()
    for _ in tl.static_range(STEPS * WEIGHTS_PER_STEP):
        sums = sums + (tl.zeros((GROUPS, BLOCK_M), dtype=tl.float32),)
    for start in range(0, inputs, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        words = packed_ptr + tile * inputs * WORDS + row[None, :] * WORDS
        newest = tl.load(words + last_word[:, None]).to(tl.uint32, bitcast=True)
        before = tl.load(words + previous_word[:, None]).to(tl.uint32, bitcast=True)
        x = tl.load(x_ptr + token[None, :] * inputs + row[:, None]).to(decode.MATRIX_TYPE)
        keep = decode.load_keep_bits(constants_ptr)
        if GROUP_BITS == 24:
            shifts = decode.load_shifts(constants_ptr, group)
            newest, before = decode.align_group(before, newest, shifts)
        updated = ()
        for step in tl.static_range(STEPS):
            bits = decode.register(before, newest, GROUP_BITS - STEP_BITS * (step + 1), LENGTH)
            if WEIGHTS_PER_STEP == 2:
                first, second = decode.pair(bits, keep, MULTIPLIER)
                updated = updated + (
                    tl.dot(first.to(decode.MATRIX_TYPE), x, sums[2 * step]),
                    tl.dot(second.to(decode.MATRIX_TYPE), x, sums[2 * step + 1]),
                )
            else:
                weight = decode.half_sum(bits, keep, MULTIPLIER)
                updated = updated + (tl.dot(weight.to(decode.MATRIX_TYPE), x, sums[step]),)
        sums = updated
    per_group: tl.constexpr = STEPS * WEIGHTS_PER_STEP
    for i in tl.static_range(per_group):
        output = (tile * GROUPS + group) * per_group + i
        tl.store(out_ptr + output[:, None] * BLOCK_M + token[None, :], sums[i])
