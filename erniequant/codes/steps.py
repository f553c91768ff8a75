"""Forward steps of the Viterbi search, compiled by numba: the cheapest way into every class of
registers, from the cheapest ways one step before.

A class are the registers with the same low bits; they have the same successors. With ``B`` branches
the ``B`` classes ``B q ... B q + B - 1`` share their predecessors, the classes ``j R / B + q``: so
costs of predecessors are read once and stay in registers while all successors pass as one vector,
and labels are arranged to be read in one stream.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

UNREACHABLE = np.float32(1e30)

Float = np.float32
Float32 = NDArray[np.float32]
Four = tuple[Float, Float, Float, Float]
Pair = tuple[Float, Float]

_njit: Any = numba.njit(nogil=True, boundscheck=False)
_fast: Any = numba.njit(nogil=True, boundscheck=False, fastmath={"contract", "nnan", "ninf", "nsz"})

_LINE = 16
"""Labels between the rows of `_by_successor`: at register lengths from 14 on they would be whole
pages apart and throw one another out of the first cache, which doubles the time."""


@lru_cache(maxsize=8)
def forward_step(
    branches: int, per_step: int
) -> tuple[Callable[..., None], Callable[[Float32], Float32]]:
    """``forward(x, root, t, labels, old, new)`` and ``arrange(tables)``.

    ``new[r]`` becomes the least ``old[class of j] + sum (label[j, r] root - x)^2`` over ``j``, for
    the weights of step ``t``; ``labels`` are the tables float32 ``[V, B, R]`` as arranged.
    ``R`` is a multiple of ``B``.
    """
    if (branches, per_step) == (4, 1):
        return _forward_four, _by_successor
    return _forward_wide(branches, per_step), _by_predecessors


@_njit
def _by_predecessors(tables: Float32) -> Float32:
    """Labels in the order that `_forward_wide` reads: ``[q, v, j, s]``, the label of the way from
    class ``j R / B + q`` to class ``B q + s``, flat."""
    per_step, branches, classes = tables.shape
    arranged = np.empty((classes // branches, per_step, branches, branches), np.float32)
    for q in range(classes // branches):
        for v in range(per_step):
            for j in range(branches):
                for s in range(branches):
                    arranged[q, v, j, s] = tables[v, j, q * branches + s]
    return arranged.reshape(arranged.size)


def _forward_wide(branches: int, per_step: int) -> Callable[..., None]:
    """The step of codes with a multiple of four branches and one or two weights a step."""
    block = branches * branches
    groups = branches // 4

    @_fast
    def cost(labels: Float32, at: int, before: Float, root: Pair, x: Pair) -> Float:
        d = labels[at] * root[0] - x[0]
        total = before + d * d
        if per_step == 2:
            e = labels[at + block] * root[1] - x[1]
            total += e * e
        return total

    @_fast
    def least(labels: Float32, at: int, before: Four, root: Pair, x: Pair) -> Float:
        a = cost(labels, at, before[0], root, x)
        b = cost(labels, at + branches, before[1], root, x)
        c = cost(labels, at + 2 * branches, before[2], root, x)
        d = cost(labels, at + 3 * branches, before[3], root, x)
        return min(min(a, b), min(c, d))

    @_fast
    def costs(old: Float32, start: int, apart: int) -> Four:
        return old[start], old[start + apart], old[start + 2 * apart], old[start + 3 * apart]

    @_fast
    def forward(
        x: Float32, root: Float32, t: int, labels: Float32, old: Float32, new: Float32
    ) -> None:
        apart = new.shape[0] // branches
        first, last = t * per_step, t * per_step + per_step - 1
        roots, xs = (root[first], root[last]), (x[first], x[last])
        # Not the constant: a loop of known length is unrolled, and then not made a vector.
        successors = new.shape[0] // apart
        for q in range(apart):
            # All of them at once in registers; a loop over groups would store sums in between.
            a, b = costs(old, q, apart), costs(old, q + 4 * apart, apart)
            if groups == 4:
                c = costs(old, q + 8 * apart, apart)
                d = costs(old, q + 12 * apart, apart)
            for s in range(successors):
                at = q * per_step * block + s
                lowest = min(
                    least(labels, at, a, roots, xs),
                    least(labels, at + 4 * branches, b, roots, xs),
                )
                if groups == 4:
                    rest = min(
                        least(labels, at + 8 * branches, c, roots, xs),
                        least(labels, at + 12 * branches, d, roots, xs),
                    )
                    lowest = min(lowest, rest)
                new[q * branches + s] = lowest

    return forward


@_njit
def _by_successor(tables: Float32) -> Float32:
    """The labels in the order that `_forward_four` reads: float32 ``[j, s, q]``, the label of the
    way from class ``j R / 4 + q`` to class ``4 q + s``."""
    classes = tables.shape[2]
    arranged = np.empty((4, 4, classes // 4 + _LINE), np.float32)
    for j in range(4):
        for r in range(classes):
            arranged[j, r % 4, r // 4] = tables[0, j, r]
    return arranged


@_fast
def _least(before: Four, labels: Float32, s: int, q: int, weight: Float, target: Float) -> Float:
    """The least cost of class ``4 q + s``, from the costs of its four predecessors."""
    a, b, c, d = before
    da, db = labels[0, s, q] * weight - target, labels[1, s, q] * weight - target
    dc, dd = labels[2, s, q] * weight - target, labels[3, s, q] * weight - target
    return min(min(a + da * da, b + db * db), min(c + dc * dc, d + dd * dd))


@_fast
def _forward_four(
    x: Float32, root: Float32, t: int, labels: Float32, old: Float32, new: Float32
) -> None:
    """The step of four branches and one weight: too few successors for a vector, so it is made of
    neighbouring ``q``."""
    target, weight = x[t], root[t]
    n = new.shape[0] // 4
    for q in range(n):
        before = old[q], old[n + q], old[2 * n + q], old[3 * n + q]
        new[4 * q] = _least(before, labels, 0, q, weight, target)
        new[4 * q + 1] = _least(before, labels, 1, q, weight, target)
        new[4 * q + 2] = _least(before, labels, 2, q, weight, target)
        new[4 * q + 3] = _least(before, labels, 3, q, weight, target)
