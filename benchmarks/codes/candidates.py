"""Labels that were considered for the native codes, for the comparison in docs/codes.md.

Only the chosen ones are part of the format. A candidate is a `ConvolutionalCode` like any other, so
the encoder and the study run it unchanged.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from erniequant.codes import labels
from erniequant.codes.labels import Label, LabelFunction
from erniequant.codes.spec import ConvolutionalCode

Products = NDArray[np.uint32]
Labels = NDArray[np.float32]


@dataclass(frozen=True)
class Candidate:
    """A label function and the widths it is meant for.

    ``issue_cost`` is in issue slots per weight on sm_90 at register length 16, by bits; empty where
    no tile was compiled.
    """

    name: str
    weights_per_step: int
    label: LabelFunction
    issue_cost: dict[int, float]
    hashed: bool = True

    def code(self, bits: int, length: int, multiplier: int) -> ConvolutionalCode:
        """The candidate as a code; without a hash, the register itself is looked up."""
        factor = multiplier if self.hashed else 1
        label = Label(self.name, self.weights_per_step, self.label)
        return ConvolutionalCode(self.name, bits, length, factor, label)


def _to_bfloat16(value: Labels) -> Labels:
    pattern = np.ascontiguousarray(value, dtype=np.float32).view(np.uint32)
    odd = (pattern >> np.uint32(16)) & np.uint32(1)
    rounded = (pattern + np.uint32(0x7FFF) + odd) & np.uint32(0xFFFF0000)
    return rounded.astype(np.uint32).view(np.float32)


def _seven_mantissa_bits(product: Products) -> Labels:
    halves = (product & np.uint32(0x81FF81FF)) ^ np.uint32(labels.TOGGLE_BITS)
    both = np.stack([halves << np.uint32(16), halves & np.uint32(0xFFFF0000)], axis=-1)
    return both.view(np.float32)


def _two_products(product: Products) -> Labels:
    # The second product of the register is a fixed multiple of the first.
    return _to_bfloat16(labels.pair(product) + labels.pair(product * np.uint32(0x9E3779B1)))


def _byte_pairs(product: Products) -> Labels:
    low = np.uint32(0x00FF00FF)
    sums = (product & low) + ((product >> np.uint32(8)) & low)
    both = np.stack([sums & np.uint32(0xFFFF), sums >> np.uint32(16)], axis=-1)
    return _to_bfloat16(both.astype(np.float32) - 255)


def _byte_sum(product: Products) -> Labels:
    total = sum((product >> np.uint32(8 * i)) & np.uint32(255) for i in range(4))
    return _to_bfloat16(np.asarray(total)[..., None].astype(np.float32) - 510)


def random_table(weights_per_step: int, seed: int = 5) -> LabelFunction:
    """Independent Gaussian labels looked up by register, as a perfect hash would give them."""

    def label(register: Products) -> Labels:
        rng = np.random.default_rng(seed)
        return rng.standard_normal((register.size, weights_per_step), dtype=np.float32)

    return label


CANDIDATES = {
    2: (
        Candidate("pair (cc2)", 2, labels.pair, {2: 3.46}),
        Candidate("pair, 7 mantissa bits", 2, _seven_mantissa_bits, {2: 3.46}),
        Candidate("two products added", 2, _two_products, {2: 5.59}),
        Candidate("byte pairs", 2, _byte_pairs, {2: 8.59}),
        Candidate("random table, V = 2", 2, random_table(2), {}, hashed=False),
        Candidate("half_sum", 1, labels.half_sum, {}),
    ),
    3: (
        Candidate("half_sum (cc3)", 1, labels.half_sum, {3: 8.42}),
        Candidate("byte sum", 1, _byte_sum, {}),
        Candidate("random table, V = 1", 1, random_table(1), {}, hashed=False),
    ),
    4: (
        Candidate("half_sum (cc4)", 1, labels.half_sum, {4: 6.92}),
        Candidate("two products added, V = 2", 2, _two_products, {4: 5.69}),
        Candidate("byte sum", 1, _byte_sum, {4: 16.19}),
        Candidate("random table, V = 1", 1, random_table(1), {}, hashed=False),
    ),
}
"""Candidates by bits, the chosen one first."""
