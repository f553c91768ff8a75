"""The product with packed weights against the decoded one, for every code and awkward sizes."""

import pytest
import torch

from erniequant.codes import CODE_NAMES, REGISTERED, get_code
from erniequant_kernels import decode
from erniequant_kernels.bfloat16 import INTERPRETED
from erniequant_kernels.packed_gemm import PackedGemmConfig, packed_gemm, packed_gemm_reference
from erniequant_kernels.routing import row_tiles
from tests.kernels.products import assert_close, random_words

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def product(x, packed, code, tile, index, top_k, config):
    outputs = packed.shape[1] * tile
    out = torch.full((config.splits, index.numel(), outputs), torch.nan, device=DEVICE)
    packed_gemm(
        x, packed, decode.constants(DEVICE), code, tile,
        row_tiles(index, packed.shape[0], config.block_m), top_k, out, config,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("name, length", REGISTERED)
def test_one_hot_inputs_read_every_weight(name, length):
    # Row i has a one at input i: the product is the matrix itself, without any rounding.
    code, tile, inputs = get_code(name, length), 64, 32
    packed = random_words(1, 3, inputs * code.words_per_sequence(tile))
    x = torch.eye(inputs, dtype=torch.bfloat16, device=DEVICE)
    index = torch.zeros(inputs, 1, dtype=torch.int64, device=DEVICE)
    config = PackedGemmConfig(block_m=16, block_k=32, splits=1, warps=1, stages=2)
    found = product(x, packed, code, tile, index, 1, config)
    assert torch.equal(found[0], packed_gemm_reference(x, packed, code, tile, index[:, 0], 1))


@pytest.mark.parametrize("name, length", REGISTERED)
def test_every_register_value_at_every_step_of_a_group(name, length):
    # A sequence of equal words: a rotated value appears at every step, and 2^16 of them (all
    # fillings of 16 bits) show every register at every step and at the seam.
    code, tile, inputs = get_code(name, length), 32, 16
    values = torch.arange(2**16, dtype=torch.int64)
    word = values << 16 | values
    word = torch.where(word >= 2**31, word - 2**32, word).to(torch.int32).to(DEVICE)
    sequences = word[:, None].expand(-1, code.words_per_sequence(tile))
    packed = sequences.reshape(1, 2**16 // inputs, -1)
    x = torch.eye(inputs, dtype=torch.bfloat16, device=DEVICE)
    index = torch.zeros(inputs, 1, dtype=torch.int64, device=DEVICE)
    # Few programs for the interpreter; a compiler would unroll so large a tile for ever.
    config = PackedGemmConfig(16, 16, 1, 256 if INTERPRETED else 1, 2)
    found = product(x, packed, code, tile, index, 1, config)
    assert torch.equal(found[0], packed_gemm_reference(x, packed, code, tile, index[:, 0], 1))


# tile, tiles, inputs, config. 3 tiles of 64: an odd multiple that fills no program evenly. One tile
# of 32: fewer groups than a warp takes. 96 and 160 inputs: three and five turns, split in as many.
SIZES = [
    (64, 3, 96, PackedGemmConfig(8, 32, 3, 1, 2)),
    (32, 1, 160, PackedGemmConfig(8, 32, 5, 1, 2)),
    (256, 1, 64, PackedGemmConfig(16, 16, 2, 1, 2)),
    (128, 5, 64, PackedGemmConfig(16, 64, 1, 4, 1)),
]


@pytest.mark.parametrize("name", CODE_NAMES)
@pytest.mark.parametrize("tile, tiles, inputs, config", SIZES)
def test_routed_tokens(name, tile, tiles, inputs, config):
    code = get_code(name, 13)
    experts = 4
    packed = random_words(experts, tiles, inputs * code.words_per_sequence(tile))
    # Nobody chooses expert 1; 11 tokens are no multiple of the row tile; token 4 chooses twice the
    # same; one index is beyond the experts and its row must stay untouched.
    index = torch.tensor([[0, 2], [2, 3], [3, 0], [0, 2], [3, 3], [0, 4]] + [[3, 2]] * 5)
    index = index.to(DEVICE)
    x = torch.randn(11, inputs, device=DEVICE).bfloat16()
    found = product(x, packed, code, tile, index, 2, config)
    expected = packed_gemm_reference(x, packed, code, tile, index.flatten(), 2)
    untouched = index.flatten() == 4
    assert found[:, untouched].isnan().all()
    assert_close(found[:, ~untouched].sum(0), expected[~untouched])


@pytest.mark.parametrize("name", CODE_NAMES)
def test_adversarial_inputs(name):
    # Huge values that cancel, and a row that is all zero but one: float32 sums must carry them.
    code, tile, inputs = get_code(name, 16), 64, 64
    packed = random_words(1, 1, inputs * code.words_per_sequence(tile))
    x = torch.zeros(3, inputs, device=DEVICE)
    x[0] = torch.randn(inputs) * 1e4
    x[0, 1::2] = -x[0, ::2]
    x[1, 7] = 1e-20
    x[2] = 3e38 / 2**10
    index = torch.zeros(3, 1, dtype=torch.int64, device=DEVICE)
    config = PackedGemmConfig(8, 32, 2, 1, 2)
    found = product(x.bfloat16(), packed, code, tile, index, 1, config).sum(0)
    expected = packed_gemm_reference(x.bfloat16(), packed, code, tile, index[:, 0], 1)
    for row in range(3):
        assert_close(found[row], expected[row])
