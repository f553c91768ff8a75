"""Label functions: 32-bit products to weights that are exactly bfloat16 values.

A register is hashed by one 32-bit multiplication; masking and toggling bits of the product makes
two bfloat16 numbers of magnitude 1/8 to 2 with random sign. No step rounds, so encoder, reference
and kernels agree bit for bit; the halves are FP8 (E4M3) values as well.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LabelFunction = Callable[[NDArray[np.uint32]], NDArray[np.float32]]
"""uint32 products [...] -> float32 labels [..., weights_per_step], each exactly a bfloat16
value."""


@dataclass(frozen=True)
class Label:
    """A label function under the name by which files and kernels choose it.

    Attributes:
        name: unique; kernels dispatch on it.
        weights_per_step: weights that one register gives.
        function: the labels of products.
    """

    name: str
    weights_per_step: int
    function: LabelFunction


# Per 16-bit half: sign, the two low exponent bits and three mantissa bits come from the product.
# Three mantissa bits cost nothing in error (docs/codes.md) and make the sum of two halves exact in
# bfloat16.
KEEP_BITS = 0x81F081F0
# Toggling exponent bits maps the two kept ones to exponents 124..127: magnitudes in [1/8, 2).
TOGGLE_BITS = 0x3F003F00


def _bfloat16_to_float32(pattern: NDArray[np.uint32]) -> NDArray[np.float32]:
    """The low 16 bits of each element, read as a bfloat16."""
    return (pattern << np.uint32(16)).view(np.float32)


def pair(product: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Two weights a step: the low, then the high half of the masked product. ``[...] -> [...,
    2]``."""
    halves = (product & np.uint32(KEEP_BITS)) ^ np.uint32(TOGGLE_BITS)
    low = _bfloat16_to_float32(halves & np.uint32(0xFFFF))
    high = _bfloat16_to_float32(halves >> np.uint32(16))
    return np.stack([low, high], axis=-1)


def half_sum(product: NDArray[np.uint32]) -> NDArray[np.float32]:
    """One weight a step: the two halves added, which is exact in bfloat16. ``[...] -> [...,
    1]``."""
    halves = pair(product)
    return halves[..., :1] + halves[..., 1:]


def minus_eight(product: NDArray[np.uint32]) -> NDArray[np.float32]:
    """One weight a step, linear: a 4-bit register minus 8. ``[...] -> [..., 1]``."""
    return _minus(product, 8)


def minus_four(product: NDArray[np.uint32]) -> NDArray[np.float32]:
    """One weight a step, linear: a 3-bit register minus 4. ``[...] -> [..., 1]``."""
    return _minus(product, 4)


def minus_thirty_two(product: NDArray[np.uint32]) -> NDArray[np.float32]:
    """One weight a step, linear: a 6-bit register minus 32. ``[...] -> [..., 1]``."""
    return _minus(product, 32)


def _minus(product: NDArray[np.uint32], zero: int) -> NDArray[np.float32]:
    return product[..., None].astype(np.float32) - np.float32(zero)


PAIR = Label("pair", 2, pair)
HALF_SUM = Label("half_sum", 1, half_sum)
