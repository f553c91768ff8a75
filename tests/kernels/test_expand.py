"""Decoding in Triton against the torch reference, bit for bit."""

import pytest
import torch

from erniequant.codes import CODE_NAMES, REGISTERED, get_code
from erniequant_kernels import decode
from erniequant_kernels.expand import expand, expand_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_words(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64)
    return words.to(torch.int32).to(DEVICE)


def expanded(packed, code, tile, **options):
    experts, tiles, row_words = packed.shape
    inputs = row_words // code.words_per_sequence(tile)
    out = torch.full((experts, tiles * tile, inputs), torch.nan, dtype=torch.bfloat16)
    out = out.to(DEVICE)
    expand(packed, decode.constants(DEVICE), code, tile, out, **options)
    return out


@pytest.mark.parametrize("name, length", REGISTERED)
@pytest.mark.parametrize("tile", [32, 64])
def test_every_weight_is_bit_exact(name, length, tile):
    # 32 weights is the smallest tile: two, three and four words, every one of them at the seam.
    # Two experts; 96 or 192 outputs are less than what a program takes, 80 inputs more, unevenly.
    code = get_code(name, length)
    packed = random_words(2, 3, 80 * code.words_per_sequence(tile), seed=length)
    assert torch.equal(expanded(packed, code, tile), expand_reference(packed, code, tile))


@pytest.mark.parametrize("name, length", REGISTERED)
def test_every_register_value_at_every_step_of_a_group(name, length):
    # Each input row is one sequence of equal words: a rotated value appears at every step, and
    # 2^16 of them (all fillings of 16 bits) show every register at every step and at the seam.
    code = get_code(name, length)
    tile = 32
    words = code.words_per_sequence(tile)
    values = torch.arange(2**16, dtype=torch.int64)
    word = values << 16 | values
    word = torch.where(word >= 2**31, word - 2**32, word).to(torch.int32).to(DEVICE)
    packed = word[:, None].expand(-1, words).reshape(1, 1, -1)
    # Few programs for the interpreter; a compiler would unroll so large a tile for ever.
    options = {} if DEVICE == "cuda" else {"block_k": 2**14}
    out = expanded(packed, code, tile, **options)
    assert torch.equal(out, expand_reference(packed, code, tile))


@pytest.mark.parametrize("name", CODE_NAMES)
def test_the_first_register_reaches_back_to_the_end_of_its_own_sequence(name):
    # Only the last bit of row 1 is set: it must show in that row's first weights, in no other row.
    code = get_code(name, 16)
    tile, inputs = 64, 3
    words = code.words_per_sequence(tile)
    packed = torch.zeros(1, 1, inputs * words, dtype=torch.int32, device=DEVICE)
    before = expanded(packed, code, tile)
    packed[..., 2 * words - 1] = 1
    changed = expanded(packed, code, tile) != before
    assert changed[0].any(dim=0).tolist() == [False, True, False]
    assert changed[0, :2, 1].any()
