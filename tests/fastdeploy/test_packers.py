"""The packed layouts against a slow loop that puts every code where the description says."""

import importlib.util

import numpy as np
import pytest
import torch

from erniequant.formats.fastdeploy.packers import WINT4, WINT8, Packing
from tests.fastdeploy import paddle_oracle

# The first bytes that paddlepaddle 3.3.1 gives for w[k, n] = k where n is even, -k where it is odd.
PADDLE_WINT8 = [-128, -112, -126, -110, -124, -108, -122, -106, -120, -104, -118, -102, -116, -100,
                -114, -98, -96, -80, -94, -78]  # fmt: skip
PADDLE_WINT4 = [-104, -70, -104, -70, -104, -70, -104, -70, -104, -70, -103, -70, -87, -70, -87,
                -69, -52, -19, -36, -19]  # fmt: skip

# The smallest, one with several tiles each way, and one whose K is eight tiles and N one group.
SHAPES = [(64, 16), (64, 64), (256, 128), (512, 64)]
BOTH = pytest.mark.parametrize("packing", [WINT8, WINT4], ids=["wint8", "wint4"])


def random_codes(packing: Packing, shape: tuple[int, int]) -> torch.Tensor:
    return torch.randint(-packing.largest, packing.largest + 1, shape, dtype=torch.int8)


def slow_wint8(codes: np.ndarray) -> np.ndarray:
    """Byte by byte: tiles of two columns and 64 rows; in 16 rows 0, 8, 1, 9, ..., 7, 15."""
    inputs, outputs = codes.shape
    flat = np.zeros(inputs * outputs, np.uint8)
    for k in range(inputs):
        for n in range(outputs):
            tile = (n // 2) * (inputs // 64) + k // 64
            place = 2 * (k % 16) if k % 16 < 8 else 2 * (k % 16 - 8) + 1
            flat[tile * 128 + n % 2 * 64 + k % 64 // 16 * 16 + place] = codes[k, n] + 128
    return flat.view(np.int8).reshape(outputs, inputs)


def slow_wint4(codes: np.ndarray) -> np.ndarray:
    """Nibble by nibble: tiles of four columns; in 32 rows 0, 8, 16, 24, 1, ...; low one first."""
    inputs, outputs = codes.shape
    flat = np.zeros(inputs * outputs // 2, np.uint8)
    for k in range(inputs):
        for n in range(outputs):
            tile = (n // 4) * (inputs // 64) + k // 64
            nibble = tile * 256 + n % 4 * 64 + k % 64 // 32 * 32 + 4 * (k % 8) + k % 32 // 8
            flat[nibble // 2] |= (codes[k, n] + 8) << (4 * (nibble % 2))
    return flat.view(np.int8).reshape(outputs // 2, inputs)


@BOTH
@pytest.mark.parametrize("shape", SHAPES)
def test_every_code_lies_where_the_description_says(
    packing: Packing, shape: tuple[int, int]
) -> None:
    codes = random_codes(packing, shape)
    slow = slow_wint8 if packing is WINT8 else slow_wint4
    packed = packing.pack(codes)
    assert packed.dtype == torch.int8 and packed.shape == packing.packed_shape(*shape)
    assert np.array_equal(packed.numpy(), slow(codes.numpy().astype(np.int16)))


@BOTH
@pytest.mark.parametrize("shape", SHAPES)
def test_unpacking_gives_the_codes_back(packing: Packing, shape: tuple[int, int]) -> None:
    codes = random_codes(packing, shape)
    assert torch.equal(packing.unpack(packing.pack(codes)), codes)
    scale = torch.rand(shape[1]).to(torch.bfloat16)
    expected = codes.double() * scale.double()
    assert torch.equal(packing.dequantize(packing.pack(codes), scale).double(), expected)


def test_the_bytes_that_paddle_gives() -> None:
    weight = torch.arange(64.0)[:, None] * torch.tensor([1.0, -1.0]).repeat(8)
    assert WINT8.round(weight).quant_weight[0, :20].tolist() == PADDLE_WINT8
    assert WINT4.round(weight).quant_weight[0, :20].tolist() == PADDLE_WINT4


@BOTH
def test_halves_round_away_from_zero(packing: Packing) -> None:
    largest = packing.largest
    weight = torch.zeros(64, 16)
    # The first row fixes the scale at 2^-4.
    weight[0] = largest
    weight[1:5] = torch.tensor([0.5, -0.5, 1.5, -2.5])[:, None]
    codes = packing.unpack(packing.round(weight / 16).quant_weight)
    assert codes[:6, 0].tolist() == [largest, 1, -1, 2, -3, 0]


@BOTH
def test_a_column_of_zeros_means_zeros(packing: Packing) -> None:
    weight = torch.randn(64, 16)
    weight[:, 3] = 0
    packed = packing.round(weight)
    assert packed.weight_scale[3] == 0
    decoded = packing.dequantize(packed.quant_weight, packed.weight_scale)
    assert torch.equal(decoded[:, 3], torch.zeros(64)) and decoded[:, 2].abs().sum() > 0


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_scale_is_rounded_before_weights_are_divided_by_it(
    packing: Packing, dtype: torch.dtype
) -> None:
    weight = torch.randn(256, 64).to(dtype)
    packed = packing.round(weight, dtype)
    stored = packed.weight_scale.double()
    assert packed.weight_scale.dtype == dtype
    decoded = packing.dequantize(packed.quant_weight, packed.weight_scale).double()
    limit = packing.largest * stored
    clipped = weight.double().clamp(-limit, limit)
    # Nothing is further away than half a step of the stored scale.
    assert ((decoded - clipped).abs() <= stored / 2 * (1 + 1e-6)).all()


@BOTH
@pytest.mark.parametrize("shape", [(32, 16), (96, 16), (64, 8), (64, 0)])
def test_shapes_that_have_no_layout(packing: Packing, shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="multiples of 64"):
        packing.pack(torch.zeros(shape, dtype=torch.int8))


@BOTH
def test_codes_out_of_range(packing: Packing) -> None:
    codes = torch.zeros(64, 16, dtype=torch.int8)
    codes[5, 5] = -packing.largest - 1
    with pytest.raises(ValueError, match="at most"):
        packing.pack(codes)


@pytest.mark.skipif(importlib.util.find_spec("paddle") is None, reason="has no paddlepaddle")
def test_against_paddle(tmp_path: object) -> None:
    file = f"{tmp_path}/paddle.npz"
    paddle_oracle.expect(file)
    assert paddle_oracle.compare(file) == 0
