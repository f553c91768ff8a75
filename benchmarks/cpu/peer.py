"""Compare packed experts on the CPU with the products of llama.cpp and ik_llama.cpp.

``pip install ik-llama-cpp-python`` somewhere, for example into an environment of its own, and run
from the repository root: ``python -m benchmarks.cpu.peer LIBGGML --json peer.json``, where LIBGGML
is the wheel's libggml.so. All methods have a turn in every round. Each call multiplies all tokens
with the same few experts: ours computes the whole layer, with rotation, SwiGLU and sum; the peers'
calls are their matrix products only.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.codes.study import measure as measure_code
from benchmarks.cpu.ggml import Ggml, Products
from erniequant.codes import code_for_bits, register_length
from erniequant.timing import Spread, quartiles, turn_ratios
from erniequant_kernels.bench.cpu.machine import (
    cores,
    machine,
    others_seconds,
    pinned,
    wall_clock,
)
from erniequant_kernels.bench.cpu.methods import HELD_BYTES, CpuMethod, dense, packed, turned
from erniequant_kernels.bench.cpu.run import Round, quiet
from erniequant_kernels.bench.problem import SHAPES, Batch, Shape
from erniequant_kernels.bench.rounds import order

KINDS = ("iq2_xxs", "q2_K", "iq2_kt", "q4_K", "iq4_kt")
TOKENS = (1, 4, 16)
ROUNDS = 60
PAUSE_SECONDS = 0.01
"""Between methods: threads of one wait awake for a while and would cost the next one time."""

SEQUENCES = 300
ERROR_ROWS = 64


@dataclass(frozen=True)
class Competitor:
    """One method: ``run`` takes the number of the call.

    Attributes:
        bits: per weight, scales counted.
        error: relative mean squared error of Gaussian weights; 0 for bfloat16.
    """

    name: str
    bits: float
    error: float
    run: Callable[[int], object]


@dataclass(frozen=True)
class PeerRow:
    """A competitor on one batch.

    Attributes:
        microseconds: median of a call.
        products_per_second: weights multiplied with a token, in billions.
        ratios: how many times as fast ours are, by name: lower quartile, median, upper quartile.
        rounds: that count: those without other work on the machine, if there are enough.
        other_cores: cores that other processes used meanwhile.
    """

    shape: str
    tokens: int
    name: str
    bits: float
    error: float
    microseconds: float
    products_per_second: float
    ratios: dict[str, tuple[float, float, float]]
    rounds: int
    other_cores: float


def ours(shape: Shape, batch: Batch, method: CpuMethod, error: float) -> Competitor:
    """A method of `bench kernels` on the next experts in every call."""

    def run(call: int) -> torch.Tensor:
        return method.run(turned(batch, call * shape.top_k, method.experts))

    bits = 8 * method.expert_bytes / shape.weights_per_expert
    return Competitor(method.name, bits, error, run)


def peer(ggml: Ggml, kind: str, shape: Shape, tokens: int, threads: int) -> Competitor:
    """Matrix products of one of the library's types, checked."""
    sizes = [(2 * shape.inner, shape.hidden), (shape.hidden, shape.inner)] * shape.top_k
    weights = shape.top_k * shape.weights_per_expert
    call_bytes = sum(outputs * ggml.row_bytes(kind, inputs) for outputs, inputs in sizes)
    copies = math.ceil(HELD_BYTES / call_bytes)
    products = Products(ggml, kind, sizes, copies, tokens, threads)
    products.run(0)
    inputs = shape.hidden
    rows = ggml.dequantised(kind, products.rows[inputs], inputs)
    found = products.result(0, 0)[:, : len(rows)]
    # The library rounds inputs to 8 bits.
    deviation = misfit(found, products.x[inputs] @ rows.T) ** 0.5
    if not deviation < 0.03:
        raise SystemExit(f"{kind}: the product is off by {deviation:.3f}")
    bits = 8 * call_bytes / weights
    return Competitor(f"ggml {kind}", bits, weight_error(ggml, kind), products.run)


