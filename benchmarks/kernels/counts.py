"""Counts of kernels for predictions: compiled in parallel, each once."""

from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from os import cpu_count

from erniequant.codes import ConvolutionalCode
from erniequant.errors import ErnieQuantError
from erniequant_kernels.bench.problem import Shape
from erniequant_kernels.machine_code_cases import (
    EXPERTS,
    HIDDEN,
    INNER,
    TOP_K,
    gemm_case,
    rotate_cases,
)  # fmt: skip
from erniequant_kernels.machine_traffic import Counted, count
from erniequant_kernels.packed_gemm import PackedGemmConfig
from erniequant_kernels.tuning import GemmConfig

SPLITS = 2
ROTATIONS = ("prepare", "swiglu_rotate", "combine")


@dataclass(frozen=True)
class Wanted:
    """A product on packed weights to count for an architecture.

    Sizes of the matrices are constants of a kernel and change little of its code, so gate and up of
    the 21B stand for all, and two splits for any number.
    """

    arch: int
    code: ConvolutionalCode
    config: GemmConfig

    @property
    def key(self) -> "Wanted":
        """The one that is counted in its place."""
        if isinstance(self.config, PackedGemmConfig):
            return replace(self, config=replace(self.config, splits=SPLITS))
        return self


@dataclass(frozen=True)
class WantedRotation:
    """One of the other kernels of a layer, which depend on what the products write."""

    arch: int
    name: str
    splits: int
    partial: str = "*fp32"

    @property
    def key(self) -> "WantedRotation":
        """Itself."""
        return self


_counted: dict[Wanted | WantedRotation, Counted | str] = {}


def _count(wanted: Wanted | WantedRotation) -> Counted:
    if isinstance(wanted, WantedRotation):
        shape = Shape(HIDDEN, INNER, EXPERTS, TOP_K)
        cases = rotate_cases(shape, 64, wanted.splits, wanted.partial)
        return count(cases[ROTATIONS.index(wanted.name)], wanted.arch)
    return count(gemm_case(wanted.code, wanted.config, 2 * INNER, HIDDEN, TOP_K), wanted.arch)


def _try_count(wanted: Wanted | WantedRotation) -> Counted | str:
    """Counts, or why there are none: some configurations do not compile."""
    try:
        return _count(wanted)
    except Exception as error:  # of Triton, ptxas or the interpreter: said by `counted`
        return f"{type(error).__name__}: {error}"


def counted(wanted: Wanted | WantedRotation) -> Counted:
    """Counts of one kernel, from memory after the first time.

    Raises:
        ErnieQuantError: it does not compile, or cannot be counted.
    """
    key = wanted.key
    if key not in _counted:
        _counted[key] = _try_count(key)
    result = _counted[key]
    if isinstance(result, str):
        raise ErnieQuantError(f"{key}: {result}")
    return result


def prepare_counts(wanted: Iterable[Wanted | WantedRotation], processes: int | None = None) -> None:
    """Count kernels in several processes, so that `counted` has them at hand."""
    missing = list(dict.fromkeys(w.key for w in wanted if w.key not in _counted))
    if len(missing) < 2:
        return
    workers = min(len(missing), processes or cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        _counted.update(zip(missing, pool.map(_try_count, missing), strict=True))
