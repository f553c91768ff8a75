"""Reference decoder in plain torch: packed words to labels, the truth every kernel is tested
against."""

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from erniequant.codes.spec import WORD_BITS, ConvolutionalCode


# Not a tensor: one made in inference mode, say, could not take part in training later.
@lru_cache(maxsize=32)
def _labels(code: ConvolutionalCode) -> NDArray[np.float32]:
    return code.table()


_on_device: dict[tuple[ConvolutionalCode, torch.device], torch.Tensor] = {}
"""Label tables on other devices than the CPU: they cannot be copied while a graph is captured."""


def _label_table(code: ConvolutionalCode, device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        return torch.from_numpy(_labels(code))
    table = _on_device.get((code, device))
    if table is None:
        with torch.inference_mode(False):
            table = torch.from_numpy(_labels(code)).to(device)
        if type(table) is torch.Tensor:  # not what stands for one while torch traces
            _on_device[code, device] = table
    return table


def registers(words: torch.Tensor, code: ConvolutionalCode) -> torch.Tensor:
    """Register value after each step of tail-biting sequences.

    Args:
        words: int32 ``[..., tile * bits / 32]``; bit ``i`` of a sequence is bit ``31 - i % 32`` of
            word ``i // 32``.

    Returns:
        int64 ``[..., tile / weights_per_step]``, the newest bit least significant.
    """
    n_bits = words.shape[-1] * WORD_BITS
    n_steps = n_bits // code.step_bits
    unsigned = words.to(torch.int64) & 0xFFFFFFFF
    end = torch.arange(1, n_steps + 1, device=words.device) * code.step_bits
    last = (end - 1) % n_bits // WORD_BITS
    # A register of up to 32 bits ends in word `last` and may begin in the word before it
    # (cyclically).
    joined = (unsigned[..., (last - 1) % words.shape[-1]] << WORD_BITS) | unsigned[..., last]
    shift = (last + 1) * WORD_BITS - end
    return (joined >> shift) & (code.states - 1)


def window_registers(words: torch.Tensor, code: ConvolutionalCode) -> torch.Tensor:
    """Register value at each step of words that are cut into runs.

    Args:
        words: integers ``[...]``; bits above the code's `word_bits` are ignored.

    Returns:
        the type of ``words``, ``[..., sum(code.runs)]``.
    """
    shifts = torch.tensor(code.window_shifts, dtype=words.dtype, device=words.device)
    return (words[..., None] >> shifts) & (code.states - 1)


def decode_words(words: torch.Tensor, code: ConvolutionalCode) -> torch.Tensor:
    """Labels of words that are cut into runs: integers ``[...]`` to float32
    ``[..., sum(code.runs)]``, for codes of one weight a step."""
    table = _label_table(code, words.device)[:, 0]
    return table[window_registers(words, code).long()]


def decode(packed: torch.Tensor, code: ConvolutionalCode, tile: int) -> torch.Tensor:
    """Labels of a packed matrix, before scale and rotation.

    Args:
        packed: int32 ``[..., outputs / tile, inputs * words]`` with ``words = tile * bits / 32``:
            for each tile of outputs, one sequence per input row.

    Returns:
        float32 ``[..., outputs, inputs]``.
    """
    words = packed.unflatten(-1, (-1, code.words_per_sequence(tile)))
    table = _label_table(code, packed.device)
    labels = table[registers(words, code)].flatten(-2)
    return labels.transpose(-1, -2).flatten(-3, -2)
