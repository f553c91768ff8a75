"""Products with packed weights of each code on one core of a CPU, timed in turns."""

import statistics
import time
from collections.abc import Iterator

import torch

from erniequant.codes import ConvolutionalCode, get_code
from erniequant.packing.decoding import encode_scale
from erniequant_kernels.cpu.linear import packed_linear_cpu
from erniequant_kernels.matrices import PackedMatrices

OUTPUTS, INPUTS, TILE, ROTATION_BLOCK = 3072, 2560, 256, 128
"""Gate and up of an expert of the 21B."""
CODES = (("cc2", 12), ("cc2s", 12), ("cc2s", 16), ("cc3", 13), ("cc4", 13))
ROUNDS = {1: 200, 4: 100, 16: 50, 256: 9}
"""By number of tokens."""


def random_matrix(code: ConvolutionalCode) -> PackedMatrices:
    """One matrix of random words: any words decode."""
    words = INPUTS * code.words_per_sequence(TILE)
    packed = torch.randint(-(2**31), 2**31, (1, OUTPUTS // TILE, words), dtype=torch.int32)
    scale = encode_scale(torch.full((1, OUTPUTS, 1), 0.02))
    signs = torch.zeros(INPUTS // 32, dtype=torch.int32)
    return PackedMatrices(packed, scale, signs, code, TILE, ROTATION_BLOCK)


def times(tokens: int) -> dict[str, list[float]]:
    """Seconds of this thread's time for one product, by code, one entry a round."""
    matrices = {f"{name}, L = {length}": random_matrix(get_code(name, length))
                for name, length in CODES}  # fmt: skip
    x = torch.randn(tokens, INPUTS).bfloat16()
    found: dict[str, list[float]] = {name: [] for name in matrices}
    for turn in range(ROUNDS[tokens] + 1):
        for name, matrix in matrices.items():
            started = time.thread_time()
            packed_linear_cpu(x, matrix)
            if turn:  # the first compiles
                found[name].append(time.thread_time() - started)
    return found


def product_rows() -> Iterator[str]:
    """Rows of milliseconds by number of tokens, and of ratios to cc2, medians over rounds."""
    torch.set_num_threads(1)
    for i, tokens in enumerate(ROUNDS):
        found = times(tokens)
        base, *others = found.values()
        if i == 0:
            yield "| tokens | " + " | ".join(found) + " |"
            yield "|---|" + "---|" * len(found)
        cells = [f"{1e3 * statistics.median(base):.2f}"]
        for other in others:
            ratios = [a / b for a, b in zip(other, base, strict=True)]
            cells.append(
                f"{1e3 * statistics.median(other):.2f} ({statistics.median(ratios):.1f} ×)"
            )
        yield f"| {tokens} | {' | '.join(cells)} |"
