"""Code books of the WINT2 encoder: uses of the affine map from a byte to a word.

WINT2 stores two numbers per output channel and makes the word of a byte as ``byte * code_scale +
code_zp``. The published recipe spreads the 256 words evenly over the 32768 that there are, which
fixes little more than the first of the four weights. But registers are windows of the word's low
15 bits, so the map may as well be a multiplicative generator that goes round many times: 256 words
that fill the space of four weights. Same file, same decoder.
"""

from fractions import Fraction
from functools import lru_cache
from math import floor

import numpy as np
import torch
from numpy.typing import NDArray

from erniequant.codes.ccq.codes import WINT2
from erniequant.codes.ccq.decode import wint2_words
from erniequant.codes.reference import decode_words

Book = tuple[float, int]
"""``code_scale`` and ``code_zp``, with `is_exact`."""

# Candidates are the 200 least errors on Gaussian vectors, out of 130,000 strides with twelve
# offsets each and then the best 500 with all offsets, and 24 from a search among integers. Of
# these, one by one, the book was taken that most lowers the error when every channel of 1024 takes
# its best: Gaussian with even and with uneven metrics, and Laplace (`benchmarks.wint2.study`). So
# any first few are a good set.
BOOKS: tuple[Book, ...] = (
    (639.5, 25725),
    (120.9375, 861),
    (241.9375, 2829),
    (120.9375, 813),
    (209, 6144),
    (4079.0625, 2445),
    (28657, 4010),
    (209, 6264),
    (4079.0625, 6045),
    (639.5, 17805),
    (120.9375, 1581),
    (4079.0625, 31005),
    (209, 6000),
    (1525.125, 32637),
    (209, 5352),
    (1087.75, 13437),
    (12303, 28872),
    (15363.75, 12333),
    (120.9375, 1053),
    (209, 6048),
    (1919.5, 4989),
    (1375.625, 6237),
    (120.9375, 525),
    (241.9375, 1101),
    (639.5, 1005),
    (4079.0625, 10125),
    (120.9375, 5997),
    (3122.8125, 6813),
    (639.5, 26301),
    (639.5, 5373),
    (2561.875, 3597),
    (19951, 14211),
)

UNIFORM_BOOK: Book = (32767 / 255, 0)
"""The published map, from the smallest to the largest word evenly: for comparison."""


@lru_cache(maxsize=4)
def book_labels(books: tuple[Book, ...] = BOOKS) -> NDArray[np.float32]:
    """The four weights of every byte, before scales: float32 ``[books, 4, 256]``."""
    everything = torch.arange(256, dtype=torch.uint8)[:, None].expand(-1, len(books))
    scale, zero = torch.tensor(books, dtype=torch.float32).T
    words = wint2_words(everything, scale, zero, fused=False)
    return np.ascontiguousarray(decode_words(words, WINT2).permute(1, 2, 0).numpy())


def is_exact(book: Book) -> bool:
    """True if no byte's word depends on rounding: float32 step by step, a fused multiply-add and
    exact arithmetic agree, and no word is negative."""
    stride, offset = Fraction(book[0]), Fraction(book[1])
    everything = torch.arange(256, dtype=torch.uint8)[:, None]
    scale, zero = torch.tensor([[book[0]], [book[1]]], dtype=torch.float32)
    true = [floor(byte * stride + offset + Fraction(1, 2)) for byte in range(256)]
    return min(true) >= 0 and all(
        wint2_words(everything, scale, zero, fused=fused)[:, 0].tolist() == true
        for fused in (False, True)
    )