def weight_error(ggml: Ggml, kind: str) -> float:
    """Relative mean squared error of Gaussian weights, rounded by the library itself."""
    weights = torch.randn(ERROR_ROWS, 2560, generator=torch.Generator().manual_seed(0))
    kept = ggml.dequantised(kind, ggml.quantised(kind, weights), 2560)
    return misfit(weights, kept)


def misfit(target: torch.Tensor, values: torch.Tensor) -> float:
    """Relative squared error of values at the best common factor: dequantising the library's
    trellis types gives 1.05 times the weights that its product has."""
    fitted = values * ((target * values).sum() / values.square().sum())
    return float((target - fitted).square().sum() / target.square().sum())


def code_error(bits: int) -> float:
    """The same of our code at the standard register length."""
    return measure_code(code_for_bits(bits, register_length(bits, "standard")), SEQUENCES, 0).mse


def compare(name: str, tokens: int, every: Sequence[Competitor], most: int) -> list[PeerRow]:
    """Time all in turns, for so many rounds."""
    shape = SHAPES[name]
    for competitor in every:
        competitor.run(0)
    rounds = []
    for call in range(1, most + 1):
        times = [0.0] * len(every)
        before, begun = others_seconds(), time.perf_counter()
        for i in order(len(every), call):
            time.sleep(PAUSE_SECONDS)
            every[i].run(2 * call)  # wakes its threads
            times[i] = wall_clock(partial(every[i].run, 2 * call + 1))
        others = max(others_seconds() - before, 0.0) / (time.perf_counter() - begun)
        rounds.append(Round(0.0, times, others))
    rounds, others = quiet(rounds)
    seconds = [list(times) for times in zip(*(r.methods for r in rounds), strict=True)]
    found = []
    for competitor, times in zip(every, seconds, strict=True):
        middle = statistics.median(times)
        products = tokens * shape.top_k * shape.weights_per_expert
        ratios = {
            own.name: ordered(quartiles(turn_ratios(times, mines)))
            for own, mines in zip(every, seconds, strict=True)
            if own.name.startswith("erniequant") and not competitor.name.startswith("erniequant")
        }
        found.append(PeerRow(
            name, tokens, competitor.name, competitor.bits, competitor.error, 1e6 * middle,
            products / middle / 1e9, ratios, len(rounds), others,
        ))  # fmt: skip
    return found


def ordered(spread: Spread) -> tuple[float, float, float]:
    """The JSON form of a ratio."""
    return spread.low, spread.median, spread.high


def same_experts(shape: Shape, tokens: int) -> Batch:
    """Tokens that all choose the same experts."""
    index = torch.arange(shape.top_k).expand(tokens, -1).contiguous()
    routing = torch.full((tokens, shape.top_k), 1 / shape.top_k).bfloat16()
    return Batch(torch.randn(tokens, shape.hidden).bfloat16(), index, routing)


@torch.no_grad()
def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", type=Path, help="libggml.so")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--shape", default="21b", choices=SHAPES)
    parser.add_argument("--threads", type=int, default=len(cores()))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    ggml = Ggml(options.library)
    shape = SHAPES[options.shape]
    facts = machine(options.threads)
    errors = {bits: code_error(bits) for bits in (2, 4)}
    rows: list[PeerRow] = []
    with pinned(options.threads):
        methods = [(packed(shape, bits), error) for bits, error in errors.items()]
        methods.append((dense(shape, torch.bfloat16, methods[0][0].weight), 0.0))
        for tokens in TOKENS:
            batch = same_experts(shape, tokens)
            every = [ours(shape, batch, method, error) for method, error in methods]
            every += [peer(ggml, kind, shape, tokens, options.threads) for kind in KINDS]
            for row in compare(options.shape, tokens, every, options.rounds):
                ratios = ", ".join(f"{own} {r[1]:.2f} x" for own, r in row.ratios.items())
                print(
                    f"{row.tokens:4} {row.name:20} {row.bits:5.2f} bits {row.error:8.5f} "
                    f"{row.microseconds:9.0f} us {row.products_per_second:7.1f} G/s  {ratios}"
                )
                rows.append(row)
            del every
    if options.json:
        result = {"machine": facts, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
