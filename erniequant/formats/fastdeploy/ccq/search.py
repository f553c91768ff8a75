"""Compiled searches of the WINT2 encoder; both release the GIL and use one thread.

Outputs do not share anything, so rows of the arrays here, one per output (or per output and code
book), are independent; the input rows of one group of 64 are columns. The best of the 256 points of
a block is found at full vector width: distances go to a buffer, and the number of a point replaces
the low byte of its distance, which makes the search for the smallest one a minimum of integers. The
low byte, 2^-15 of the distance, only decides between equals.
"""

import numba
import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Bytes = NDArray[np.uint8]

BLOCKS = 16
"""Blocks of four input rows in a group of 64."""

_FAST = {"contract", "nnan", "ninf", "nsz", "reassoc"}
_LARGEST = np.int32(0x7FFFFFFF)
_UNREACHABLE = np.float32(3e38)


@numba.njit(nogil=True, fastmath=_FAST, boundscheck=False)
def _nearest(target: Float32, points: Float32, distance: Float32, bits: NDArray[np.int32]) -> int:
    """The column of ``points`` ``[4, 256]`` nearest to ``target`` ``[4]``; fills ``distance``, of
    which ``bits`` is a view."""
    t0, t1, t2, t3 = target[0], target[1], target[2], target[3]
    p0, p1, p2, p3 = points[0], points[1], points[2], points[3]
    for c in range(256):
        d0, d1, d2, d3 = p0[c] - t0, p1[c] - t1, p2[c] - t2, p3[c] - t3
        distance[c] = d0 * d0 + d1 * d1 + d2 * d2 + d3 * d3
    best = _LARGEST
    for c in range(256):
        best = min(best, np.int32((bits[c] & np.int32(-256)) | np.int32(c)))
    return best & 255


@numba.njit(nogil=True, fastmath=_FAST, boundscheck=False)
def encode_group(
    weight: Float32,
    aim: Float32,
    feedback: Float32,
    roots: Float32,
    points: Float32,
    labels: Float32,
    book: NDArray[np.int64],
    unit: Float32,
    first: NDArray[np.int64],
    tries: int,
    codes: Bytes,
    nibbles: Bytes,
    error: Float32,
    loss: NDArray[np.float64],
) -> None:
    """Encode a group with feedback inside it, for several nibbles; keep the best.

    Args:
        weight: ``[n, 64]``, from which errors are counted.
        aim: ``[n, 64]``, the weights plus the feedback of the groups before.
        feedback: ``[64, 64]``: row ``k`` holds what the error of row ``k`` adds to earlier rows.
        roots: ``[16, 4, 4]``, upper triangular: the metric of each block.
        points: ``[books, 16, 4, 256]``: the roots times the labels.
        labels: ``[books, 4, 256]``.
        book: ``[n]``.
        unit: ``[n]``: the scale of nibble 1, not negative.
        first: ``[n]``: the nibble tried first; then its neighbours on both sides in turn.
        tries: number of nibbles tried, besides nibble 0.
        codes, nibbles, error: ``[n, 16]``, ``[n]`` and ``[n, 64]``, results.
        loss: ``[n]``, to which the loss of the group is added.
    """
    distance = np.empty(256, np.float32)
    bits = distance.view(np.int32)
    target, wanted = np.empty(4, np.float32), np.empty(64, np.float32)
    e, chosen = np.empty(64, np.float32), np.empty(BLOCKS, np.uint8)
    for n in range(weight.shape[0]):
        lowest = _UNREACHABLE
        for attempt in range(tries + 1):
            step = (attempt + 1) // 2
            # Zero comes last: the best where a group holds little else, and given up at once where
            # it does not. Without a unit it is all there is.
            nibble = first[n] + (step if attempt % 2 else -step) if attempt < tries else 0
            if nibble < 0 or nibble > 15 or (unit[n] == 0 and nibble > 0):
                continue
            scale = unit[n] * np.float32(nibble)
            inverse = np.float32(1) / scale if nibble else np.float32(0)
            total = np.float32(0)
            for k in range(64):
                wanted[k] = aim[n, k]
            for b in range(BLOCKS - 1, -1, -1):
                norm = np.float32(0)
                for i in range(4):
                    x = np.float32(0)
                    for j in range(i, 4):
                        x += roots[b, i, j] * wanted[4 * b + j]
                    norm += x * x
                    target[i] = x * inverse
                code = 0
                if nibble:
                    code = _nearest(target, points[book[n], b], distance, bits)
                    norm = distance[code] * scale * scale
                total += norm
                chosen[b] = code
                for i in range(4):
                    e[4 * b + i] = weight[n, 4 * b + i] - labels[book[n], i, code] * scale
                if total >= lowest:
                    break
                k = 4 * b
                e0, e1, e2, e3 = e[k], e[k + 1], e[k + 2], e[k + 3]
                f0, f1, f2, f3 = feedback[k], feedback[k + 1], feedback[k + 2], feedback[k + 3]
                for j in range(k):
                    wanted[j] += f0[j] * e0 + f1[j] * e1 + f2[j] * e2 + f3[j] * e3
            if total < lowest:
                lowest = total
                nibbles[n] = nibble
                codes[n] = chosen
                error[n] = e
        loss[n] += lowest


