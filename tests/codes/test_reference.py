"""The reference decoder against the bit stream read one bit at a time, and labels against their
closed form."""

import struct

import numpy as np
import pytest
import torch

from erniequant.codes import CODE_NAMES, get_code
from erniequant.codes.reference import decode, registers
from erniequant.errors import ErnieQuantError


def bits_of(words: np.ndarray) -> str:
    return "".join(f"{int(word) & 0xFFFFFFFF:032b}" for word in words)


@pytest.mark.parametrize("name", CODE_NAMES)
# 13 is odd and no multiple of any step; 16 spans two words at every seam.
@pytest.mark.parametrize("length", [8, 13, 16])
def test_registers_are_the_last_bits_of_the_cyclic_stream(name: str, length: int) -> None:
    code = get_code(name, length)
    words = np.random.default_rng(1).integers(-(2**31), 2**31, 3 * code.bits, dtype=np.int32)
    stream = bits_of(words)
    expected = [
        int((stream + stream)[len(stream) + end - length : len(stream) + end], 2)
        if end < length
        else int(stream[end - length : end], 2)
        for end in range(code.step_bits, len(stream) + 1, code.step_bits)
    ]
    assert registers(torch.from_numpy(words), code).tolist() == expected


def bfloat16(pattern: int) -> float:
    return struct.unpack(">f", struct.pack(">I", pattern << 16))[0]


@pytest.mark.parametrize("name", CODE_NAMES)
def test_labels_by_hand(name: str) -> None:
    code = get_code(name, 16)
    table = code.table()
    for register in (0, 1, 0x8000, 0xFFFF, 0x1234):
        product = register * code.multiplier % 2**32
        masked = (product & 0x81F081F0) ^ 0x3F003F00
        low, high = bfloat16(masked & 0xFFFF), bfloat16(masked >> 16)
        expected = [low, high] if name == "cc2" else [low + high]
        assert table[register].tolist() == expected


@pytest.mark.parametrize("name", CODE_NAMES)
@pytest.mark.parametrize("length", [10, 12, 16])
def test_labels_are_bfloat16_values(name: str, length: int) -> None:
    table = torch.from_numpy(get_code(name, length).table())
    assert torch.equal(table.bfloat16().float(), table)


def test_layout_of_a_packed_matrix() -> None:
    # Two tiles of 32 outputs, 5 inputs: sequence (tile i, row k) fills outputs 32 i .. 32 i + 31
    # of input k.
    code = get_code("cc3", 10)
    packed = torch.randint(-(2**31), 2**31 - 1, (2, 5 * 3), dtype=torch.int32)
    whole = decode(packed, code, 32)
    assert whole.shape == (64, 5)
    for tile in range(2):
        for k in range(5):
            one = decode(packed[tile : tile + 1, 3 * k : 3 * k + 3], code, 32)
            assert torch.equal(whole[32 * tile : 32 * tile + 32, k], one[:, 0])


def test_unknown_codes_are_named() -> None:
    with pytest.raises(ErnieQuantError, match="'cc5'.*cc2, cc2s, cc3, cc4"):
        get_code("cc5", 12)
    with pytest.raises(ErnieQuantError, match="cc2 has no register length 17"):
        get_code("cc2", 17)
