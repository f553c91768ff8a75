"""A code is a row: a toy one of the width of cc2 goes from the encoder to the kernels and through a
checkpoint, beside cc2."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import erniequant
from erniequant.codes import get_code, registry
from erniequant.codes.labels import HALF_SUM
from erniequant.codes.reference import decode as reference_decode
from erniequant.codes.registry import CodeRow
from erniequant.codes.spec import ConvolutionalCode
from erniequant.codes.viterbi import encoder
from erniequant.errors import ErnieQuantError
from erniequant_kernels import decode
from erniequant_kernels.packed_gemm import PackedGemmConfig, packed_gemm, packed_gemm_reference
from erniequant_kernels.routing import row_tiles
from tests.micro import CALIBRATION

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = (8, 10, 16)
TOY = CodeRow(
    bits=2,
    label=HALF_SUM,  # one weight a step, where cc2 has two: no kernel may tell codes by their width
    multipliers={length: 0x9E3779B1 for length in LENGTHS},
    target_std=0.9,
    encode_rate=1e6,
)


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.CODES, "toy", TOY)


def random_words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape).to(torch.int32).to(DEVICE)


def from_first_principles(words: list[int], code: ConvolutionalCode, tile: int) -> list[float]:
    """Weights of one sequence: a string of bits, read in windows that end every other bit."""
    bits = "".join(f"{word & 0xFFFFFFFF:032b}" for word in words)
    table = code.table()[:, 0]
    weights = []
    for end in range(len(bits) + 2, 2 * len(bits) + 1, 2):
        window = (bits + bits)[end - code.register_length : end]
        weights.append(float(table[int(window, 2)]))
    assert len(weights) == tile
    return weights


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("tile", [32, 64, 256])
def test_reference_and_kernel_decode_it(length: int, tile: int) -> None:
    # 32 weights of two bits are two words, a single run; 80 inputs end in the middle of a block.
    code = get_code("toy", length)
    packed = random_words(2, 3, 80 * code.words_per_sequence(tile))
    expected = reference_decode(packed, code, tile).to(torch.bfloat16)
    words = packed[1, 2].view(80, -1)[79].tolist()
    assert expected[1, 2 * tile :, 79].tolist() == from_first_principles(words, code, tile)
    # A one at each input in turn: the product is the second expert's matrix.
    warps = 1 if DEVICE == "cuda" else 16  # few programs for the interpreter
    config = PackedGemmConfig(block_m=16, block_k=16, splits=1, warps=warps, stages=2)
    out = torch.full((1, 80, 3 * tile), torch.nan, device=DEVICE)
    one = torch.eye(80, dtype=torch.bfloat16, device=DEVICE)
    index = torch.ones(80, 1, dtype=torch.int64, device=DEVICE)
    packed_gemm(
        one, packed, decode.constants(DEVICE), code, tile, row_tiles(index, 2, 16), 1, out, config
    )
    assert torch.equal(out[0].T, expected[1].float())


@pytest.mark.parametrize(("tile", "tiles", "splits"), [(32, 3, 2), (256, 2, 1)])
def test_packed_product(tile: int, tiles: int, splits: int) -> None:
    # Three tiles of 32: fewer groups than a warp takes. Token 2 goes to expert 1 alone.
    code = get_code("toy", 10)
    packed = random_words(2, tiles, 64 * code.words_per_sequence(tile))
    index = torch.tensor([[0, 1], [1, 0], [1, 1]], device=DEVICE)
    x = torch.randn(3, 64, device=DEVICE).bfloat16()
    config = PackedGemmConfig(block_m=8, block_k=32, splits=splits, warps=1, stages=2)
    out = torch.full((splits, 6, tiles * tile), torch.nan, device=DEVICE)
    packed_gemm(
        x, packed, decode.constants(DEVICE), code, tile,
        row_tiles(index, 2, config.block_m), 2, out, config,
    )  # fmt: skip
    expected = packed_gemm_reference(x, packed, code, tile, index.flatten(), 2)
    torch.testing.assert_close(
        out.sum(0), expected, rtol=0, atol=1e-5 * float(expected.abs().max())
    )


def test_encoder() -> None:
    # At ten bits a scalar trellis code of two bits leaves 0.07 to 0.09 of the variance, Lloyd-Max
    # scalars 0.117.
    code = get_code("toy", 10)
    search = encoder(code)
    data = np.random.default_rng(3).standard_normal((64, 256), dtype=np.float32)
    scale = np.float32(search.tables.std() * TOY.target_std)
    words, labels = search.encode(data * scale, np.ones_like(data))
    decoded = reference_decode(torch.from_numpy(words.view(np.int32)).view(1, 64, -1), code, 256)
    assert np.array_equal(decoded.view(64, 256).numpy(), labels)
    assert 0.0625 < float(np.square(data - labels / scale).mean()) < 0.1


def test_a_checkpoint_of_it(
    micro_source: Path, micro_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.CODE_OF_BITS, 2, "toy")
    target = tmp_path / "q"
    erniequant.quantize(micro_source, target, bits=2, calib=str(micro_text), **CALIBRATION)
    layers = json.loads((target / "config.json").read_text())["quantization_config"]["layers"]
    assert {matrix["code"] for layer in layers.values() for matrix in layer.values()} == {"toy"}
    assert erniequant.verify(target).ok
    model, _ = erniequant.load(target, device="cpu")
    erniequant.export(target, tmp_path / "plain")
    plain, _ = erniequant.load(tmp_path / "plain", device="cpu")
    ids = torch.arange(7)[None]
    torch.testing.assert_close(
        model(ids).logits.float(), plain(ids).logits.float(), atol=0.05, rtol=0.05
    )
    monkeypatch.delitem(registry.CODES, "toy")
    with pytest.raises(ErnieQuantError, match="unknown code 'toy'"):
        erniequant.load(target, device="cpu")
