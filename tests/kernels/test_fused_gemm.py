"""The fused product on packed weights against the decoded one, for every code and awkward sizes."""

import pytest
import torch

from erniequant.codes import CODE_NAMES, REGISTERED, ConvolutionalCode, get_code
from erniequant.codes.labels import HALF_SUM
from erniequant.packing.decoding import encode_scale
from erniequant_kernels import decode
from erniequant_kernels.fused_gemm import FusedGemmConfig, fused_gemm, fused_gemm_reference
from erniequant_kernels.routing import row_tiles
from tests.kernels.products import assert_close, random_words

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_scales(experts, outputs):
    """Different for every expert and output, of both signs, over six powers of two."""
    magnitude = torch.exp2(torch.rand(experts, outputs, 1) * 6 - 3)
    return encode_scale(magnitude * (torch.randint(0, 2, magnitude.shape) * 2 - 1)).to(DEVICE)


def product(x, packed, scale, code, tile, index, top_k, config, dtype=torch.float32):
    outputs = packed.shape[1] * tile
    out = torch.full((index.numel(), outputs), torch.nan, device=DEVICE, dtype=dtype)
    fused_gemm(
        x, packed, scale, decode.constants(DEVICE), code, tile,
        row_tiles(index, packed.shape[0], config.block_m), top_k, out, config,
    )  # fmt: skip
    return out


# Two bits and one weight a step, in no file: the step and the label alone tell kernels what to do.
TOY = ConvolutionalCode("toy", 2, 12, 0x9E3779B1, HALF_SUM)


@pytest.mark.parametrize(
    "code",
    [*(get_code(*key) for key in REGISTERED), TOY],
    ids=lambda c: f"{c.name}-{c.register_length}",
)
def test_one_hot_inputs_read_every_weight(code):
    # Row i has a one at input i: the product is the scaled matrix, rounded once.
    tile, inputs = 64, 32
    packed = random_words(1, 3, inputs * code.words_per_sequence(tile))
    scale = random_scales(1, 3 * tile)
    x = torch.eye(inputs, dtype=torch.bfloat16, device=DEVICE)
    index = torch.zeros(inputs, 1, dtype=torch.int64, device=DEVICE)
    config = FusedGemmConfig(block_m=32, block_n=128, block_k=32, warps=4, stages=2)
    found = product(x, packed, scale, code, tile, index, 1, config)
    assert torch.equal(found, fused_gemm_reference(x, packed, scale, code, tile, index[:, 0], 1))


# tile, tiles, inputs, config. 3 tiles of 64: an odd multiple that fills no program evenly. One tile
# of 32: fewer outputs than a program takes, and half a unit of 2-bit words. Tiles of 128 and 256 in
# programs of 64: the word before the first may lie in the middle of a tile or at its other end. 80
# inputs: five turns of 16, the fewest that a matrix instruction takes.
SIZES = [
    (64, 3, 96, FusedGemmConfig(16, 128, 32, 4, 2)),
    (32, 1, 80, FusedGemmConfig(16, 64, 16, 4, 3)),
    (256, 1, 64, FusedGemmConfig(32, 64, 32, 4, 2)),
    (128, 1, 64, FusedGemmConfig(16, 64, 64, 4, 2)),
    (256, 1, 64, FusedGemmConfig(64, 256, 64, 4, 2)),
    (128, 5, 128, FusedGemmConfig(32, 512, 128, 8, 1)),
]


@pytest.mark.parametrize("name", CODE_NAMES)
@pytest.mark.parametrize("tile, tiles, inputs, config", SIZES)
def test_routed_tokens(name, tile, tiles, inputs, config):
    code = get_code(name, 13)
    experts = 4
    packed = random_words(experts, tiles, inputs * code.words_per_sequence(tile))
    scale = random_scales(experts, tiles * tile)
    # Nobody chooses expert 1; expert 3 has 19 tokens, no multiple of the row tile; token 4 chooses
    # twice the same; one index is beyond the experts and its row must stay untouched.
    index = torch.tensor([[0, 2], [2, 3], [3, 0], [0, 2], [3, 3], [0, 4]] + [[3, 2]] * 15)
    index = index.to(DEVICE)
    x = torch.randn(len(index), inputs, device=DEVICE).bfloat16()
    found = product(x, packed, scale, code, tile, index, 2, config)
    expected = fused_gemm_reference(x, packed, scale, code, tile, index.flatten(), 2)
    untouched = index.flatten() == 4
    assert found[untouched].isnan().all()
    assert_close(found[~untouched], expected[~untouched])


@pytest.mark.parametrize("name", CODE_NAMES)
def test_adversarial_inputs(name):
    # Huge values that cancel, and a row that is all zero but one: float32 sums must carry them.
    code, tile, inputs = get_code(name, 16), 64, 64
    packed = random_words(1, 1, inputs * code.words_per_sequence(tile))
    scale = random_scales(1, tile)
    x = torch.zeros(3, inputs, device=DEVICE)
    x[0] = torch.randn(inputs) * 1e4
    x[0, 1::2] = -x[0, ::2]
    x[1, 7] = 1e-20
    x[2] = 3e38 / 2**10
    index = torch.zeros(3, 1, dtype=torch.int64, device=DEVICE)
    config = FusedGemmConfig(16, 64, 32, 4, 2)
    found = product(x.bfloat16(), packed, scale, code, tile, index, 1, config)
    expected = fused_gemm_reference(x.bfloat16(), packed, scale, code, tile, index[:, 0], 1)
    for row in range(3):
        assert_close(found[row], expected[row])
