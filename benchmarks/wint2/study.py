"""Measure the WINT2 encoder on Gaussian data, and search the code books that it uses.

``python -m benchmarks.wint2.study search`` repeats the search of
`erniequant.formats.fastdeploy.ccq.books` (ten minutes on one core); ``python -m
benchmarks.wint2.page`` makes the tables of docs/ccq.md.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from erniequant.formats.fastdeploy.ccq.books import BOOKS, UNIFORM_BOOK, Book, is_exact
from erniequant.formats.fastdeploy.ccq.candidates import STEPS_PER_SCALE, Plan, race
from erniequant.formats.fastdeploy.ccq.encode import Settings, encode_matrix
from erniequant.formats.fastdeploy.ccq.factor import factorise_blocks

Array = NDArray[Any]


@dataclass(frozen=True)
class Measurement:
    """Mean squared error over the variance of N(0, 1) columns, with the half width of its 95 %
    interval, and weights encoded per second of one core."""

    mse: float
    half_width: float
    rate: float


def measure(settings: Settings, inputs: int, outputs: int, seed: int = 20) -> Measurement:
    """Encode a Gaussian matrix ``[outputs, inputs]`` for inputs that are alike and independent."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    moments = torch.eye(inputs)
    encode_matrix(weight[:8, :128], moments[:128, :128], settings=settings)
    started = time.process_time()
    encoded = encode_matrix(weight, moments, settings=settings)
    seconds = time.process_time() - started
    # Over the energy that was drawn, which is 1 but for noise.
    errors = (encoded.effective - weight).square().sum(1) / weight.square().sum(1).mean()
    half = 1.96 * float(errors.std()) / outputs**0.5
    return Measurement(float(errors.mean()), half, weight.numel() / seconds)


VARIANTS = {
    "published map (one uniform book)": Settings(books=(UNIFORM_BOOK,)),
    "one generator": Settings(books=BOOKS[:1]),
    "best of 4": Settings(books=BOOKS[:4]),
    "best of 12": Settings(books=BOOKS[:12]),
    f"best of {len(BOOKS)} (the encoder)": Settings(),
}
"""Encoders by their names in docs/ccq.md."""


# The search: strides first, since offsets hardly change how good a stride is.

_FRACTIONS = ((64, 4096, 16), (4096, 8192, 8), (8192, 16385, 4))
"""First stride, last stride, and strides per unit: as fine as float32 holds 256 steps."""


@numba.njit(boundscheck=False, fastmath={"contract", "reassoc", "nnan", "ninf"})
def _errors(data: Array, stride: Array, offset: Array, scale: float) -> Array:
    """Mean squared error of each book, its stride in 16ths, on vectors ``[n, 4]`` times
    ``scale``."""
    errors = np.empty(stride.shape[0], np.float32)
    v = np.empty((4, 256), np.float32)
    half = np.empty(256, np.float32)
    for i in range(stride.shape[0]):
        for c in range(256):
            word = (c * stride[i] // 16 + offset[i]) & 32767
            for j in range(4):
                v[j, c] = ((word >> (9 - 3 * j)) & 63) - 32
            half[c] = 0.5 * (v[0, c] ** 2 + v[1, c] ** 2 + v[2, c] ** 2 + v[3, c] ** 2)
        total = 0.0
        for n in range(data.shape[0]):
            x0, x1, x2, x3 = (
                np.float32(data[n, 0] * scale),
                np.float32(data[n, 1] * scale),
                np.float32(data[n, 2] * scale),
                np.float32(data[n, 3] * scale),
            )
            best = np.float32(1e30)
            for c in range(256):
                best = min(
                    best, half[c] - x0 * v[0, c] - x1 * v[1, c] - x2 * v[2, c] - x3 * v[3, c]
                )
            total += x0 * x0 + x1 * x1 + x2 * x2 + x3 * x3 + 2 * best
        errors[i] = total / (4 * data.shape[0] * scale * scale)
    return errors


def _tried(stride: Array, offset: Array, vectors: int, scales: Sequence[float], seed: int) -> Array:
    data = np.random.default_rng(seed).standard_normal((vectors, 4), dtype=np.float32)
    return np.min([_errors(data, stride, offset, scale) for scale in scales], axis=0)


def good_books(keep: int, seed: int = 5) -> list[Book]:
    """Books with little error on Gaussian vectors of one scale, best first, without near copies."""
    rng = np.random.default_rng(seed)
    strides = np.concatenate(
        [np.arange(low * 16, high * 16, 16 // per) for low, high, per in _FRACTIONS]
    )
    few = 12
    stride, offset = np.repeat(strides, few), rng.integers(0, 32768, strides.size * few)
    error = np.sort(_tried(stride, offset, 200, (16.5,), 21).reshape(-1, few), axis=1)
    strides = strides[error[:, :3].mean(1).argsort()[:500]]
    offsets = np.arange(rng.integers(48), 32768, 48)
    stride, offset = np.repeat(strides, offsets.size), np.tile(offsets, strides.size)
    for vectors, scales, left in ((300, (16.5,), 12000), (2000, (15.5, 17.0), 1500)):
        best = _tried(stride, offset, vectors, scales, vectors).argsort()[:left]
        stride, offset = stride[best], offset[best]
    best = _tried(stride, offset, 8000, (16.0, 17.0), 8000).argsort()
    books: list[Book] = []
    for s, o in zip((stride[best] / 16).tolist(), offset[best].tolist(), strict=True):
        near = any(abs(s - t) < 1 and abs(o - p) % 32748 < 20 for t, p in books)
        if not near and is_exact((s, o)):
            books.append((s, o))
    return books[:keep]


def search_books(keep: int, seed: int = 3) -> list[Book]:
    """Books chosen one by one, each the one that most lowers the error of channels that take their
    best; the present books are candidates as well."""
    candidates = tuple(dict.fromkeys((*good_books(200), *BOOKS)))
    inputs, outputs = 1024, 96
    torch.manual_seed(seed)
    mix = torch.randn(inputs // 4, 12, 4) * torch.randn(inputs // 4, 1, 4).mul(0.5).exp()
    uneven = torch.block_diag(*(mix.mT @ mix / 12))
    gauss = torch.randn(2, outputs, inputs)
    laplace = torch.distributions.Laplace(0.0, 0.7).sample((outputs, inputs))
    cases = (
        (gauss[0], torch.eye(inputs)),
        (gauss[1], uneven),
        (laplace, uneven),
    )
    losses = []
    for weight, moments in cases:
        factor = factorise_blocks(moments)
        energy = ((weight @ moments) * weight).sum(1).double()
        unit = weight.square().mean(1).sqrt() * STEPS_PER_SCALE / 12
        of_case = [
            race(Plan.of(factor, (book,)), weight, unit, torch.zeros_like(weight), 5).loss / energy
            for book in candidates
        ]
        losses.append(torch.stack(of_case) / torch.stack(of_case).mean())
    # Gaussian data counts twice.
    relative = torch.cat([losses[0], losses[0], *losses[1:]], dim=1)
    chosen: list[Book] = []
    least = torch.full((relative.shape[1],), torch.inf, dtype=torch.float64)
    for _ in range(keep):
        best = int(torch.minimum(relative, least).mean(1).argmin())
        least = torch.minimum(least, relative[best])
        chosen.append(candidates[best])
    return chosen


def main() -> None:
    """Command line of the study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["search"])
    parser.add_argument("--keep", type=int, default=48)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for stride, offset in search_books(options.keep):
        print(f"    ({stride!r}, {offset}),", flush=True)


if __name__ == "__main__":
    main()
