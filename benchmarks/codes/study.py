"""Measure codes on Gaussian data; makes the tables of docs/codes.md.

``python -m benchmarks.codes.study table`` measures the registered codes, ``labels`` compares label
functions, ``weighted`` shows the gain from weights of the outputs, ``search`` repeats the search
that chose the multipliers of the registry.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.codes.candidates import CANDIDATES
from erniequant.codes.registry import CODE_NAMES, CODE_OF_BITS, CODES, get_code
from erniequant.codes.spec import ConvolutionalCode
from erniequant.codes.viterbi import encoder

TILE = 256
REGISTER_LENGTHS = tuple(range(8, 17))
RATE_DISTORTION_BOUND = {bits: 4.0**-bits for bits in (2, 3, 4)}


@dataclass(frozen=True)
class Measurement:
    """Mean squared error on N(0, 1) with the half width of its 95 % interval; weights encoded per
    second of a core's time."""

    mse: float
    half_width: float
    rate: float


def measure(code: ConvolutionalCode, sequences: int, seed: int, tile: int = TILE) -> Measurement:
    """Encode Gaussian sequences at the standard scale and refit one scale for all of them."""
    data = np.random.default_rng(seed).standard_normal((sequences, tile), dtype=np.float32)
    search = encoder(code)
    # Candidates are measured as the code that is chosen at their width.
    row = CODES.get(code.name) or CODES[CODE_OF_BITS[code.bits]]
    scale = np.float32(search.tables.std() * row.target_std)
    weights = np.ones_like(data)
    search.encode(data[:1] * scale, weights[:1])
    started = time.thread_time()  # of this thread alone: the core may have other work
    _, labels = search.encode(data * scale, weights)
    seconds = time.thread_time() - started
    fitted = labels * np.float32((data * labels).sum() / np.square(labels).sum())
    errors = np.square(data - fitted).mean(1)
    half_width = 1.96 * errors.std(ddof=1) / sequences**0.5
    return Measurement(float(errors.mean()), float(half_width), data.size / seconds)


def sequences_for(register_length: int) -> int:
    """Number of sequences that keeps a measurement to seconds: fewer for long registers."""
    return max(2000 >> max(register_length - 10, 0), 48)


def table_rows() -> Iterator[str]:
    """Rows of the markdown table: one per register length, error and rate of each code."""
    yield "| L | " + " | ".join(f"{name} MSE | {name} weights/s" for name in CODE_NAMES) + " |"
    yield "|---|" + "---|---|" * len(CODE_NAMES)
    for length in REGISTER_LENGTHS:
        cells = []
        for name in CODE_NAMES:
            measured = measure(get_code(name, length), sequences_for(length), seed=20)
            digits = 4 if measured.mse > 0.01 else 5
            cells.append(
                f"{measured.mse:.{digits}f} ± {measured.half_width:.{digits}f} "
                f"| {measured.rate:,.0f}"
            )
        yield f"| {length} | " + " | ".join(cells) + " |"
    bounds = " | ".join(f"{RATE_DISTORTION_BOUND[CODES[n].bits]:.4f} | " for n in CODE_NAMES)
    yield f"| bound | {bounds}|"


def label_rows(length: int = 12, multipliers: int = 12) -> Iterator[str]:
    """Rows comparing label functions: error of the best and the mean of some random multipliers."""
    yield "| bits | label | MSE, best | mean | issue slots per weight, sm_90 |"
    yield "|---|---|---|---|---|"
    rng = np.random.default_rng(9)
    field = [int(m) | 1 for m in rng.integers(2**30, 2**32, multipliers)]
    for bits, candidates in CANDIDATES.items():
        for candidate in candidates:
            tries = field if candidate.hashed else field[:1]
            errors = [measure(candidate.code(bits, length, m), 200, seed=21).mse for m in tries]
            cost = candidate.issue_cost.get(bits)
            digits = 4 if bits == 2 else 5
            yield (
                f"| {bits} | {candidate.name} | {min(errors):.{digits}f} | "
                f"{sum(errors) / len(errors):.{digits}f} | {f'{cost:.2f}' if cost else ''} |"
            )


def weighted_rows(length: int = 12, sequences: int = 400) -> Iterator[str]:
    """Rows showing the weighted error of cc2 by the spread of the weights, and the ideal."""
    yield "| spread of log weights | ignored | used by the search | ideal |"
    yield "|---|---|---|---|"
    code = get_code("cc2", length)
    search = encoder(code)
    scale = np.float32(search.tables.std() * CODES[code.name].target_std)
    rng = np.random.default_rng(22)
    data = rng.standard_normal((sequences, TILE), dtype=np.float32)
    even: float | None = None
    for spread in (0.0, 0.3, 0.6, 1.0):
        weights = np.exp(spread * rng.standard_normal(data.shape)).astype(np.float32)
        errors = []
        for used in (np.ones_like(weights), weights):
            _, labels = search.encode(data * scale, used)
            errors.append(float((weights * np.square(data - labels / scale)).sum() / weights.sum()))
        even = even or errors[0]
        ideal = even * float(np.exp(np.log(weights).mean()) / weights.mean())
        yield f"| {spread} | {errors[0]:.4f} | {errors[1]:.4f} | {ideal:.4f} |"


def search_multiplier(
    name: str, length: int, candidates: int, seed: int
) -> tuple[int, Measurement]:
    """Try random odd multipliers on little data, and the best of them on more, fresh data; returns
    the winner and its error."""
    code = get_code(name, length)
    rng = np.random.default_rng(seed)
    field = [int(m) | 1 for m in rng.integers(2**30, 2**32, candidates)]
    few = max(sequences_for(length) // 24, 6)
    for stage, (keep, sequences) in enumerate(
        ((candidates // 12, few), (3, few * 6), (1, few * 24))
    ):
        ranked = sorted(
            field,
            key=lambda m: measure(replace(code, multiplier=m), sequences, seed=1000 + stage).mse,
        )
        field = ranked[: max(keep, 1)]
    winner = field[0]
    return winner, measure(replace(code, multiplier=winner), few * 24, seed=2000)


def main() -> None:
    """Command line of the study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["table", "labels", "weighted", "search"])
    parser.add_argument("--candidates", type=int, default=600)
    parser.add_argument("--lengths", type=int, nargs="*", default=list(REGISTER_LENGTHS))
    parser.add_argument("--codes", nargs="*", default=CODE_NAMES, choices=CODE_NAMES)
    options = parser.parse_args()
    tables = {"table": table_rows, "labels": label_rows, "weighted": weighted_rows}
    if options.what in tables:
        for row in tables[options.what]():
            print(row, flush=True)
        return
    for name in options.codes:
        for length in options.lengths:
            fewer = options.candidates >> max(length - 12, 0)
            multiplier, measured = search_multiplier(name, length, max(fewer, 24), seed=length)
            print(f"{name} L={length} {multiplier:#010x} mse {measured.mse:.5f}", flush=True)


if __name__ == "__main__":
    main()