@numba.njit(nogil=True, fastmath=_FAST, boundscheck=False)
def improve_group(
    weight: Float32,
    gradient: Float32,
    hessian: Float32,
    roots: Float32,
    inverses: Float32,
    points: Float32,
    labels: Float32,
    book: NDArray[np.int64],
    unit: Float32,
    codes: Bytes,
    nibbles: Bytes,
    error: Float32,
) -> None:
    """Choose every byte of a group anew, all others being what they are, for its nibble and the two
    beside it; keep what lowers the loss most. Coordinate descent.

    Args:
        weight: ``[n, 64]``.
        gradient: ``[n, 64]``: the errors of the whole matrix times the Hessian.
        hessian: ``[64, 64]``, of the group.
        roots, inverses: ``[16, 4, 4]``, of the blocks on its diagonal.
        points, labels, book: as in `encode_group`, with these roots.
        unit: ``[n]``.
        codes, nibbles, error: ``[n, 16]``, ``[n]`` and ``[n, 64]``, improved in place.
    """
    distance = np.empty(256, np.float32)
    bits = distance.view(np.int32)
    target, wanted = np.empty(4, np.float32), np.empty(4, np.float32)
    e, slope, chosen = np.empty(64, np.float32), np.empty(64, np.float32), np.empty(16, np.uint8)
    best_error, best_codes = np.empty(64, np.float32), np.empty(16, np.uint8)
    for n in range(weight.shape[0]):
        lowest, present, best_nibble = np.float32(0), int(nibbles[n]), int(nibbles[n])
        for nibble in range(max(present - 1, 1), min(present + 1, 15) + 1):
            scale = unit[n] * np.float32(nibble)
            if scale == 0:
                continue
            inverse = np.float32(1) / scale
            for b in range(BLOCKS):
                chosen[b] = codes[n, b]
                for i in range(4):
                    value = labels[book[n], i, chosen[b]] * scale
                    e[4 * b + i] = weight[n, 4 * b + i] - value
            for j in range(64):
                slope[j] = gradient[n, j]
            if nibble != present:
                for k in range(64):
                    change, row = e[k] - error[n, k], hessian[k]
                    for j in range(64):
                        slope[j] += change * row[j]
            for b in range(BLOCKS - 1, -1, -1):
                # The best value of the block is the present one plus A^-1 times the gradient.
                for i in range(4):
                    x = weight[n, 4 * b + i] - e[4 * b + i]
                    for j in range(4):
                        x += inverses[b, i, j] * slope[4 * b + j]
                    wanted[i] = x
                for i in range(4):
                    x = np.float32(0)
                    for j in range(i, 4):
                        x += roots[b, i, j] * wanted[j]
                    target[i] = x * inverse
                code = _nearest(target, points[book[n], b], distance, bits)
                if code == chosen[b]:
                    continue
                chosen[b] = code
                for i in range(4):
                    k = 4 * b + i
                    value = weight[n, k] - labels[book[n], i, code] * scale
                    change, row = value - e[k], hessian[k]
                    e[k] = value
                    for j in range(64):
                        slope[j] += change * row[j]
            # L(E + D) - L(E) = D . (H E + H (E + D)).
            gain = np.float32(0)
            for j in range(64):
                gain += (e[j] - error[n, j]) * (gradient[n, j] + slope[j])
            if gain < lowest:
                lowest, best_nibble = gain, nibble
                best_error[:] = e
                best_codes[:] = chosen
        if lowest < 0:
            nibbles[n] = best_nibble
            codes[n] = best_codes
            error[n] = best_error
