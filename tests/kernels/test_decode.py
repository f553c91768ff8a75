"""Decoding in Triton against the torch reference, bit for bit."""

import pytest
import torch
import triton
import triton.language as tl

from erniequant.codes import CODE_NAMES, EFFORT_LENGTHS, get_code
from erniequant.codes.reference import decode as reference_decode
from erniequant_kernels import decode
from erniequant_kernels.tile import decode_dot_tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def decode_all(
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
):
    """All weights of one tile and input row, as ``out[tile * outputs, inputs]``."""
    WORDS: tl.constexpr = GROUPS * GROUP_BITS // 32
    STEPS: tl.constexpr = GROUP_BITS // STEP_BITS
    tile = tl.program_id(0)
    row = tl.program_id(1) + tl.arange(0, 1)
    group = tl.arange(0, GROUPS)
    last = decode.last_word(group, GROUP_BITS)
    words = packed_ptr + tile * inputs * WORDS + row[None, :] * WORDS
    newest = tl.load(words + last[:, None]).to(tl.uint32, bitcast=True)
    before = tl.load(words + ((last + WORDS - 1) % WORDS)[:, None]).to(tl.uint32, bitcast=True)
    keep = decode.load_keep_bits(constants_ptr)
    if GROUP_BITS == 24:
        shifts = decode.load_shifts(constants_ptr, group)
        newest, before = decode.align_group(before, newest, shifts)
    for step in tl.static_range(STEPS):
        bits = decode.register(before, newest, GROUP_BITS - STEP_BITS * (step + 1), LENGTH)
        output = ((tile * GROUPS + group) * STEPS + step) * WEIGHTS_PER_STEP
        if WEIGHTS_PER_STEP == 2:
            first, second = decode.pair(bits, keep, MULTIPLIER)
            tl.store(out_ptr + output[:, None] * inputs + row[None, :], first)
            tl.store(out_ptr + (output + 1)[:, None] * inputs + row[None, :], second)
        else:
            weight = decode.half_sum(bits, keep, MULTIPLIER)
            tl.store(out_ptr + output[:, None] * inputs + row[None, :], weight)


def constants_of(code, tile):
    group_bits = decode.group_bits(code)
    return {
        "STEP_BITS": code.step_bits,
        "WEIGHTS_PER_STEP": code.weights_per_step,
        "LENGTH": code.register_length,
        "MULTIPLIER": code.multiplier,
        "GROUP_BITS": group_bits,
        "GROUPS": tile * code.bits // group_bits,
    }


def random_words(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64)
    return words.to(torch.int32).to(DEVICE)


@pytest.mark.parametrize("name", CODE_NAMES)
@pytest.mark.parametrize("length", EFFORT_LENGTHS)
@pytest.mark.parametrize("tile", [32, 64])
def test_every_weight_is_bit_exact(name, length, tile):
    # 32 weights is the smallest tile: two, three and four words, every one of them at the seam.
    code = get_code(name, length)
    tiles, inputs = 3, 5
    packed = random_words(tiles, inputs * code.words_per_sequence(tile), seed=length)
    out = torch.full((tiles * tile, inputs), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    decode_all[(tiles, inputs)](
        packed, decode.constants(DEVICE), out, inputs, **constants_of(code, tile)
    )
    expected = reference_decode(packed, code, tile)
    assert torch.equal(out.float(), expected)


@pytest.mark.parametrize("name", CODE_NAMES)
def test_the_first_register_reaches_back_to_the_end_of_its_own_sequence(name):
    # Only the last bit of row 1 is set: it must show in that row's first weights, in no other row.
    code = get_code(name, 16)
    tile, inputs = 64, 3
    words = code.words_per_sequence(tile)
    packed = torch.zeros(1, inputs * words, dtype=torch.int32, device=DEVICE)
    out = torch.empty(2, tile, inputs, dtype=torch.bfloat16, device=DEVICE)
    for index in range(2):
        decode_all[(1, inputs)](
            packed, decode.constants(DEVICE), out[index], inputs, **constants_of(code, tile)
        )
        packed[0, 2 * words - 1] = 1
    changed = (out[0] != out[1]).any(dim=0)
    assert changed.tolist() == [False, True, False]
    assert (out[0, :2, 1] != out[1, :2, 1]).any()


@pytest.mark.parametrize("name", CODE_NAMES)
def test_tile_kernel_multiplies_the_decoded_weights(name):
    # The kernel whose machine code is counted must be a correct one; 16 groups, two loop turns.
    code = get_code(name, 12)
    tile = 16 * decode.group_bits(code) // code.bits
    tiles, inputs, tokens = 2, 64, 16
    packed = random_words(tiles, inputs * code.words_per_sequence(tile))
    x = (
        torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(1))
        .bfloat16()
        .to(DEVICE)
    )
    out = torch.full((tiles * tile, tokens), torch.nan, device=DEVICE)
    decode_dot_tile[(tiles,)](
        x, packed, decode.constants(DEVICE), out, inputs,
        BLOCK_K=32, BLOCK_M=tokens, num_warps=1, **constants_of(code, tile),
    )  # fmt: skip
    expected = reference_decode(packed, code, tile).double() @ x.double().T
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)
