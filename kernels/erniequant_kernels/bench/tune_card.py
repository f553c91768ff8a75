"""The search for tile sizes on the card at hand: compiled on all cores, timed with a cold cache."""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any

import torch

from erniequant_kernels.bench.compiling import compiled_by, compiling_only, spills
from erniequant_kernels.bench.problem import SHAPES, Batch, make_batch, random_matrices
from erniequant_kernels.bench.rounds import rounds as take_turns
from erniequant_kernels.bench.rows import TOLERANCE
from erniequant_kernels.bench.timing import Timer
from erniequant_kernels.bench.tune import Problem, Seconds
from erniequant_kernels.moe import moe_experts
from erniequant_kernels.tuning import Tuning, settings_of, tables

META = torch.device("meta")
TOGETHER = 8
"""Tables whose graphs are in memory at the same time: a graph keeps its workspace."""

Layer = Callable[[Batch, Tuning], torch.Tensor]


class OnCard:
    """Times layers under tables; a `tune.Measure`.

    A candidate may be one that kernels, compiler or card refuse, with whatever exception, so any is
    one more candidate that does not run; `failures` counts them by their text.

    Args:
        shipped: the table whose results others must agree with.
        threads: that compile.
    """

    def __init__(self, shipped: Tuning, timer: Timer, device: torch.device, threads: int):
        self.shipped, self.timer, self.device, self.threads = shipped, timer, device, threads
        # One after the other: the weights of a large layer are gigabytes.
        self.failures: Counter[str] = Counter()
        self._layer = lru_cache(maxsize=1)(self._make_layer)

    @torch.no_grad()
    def __call__(self, problem: Problem, some: Sequence[Tuning], turns: int) -> list[Seconds]:
        """Seconds under each table, None where it does not run, is wrong or spills."""
        layer = self._layer(problem.shape, problem.bits)
        batch = make_batch(SHAPES[problem.shape], problem.tokens, self.device)
        fits = self._compiled(problem, some)
        expected = layer(batch, self.shipped).float()
        found: list[Seconds] = [None] * len(some)
        fitting = [i for i, fit in enumerate(fits) if fit]
        for at in range(0, len(fitting), TOGETHER):
            here = fitting[at : at + TOGETHER]
            for i, seconds in self._timed(layer, batch, some, here, expected, turns):
                found[i] = seconds
        return found

    def _make_layer(self, shape: str, bits: int) -> Layer:
        both = random_matrices(SHAPES[shape], bits, SHAPES[shape].experts, self.device)
        return lambda batch, table: moe_experts(
            batch.x, batch.expert_index, batch.routing, *both, table
        )

    def _compiled(self, problem: Problem, some: Sequence[Tuning]) -> list[bool]:
        """Compile all at once; whether each compiles, fits the card and spills no more registers
        than others."""
        size = SHAPES[problem.shape]
        both = random_matrices(size, problem.bits, size.experts, META)
        batch = make_batch(size, problem.tokens, META)

        def kernels(table: Tuning) -> list[Any] | None:
            try:
                return compiled_by(
                    lambda: moe_experts(batch.x, batch.expert_index, batch.routing, *both, table)
                )
            except Exception as error:
                self._note(error)
                return None

        with compiling_only(), ThreadPoolExecutor(self.threads) as pool:
            compiled = list(pool.map(kernels, some))
        spilled = [None if found is None else self._spilled(found) for found in compiled]
        # A kernel that all have in common may spill as well.
        least = min((words for words in spilled if words is not None), default=0)
        self.failures["spills"] += sum(words is not None and words > least for words in spilled)
        return [words == least for words in spilled]

    def _spilled(self, kernels: Sequence[Any]) -> int | None:
        """Words in all, None where the card cannot take a kernel."""
        try:
            return sum(map(spills, kernels))
        except Exception as error:
            self._note(error)
            return None

    def _note(self, error: Exception) -> None:
        self.failures[f"{type(error).__name__}: {error}".splitlines()[0][:120]] += 1

    def _timed(
        self, layer: Layer, batch: Batch, some: Sequence[Tuning], here: Sequence[int],
        expected: torch.Tensor, turns: int,
    ) -> Iterator[tuple[int, float]]:  # fmt: skip
        calls = {}
        for i in here:
            table = some[i]
            try:
                off = (layer(batch, table).float() - expected).abs().max() / expected.abs().max()
                if float(off) <= 2 * TOLERANCE:
                    calls[i] = self.timer.ready(partial(layer, batch, table), True)
                else:
                    self.failures["wrong"] += 1
            except Exception as error:
                self._note(error)
                if self.device.type == "cuda":
                    torch.cuda.synchronize()  # raises again if the card is in no state to go on
        for i, seconds in zip(
            calls, take_turns(list(calls.values()), turns, self.timer.clock), strict=True
        ):
            yield i, statistics.median(seconds)


def deadline(seconds: float | None) -> Callable[[], bool]:
    """Whether so many seconds from now are over."""
    end = None if seconds is None else time.monotonic() + seconds
    return lambda: end is not None and time.monotonic() > end


def all_tables(architecture: str, table: Tuning) -> dict[str, Any]:
    """The content of a file like tuning.json: all tables that are in use, one of them new."""
    return {name: settings_of(t) for name, t in (tables() | {architecture: table}).items()}
