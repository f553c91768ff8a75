"""The decoders against vectors, and against plain Python that reads the format description."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from erniequant.ccq import decode_wint2, decode_wint25, decode_wint275
from erniequant.codes.ccq.decode import wint2_words
from erniequant.errors import ErnieQuantError

VECTORS = load_file(Path(__file__).with_name("ccq_vectors.safetensors"))
WINT2_TENSORS = ("quant_weight", "weight_scale", "super_scales", "code_scale", "code_zp")


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal with the sign of zero."""
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("k_order", ["plain", "mma64"])
@pytest.mark.parametrize("book", ["affine", "generator"])
def test_vectors_wint2(book: str, k_order: str) -> None:
    tensors = {name: VECTORS[f"wint2_{book}.{name}"] for name in WINT2_TENSORS}
    expected = VECTORS[f"wint2_{book}.expected_{k_order}"]
    assert_same_bits(decode_wint2(**tensors, k_order=k_order), expected)
    served = decode_wint2(**tensors, k_order=k_order, rounding="served")
    assert torch.equal(served.bfloat16().float(), served)
    # Scale and weight each round by up to 2^-8.
    assert ((served - expected).abs() <= expected.abs() * 2**-6.9).all()


@pytest.mark.parametrize("name", ["wint25", "wint275"])
def test_vectors_wint25_and_wint275(name: str) -> None:
    decode = {"wint25": decode_wint25, "wint275": decode_wint275}[name]
    weight, scales = VECTORS[f"{name}.quant_weight"], VECTORS[f"{name}.super_scales"]
    assert_same_bits(decode(weight, scales), VECTORS[f"{name}.expected"])
    if name == "wint25":
        assert_same_bits(decode(weight.view(torch.uint16), scales), VECTORS[f"{name}.expected"])


