"""Fast CPU encoder: weighted Viterbi search for tail-biting sequences, compiled by numba.

Minimises ``sum_i w_i (x_i - label_i)^2`` over all bit streams of a sequence. Tail-biting takes two
searches: the first runs over a window around the seam with free ends and yields the register at
the seam, the second runs over the whole sequence with both ends tied to it (near-optimal; tests
compare with brute force). No survivor pointers are kept: the trace back recomputes the minimum
over the few predecessors of one register, so the inner loop is only multiply, add and minimum and
runs at the full vector width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from erniequant.codes.spec import WORD_BITS, ConvolutionalCode
from erniequant.codes.steps import UNREACHABLE, Float32, forward_step

SEAM_WEIGHTS = 64
"""Weights on either side of the seam that the first search sees, going round more than once where
the sequence is shorter than both sides. Going round once costs 1.5 % of error at a tile of 64;
more than 64 weights gain less than 0.1 %."""


@dataclass(frozen=True, eq=False)
class Encoder:
    """A code made ready for searching: its label tables and the compiled search.

    ``tables`` is float32 ``[V, B, R]``: label ``v`` of register ``j * R + r``, where ``B`` is the
    number of branches per step and registers that share their low bits ``r`` have the same
    successors. ``arranged`` are the same labels as the forward step reads them.
    """

    code: ConvolutionalCode
    tables: Float32
    arranged: Float32
    search: Callable[..., None]
    search_rows: Callable[..., None]

    def encode(self, targets: Float32, weights: Float32) -> tuple[NDArray[np.uint32], Float32]:
        """Encode sequences.

        Args:
            targets: float32 ``[S, T]`` in units of the labels.
            weights: float32 ``[S, T]``, positive: how much the squared error of each position
                counts.

        Returns:
            uint32 words ``[S, T * bits / 32]`` and float32 labels ``[S, T]``.
        """
        sequences, tile = targets.shape
        words = np.zeros((sequences, self.code.words_per_sequence(tile)), np.uint32)
        labels = np.empty((sequences, tile), np.float32)
        self.search(targets, weights, self.tables, self.arranged, words, labels)
        return words, labels

    def encode_rows(
        self, aims: Float32, feedback: Float32, scale: Float32, weights: Float32, error: Float32
    ) -> tuple[NDArray[np.uint32], Float32]:
        """Encode rows from the last to the first, each aiming at its aim and the errors of those
        after it.

        Args:
            aims: float32 ``[R, N]``; row ``r`` becomes what it aimed at, with that feedback.
            feedback: float32 ``[R, R]``, whose column ``r`` below the diagonal multiplies errors.
            scale: float32 ``[N]``, positive: weight = ``scale`` * label.
            weights: float32 ``[N / T, T]``, as in `encode`.
            error: float32 ``[R, N]``: on entry the weights, on return these minus their codes.

        Returns:
            uint32 words ``[R, N / T, T * bits / 32]`` and float32 labels ``[R, N]``.
        """
        sequences, tile = weights.shape
        words = np.zeros((len(aims), sequences, self.code.words_per_sequence(tile)), np.uint32)
        labels = np.empty_like(aims)
        self.search_rows(
            aims, feedback, scale, weights, self.tables, self.arranged, error, words, labels
        )
        return words, labels


@lru_cache(maxsize=64)
def encoder(code: ConvolutionalCode) -> Encoder:
    """The encoder of a code; compiled once per step size and process."""
    branches = 1 << code.step_bits
    table = np.ascontiguousarray(code.table().T)
    tables = table.reshape(code.weights_per_step, branches, code.states // branches)
    _, arrange = forward_step(branches, code.weights_per_step)
    search = compile_search(code.step_bits, code.weights_per_step)
    return Encoder(code, tables, arrange(tables), *search)


@lru_cache(maxsize=8)
def compile_search(
    step_bits: int, per_step: int
) -> tuple[Callable[..., None], Callable[..., None]]:
    """The searches of `Encoder.encode` and `Encoder.encode_rows` for one step size; both release
    the GIL."""
    branches = 1 << step_bits
    forward, _ = forward_step(branches, per_step)
    njit: Any = numba.njit(nogil=True, boundscheck=False)

    @njit
    def trace_back(
        x: Float32,
        root: Float32,
        tables: Float32,
        best: Float32,
        first: int,
        steps: int,
        stop: int,
        r: int,
        states: NDArray[np.int64],
    ) -> int:
        """Follow the cheapest path backwards from class ``r`` after ``steps`` steps; fills
        ``states[stop:]``."""
        total = x.shape[0] // per_step
        classes = best.shape[1]
        for i in range(steps - 1, stop - 1, -1):
            t = (first + i) % total
            cheapest = np.float32(np.inf)
            state = r
            for j in range(branches):
                s = j * classes + r
                cost = best[i, s >> step_bits]
                for v in range(per_step):
                    d = tables[v, j, r] * root[t * per_step + v] - x[t * per_step + v]
                    cost += d * d
                if cost < cheapest:
                    cheapest = cost
                    state = s
            states[i] = state
            r = state >> step_bits
        return r

    @njit
    def search(
        targets: Float32,
        weights: Float32,
        tables: Float32,
        arranged: Float32,
        words: NDArray[np.uint32],
        labels: Float32,
    ) -> None:
        tile = targets.shape[1]
        steps = tile // per_step
        classes = tables.shape[2]
        around = SEAM_WEIGHTS // per_step
        first = steps - around % steps
        longest = max(steps, 2 * around)
        best = np.empty((longest + 1, classes), np.float32)
        states = np.empty(longest, np.int64)
        for q in range(targets.shape[0]):
            # w (label - x)^2 = (label root(w) - x root(w))^2, which is one operation less.
            root = np.sqrt(weights[q])
            x = targets[q] * root
            best[0, :] = 0
            for i in range(2 * around):
                forward(x, root, (first + i) % steps, arranged, best[i], best[i + 1])
            free = np.argmin(best[2 * around])
            seam = trace_back(x, root, tables, best, first, 2 * around, around, free, states)
            best[0, :] = UNREACHABLE
            best[0, seam] = 0
            for t in range(steps):
                forward(x, root, t, arranged, best[t], best[t + 1])
            trace_back(x, root, tables, best, 0, steps, 0, seam, states)
            for t in range(steps):
                state = states[t]
                for v in range(per_step):
                    labels[q, t * per_step + v] = tables[v, state // classes, state % classes]
                symbol = state & (branches - 1)
                for b in range(step_bits):
                    bit = t * step_bits + b
                    if (symbol >> (step_bits - 1 - b)) & 1:
                        words[q, bit // WORD_BITS] |= np.uint32(1) << np.uint32(
                            31 - bit % WORD_BITS
                        )

    @njit
    def search_rows(
        aims: Float32,
        feedback: Float32,
        scale: Float32,
        weights: Float32,
        tables: Float32,
        arranged: Float32,
        error: Float32,
        words: NDArray[np.uint32],
        labels: Float32,
    ) -> None:
        rows, outputs = aims.shape
        target = np.empty(weights.shape, np.float32)
        flat = target.reshape(outputs)
        for k in range(rows - 1, -1, -1):
            aim = aims[k]
            for j in range(k + 1, rows):
                factor = feedback[j, k]
                for n in range(outputs):
                    aim[n] += factor * error[j, n]
            for n in range(outputs):
                flat[n] = aim[n] / scale[n]
            search(target, weights, tables, arranged, words[k], labels[k].reshape(weights.shape))
            for n in range(outputs):
                error[k, n] -= labels[k, n] * scale[n]

    return search, search_rows
