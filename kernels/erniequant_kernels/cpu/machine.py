"""The processor that vector code is made for."""

import os
from dataclasses import dataclass
from functools import cache

import llvmlite.binding as llvm

VARIABLE = "ERNIEQUANT_CPU"
"""Environment variable with LLVM's name of another processor to make code for, such as ``haswell``
for AVX2: to compare, and to test what this machine would not choose."""


@dataclass(frozen=True)
class Machine:
    """What decides which code is made.

    Attributes:
        name, features: LLVM's names of the processor and of what it has, ``+avx2,-sse4a``.
        lanes: 32-bit elements of a vector.
        sums: vectors of sums that are added to in one pass over the inputs, best by measurement;
            other registers hold words, windows and labels.
        most_sums: vectors of sums that fit the registers at all.
        bfloat16_dot: there is an instruction that adds two bfloat16 products to a float32 sum.
    """

    name: str
    features: str
    lanes: int
    sums: int
    most_sums: int
    bfloat16_dot: bool


def machine_of(name: str, features: dict[str, bool]) -> Machine:
    """The machine with LLVM's features by name. Vectors of more lanes than it has are cut in two by
    LLVM."""
    wide = features.get("avx512f", False) and features.get("avx512vl", False)
    return Machine(
        name,
        ",".join(f"{'+' if has else '-'}{feature}" for feature, has in sorted(features.items())),
        16 if wide else 8,
        16 if wide else 8,
        24 if wide else 10,
        wide and features.get("avx512bf16", False),
    )


@cache
def machine() -> Machine:
    """This machine, or the one that `VARIABLE` names."""
    other = os.environ.get(VARIABLE)
    if other:
        return machine_of(other, {})
    return machine_of(llvm.get_host_cpu_name(), dict(llvm.get_host_cpu_features()))