def random_wint2(experts: tuple[int, ...], rows: int, outputs: int, book: str) -> dict[str, Any]:
    """Random tensors: every byte is possible, a fifth of the nibbles is zero."""
    rng = np.random.default_rng(len(experts) + rows)
    shape = (*experts, outputs)
    nibbles = rng.integers(0, 16, (*experts, rows // 64, outputs)) * (
        rng.random((*experts, rows // 64, outputs)) > 0.2
    )
    scale = rng.integers(0, 256, (*experts, rows // 4, outputs))
    affine = rng.uniform(-140, 140, shape), rng.uniform(-3000, 3000, shape)
    fine = np.round(affine[0] * 256) / 256, np.round(affine[1] * 256) / 256
    generator = rng.integers(0, 32768, shape), rng.integers(0, 32768, shape)
    code_scale, code_zp = {"affine": affine, "fine": fine, "generator": generator}[book]
    return {
        "quant_weight": torch.from_numpy(scale.astype(np.uint8)),
        "weight_scale": torch.from_numpy(
            (nibbles[..., 0::2, :] * 16 + nibbles[..., 1::2, :]).astype(np.uint8)
        ),
        "super_scales": torch.from_numpy(rng.standard_normal(shape)).bfloat16(),
        "code_scale": torch.from_numpy(np.asarray(code_scale, np.float32)),
        "code_zp": torch.from_numpy(np.asarray(code_zp, np.float32)),
    }


def plain_wint2(tensors: dict[str, Any], k_order: str) -> np.ndarray:
    """One matrix, weight by weight, in Python integers and numpy's float32 scalars."""
    t = {
        name: tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
        for name, tensor in tensors.items()
    }
    quarter, outputs = t["quant_weight"].shape
    weight = np.zeros((4 * quarter, outputs), np.float32)
    for n in range(outputs):
        scale, zero, unit = (t[x][n] for x in ("code_scale", "code_zp", "super_scales"))
        for r in range(quarter):
            value = np.float32(np.float32(t["quant_weight"][r, n]) * scale)
            value = np.float32(np.float32(value + zero) + np.float32(0.5))
            word = math.floor(float(value)) % 2**15
            for i in range(4):
                position = 4 * r + i
                group, p = divmod(position, 64)
                k = p
                if k_order == "mma64":
                    a, b, c = p // 16, p % 16 // 2, p % 2
                    k = 8 * b + 2 * a + c
                both = int(t["weight_scale"][group // 2, n])
                nibble = both // 16 if group % 2 == 0 else both % 16
                label = np.float32(word // 8 ** (3 - i) % 64 - 32)
                weight[64 * group + k, n] = label * np.float32(np.float32(nibble) * unit)
    return weight


@pytest.mark.parametrize("k_order", ["plain", "mma64"])
@pytest.mark.parametrize("book", ["affine", "fine", "generator"])
def test_wint2_by_hand(book: str, k_order: str) -> None:
    tensors = random_wint2((), 384, 20, book)
    largest = 255 * tensors["code_scale"] + tensors["code_zp"]
    if book == "generator":
        assert (largest > 32767).any()
    else:
        # Negative words, and words that truncation would get wrong.
        assert (largest < -1).any() and (tensors["code_zp"] < 0).any()
    expected = torch.from_numpy(plain_wint2(tensors, k_order))
    assert (expected == 0).any()
    assert_same_bits(decode_wint2(**tensors, k_order=k_order), expected)


@pytest.mark.parametrize("experts", [(3,), (2, 3)])
def test_leading_axes_are_experts(experts: tuple[int, ...]) -> None:
    tensors = random_wint2(experts, 128, 8, "affine")
    found = decode_wint2(**tensors, k_order="mma64")
    assert found.shape == (*experts, 128, 8)
    for index in np.ndindex(experts):
        one = {name: tensor[index] for name, tensor in tensors.items()}
        assert_same_bits(found[index], torch.from_numpy(plain_wint2(one, "mma64")))


def test_the_high_nibble_belongs_to_the_even_group() -> None:
    tensors = random_wint2((), 128, 4, "generator")
    tensors["weight_scale"] = torch.tensor([[0xF0, 0x0F, 0x00, 0x12]], dtype=torch.uint8)
    tensors["super_scales"] = torch.ones(4, dtype=torch.bfloat16)
    found = decode_wint2(**tensors)
    assert not found[64:, 0].any() and found[:64, 0].any()
    assert not found[:64, 1].any() and found[64:, 1].any()
    assert not found[:, 2].any()
    assert (found[64:, 3] % 2 == 0).all() and (found[:64, 3] % 2 != 0).any()


def words_of_all_bytes(code_scale: float, code_zp: float, fused: bool) -> list[int]:
    everything = torch.arange(256, dtype=torch.uint8)[:, None]
    scale, zero = torch.tensor([code_scale]), torch.tensor([code_zp])
    return wint2_words(everything, scale, zero, fused=fused)[:, 0].tolist()


def test_words_round_half_up_and_floor() -> None:
    assert words_of_all_bytes(0.5, -2.0, False)[:8] == [-2, -1, -1, 0, 0, 1, 1, 2]
    assert words_of_all_bytes(-1.25, 0.0, False)[:5] == [0, -1, -2, -4, -5]


def test_words_saturate() -> None:
    assert words_of_all_bytes(1e30, 0.0, False)[1] == 2**31 - 1
    assert words_of_all_bytes(-1e30, 0.0, False)[1] == -(2**31)


@pytest.mark.parametrize("fused", [False, True])
def test_words_of_random_parameters_in_exact_arithmetic(fused: bool) -> None:
    from fractions import Fraction

    def rounded(value: Fraction) -> Fraction:
        """To the nearest float32, ties to even, for ordinary magnitudes."""
        if value == 0:
            return value
        exponent = 0
        while abs(value) >= Fraction(2) ** (24 + exponent):
            exponent += 1
        while abs(value) < Fraction(2) ** (23 + exponent):
            exponent -= 1
        return round(value / Fraction(2) ** exponent) * Fraction(2) ** exponent

    rng = np.random.default_rng(2)
    differ = 0
    for _ in range(20):
        scale, zero = np.float32(rng.uniform(90, 130)), np.float32(rng.uniform(0, 50))
        s, z = Fraction(float(scale)), Fraction(float(zero))
        for byte, word in enumerate(words_of_all_bytes(scale, zero, fused)):
            apart = rounded(rounded(rounded(byte * s) + z) + Fraction(1, 2))
            together = rounded(byte * s + rounded(z + Fraction(1, 2)))
            assert word == math.floor(together if fused else apart)
            differ += math.floor(apart) != math.floor(together)
    # The trap is real: the two disagree now and then.
    assert differ > 0


def test_on_a_grid_of_256ths_both_ways_agree() -> None:
    rng = np.random.default_rng(3)
    for _ in range(300):
        scale, zero = np.round(rng.uniform(-130, 130, 2) * 256) / 256
        assert words_of_all_bytes(scale, zero, False) == words_of_all_bytes(scale, zero, True)
        scale, zero = (float(x) for x in rng.integers(0, 32768, 2))
        assert words_of_all_bytes(scale, zero, False) == words_of_all_bytes(scale, zero, True)


def test_fused_multiply_add_breaks_ties_by_what_float64_loses() -> None:
    # The exact sum lies 2^-35 below the tie between two float32 numbers, which float64 cannot see.
    scale = 2.0**23 + 1
    words = words_of_all_bytes(2.0 * scale, -(2.0**-36), fused=True)
    assert words[1] == 2 * (2**23 + 1)


def plain_words(weight: np.ndarray, scales: np.ndarray, name: str) -> np.ndarray:
    """WINT2.5 and WINT2.75 of one matrix, weight by weight."""
    words, shifts, size, scale_bits = {
        "wint25": (10, (13, 11, 9, 6, 4, 2, 0), 8, 13),
        "wint275": (22, (4, 2, 0), 16, 4),
    }[name]
    out = np.zeros((weight.shape[0] // words * 64, weight.shape[1]), np.float32)
    for k in range(out.shape[0]):
        group, position = divmod(k, 64)
        for n in range(out.shape[1]):
            word = int(weight[group * words + position // len(shifts), n])
            last = int(weight[group * words + words - 1, n])
            label = (word >> shifts[position % len(shifts)]) % size - size // 2
            scale = np.float32(last % 2**scale_bits) * scales[n]
            out[k, n] = np.float32(label) * scale
    return out


@pytest.mark.parametrize("name", ["wint25", "wint275"])
def test_wint25_and_wint275_by_hand(name: str) -> None:
    decode, per_group, high = {
        "wint25": (decode_wint25, 10, 2**16), "wint275": (decode_wint275, 22, 2**8),
    }[name]  # fmt: skip
    rng = np.random.default_rng(4)
    weight = rng.integers(0, high, (2, 3 * per_group, 6))
    scales = torch.from_numpy(rng.standard_normal((2, 6))).bfloat16()
    stored = torch.from_numpy(weight.astype(np.uint16 if high > 256 else np.uint8))
    found = decode(stored, scales)
    assert found.shape == (2, 192, 6)
    for e in range(2):
        expected = plain_words(weight[e], scales[e].float().numpy(), name)
        assert_same_bits(found[e], torch.from_numpy(expected))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda t: {"quant_weight": t["quant_weight"].to(torch.int8)},
            "quant_weight must be uint8",
        ),
        (lambda t: {"quant_weight": t["quant_weight"][:-1]}, "K a multiple of 128"),
        (lambda t: {"quant_weight": t["quant_weight"][:, 0]}, "K a multiple of 128"),
        (lambda t: {"weight_scale": t["weight_scale"].float()}, "weight_scale must be uint8"),
        (lambda t: {"weight_scale": t["weight_scale"][:-1]}, r"weight_scale must be \[3, 5\]"),
        (lambda t: {"super_scales": t["super_scales"].float()}, "super_scales must be bfloat16"),
        (lambda t: {"super_scales": t["super_scales"][None]}, r"super_scales must be \[5\]"),
        (lambda t: {"code_scale": t["code_scale"].double()}, "code_scale must be float32"),
        (lambda t: {"code_zp": t["code_zp"][:-1]}, r"code_zp must be \[5\], not \[4\]"),
        (lambda t: {"code_zp": t["code_zp"] * torch.nan}, "must be finite"),
        (lambda t: {"k_order": "mma32"}, "k_order must be plain or mma64, not 'mma32'"),
        (lambda t: {"rounding": "half"}, "rounding must be exact or served"),
    ],
)
def test_wrong_wint2_tensors_are_named(change: Any, reason: str) -> None:
    tensors = random_wint2((), 384, 5, "affine")
    with pytest.raises(ErnieQuantError, match=reason):
        decode_wint2(**{**tensors, **change(tensors)})


def test_wrong_words_are_named() -> None:
    scales = torch.ones(4, dtype=torch.bfloat16)
    with pytest.raises(ErnieQuantError, match="uint16 or int16, not int32"):
        decode_wint25(torch.zeros(10, 4, dtype=torch.int32), scales)
    with pytest.raises(ErnieQuantError, match=r"WINT2.5 quant_weight must be .* not \[12, 4\]"):
        decode_wint25(torch.zeros(12, 4, dtype=torch.int16), scales)
    with pytest.raises(ErnieQuantError, match="must be uint8, not int16"):
        decode_wint275(torch.zeros(22, 4, dtype=torch.int16), scales)
    with pytest.raises(ErnieQuantError, match=r"super_scales must be \[3\]"):
        decode_wint275(torch.zeros(22, 3, dtype=torch.uint8), scales)


def test_the_package_offers_it() -> None:
    import erniequant

    assert erniequant.ccq.decode_wint2 is decode_wint2
