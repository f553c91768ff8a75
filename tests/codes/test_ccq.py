"""CCQ's codes as members of the family: words and windows by definition."""

import pytest
import torch

from erniequant.codes import ConvolutionalCode
from erniequant.codes.ccq.codes import WINT2, WINT25, WINT275
from erniequant.codes.reference import decode_words


@pytest.mark.parametrize(
    ("code", "word_bits", "shifts"),
    [(WINT2, 15, (9, 6, 3, 0)), (WINT25, 16, (13, 11, 9, 6, 4, 2, 0)), (WINT275, 8, (4, 2, 0))],
)
def test_windows_follow_from_register_and_step(
    code: ConvolutionalCode, word_bits: int, shifts: tuple[int, ...]
) -> None:
    assert code.word_bits == word_bits
    assert code.window_shifts == shifts


@pytest.mark.parametrize("code", [WINT2, WINT25, WINT275])
def test_labels_are_registers_shifted_bit_by_bit(code: ConvolutionalCode) -> None:
    words = torch.randint(0, 1 << code.word_bits, (50,), generator=torch.Generator().manual_seed(1))
    expected = []
    for word in words.tolist():
        stream = [(word >> i) & 1 for i in reversed(range(code.word_bits))]
        for steps in code.runs:
            register = 0
            for step in range(steps):
                taken = code.register_length if step == 0 else code.step_bits
                for _ in range(taken):
                    register = (register << 1 | stream.pop(0)) % code.states
                expected.append(float(register - code.states // 2))
        assert not stream
    assert decode_words(words, code).flatten().tolist() == expected


def test_native_codes_have_no_words() -> None:
    from erniequant.codes import REGISTERED, get_code

    assert all(get_code(*name).runs == () for name in REGISTERED)
    assert get_code("cc2", 12).word_bits == 0
