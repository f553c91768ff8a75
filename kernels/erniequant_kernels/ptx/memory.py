"""Global and shared memory of the interpreter, and the list of accesses to it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from erniequant.errors import ErnieQuantError
from erniequant_kernels.ptx.values import UNSIGNED, Array

_REGION = 40  # each argument's memory begins at a multiple of 2^40
_ROOM = 16  # bytes after the end, so that any access width divides the buffer


@dataclass(frozen=True)
class Access:
    """One warp-wide access, in every warp that ran it.

    Attributes:
        place: index of the instruction.
        space: ``global`` or ``shared``.
        store: whether it writes.
        width: bytes of a lane.
        addresses: byte addresses of all lanes, ``[programs * threads]``.
        active: lanes that took part; None for all.
        wavefronts: clocks of shared memory where they do not follow from addresses.
    """

    place: int
    space: str
    store: bool
    width: int
    addresses: Array
    active: Array | None
    wavefronts: int = 0


class OutOfBounds(ErnieQuantError):
    """An access outside of the memory that an argument points to."""


@dataclass
class Memory:
    """Global memory, a region for each argument.

    A region without contents reads as zeros and forgets what is written: enough to count accesses
    to arrays that are larger than this machine's memory.
    """

    regions: list[Array | None]
    sizes: list[int]

    @staticmethod
    def address(region: int) -> int:
        """First byte of a region."""
        return (region + 1) << _REGION

    @classmethod
    def of(cls, contents: Iterable[Any]) -> "Memory":
        """Memory for arguments: an array of any dtype is copied, None has no contents."""
        regions: list[Array | None] = []
        sizes = []
        for array in contents:
            if array is None:
                regions.append(None)
                sizes.append(1 << _REGION)
                continue
            raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            room = np.zeros(raw.size + _ROOM + -raw.size % _ROOM, np.uint8)
            room[: raw.size] = raw
            regions.append(room)
            sizes.append(raw.size)
        return cls(regions, sizes)

    def words(
        self, addresses: Array, lanes: Array, width: int, where: str
    ) -> tuple[Array | None, Array]:
        """The buffer that the addresses of some lanes lie in, as words of ``width`` bytes, and
        their indices in it; None for a region without contents."""
        numbers = (addresses >> np.uint64(_REGION)).astype(np.int64) - 1
        number = int(numbers.flat[0])
        if (numbers != number).any() or not 0 <= number < len(self.regions):
            raise OutOfBounds(f"{where}: an address outside of all arguments")
        offsets = (addresses & np.uint64((1 << _REGION) - 1)).astype(np.int64)
        if (offsets % width).any():
            raise OutOfBounds(f"{where}: an address that is not a multiple of {width}")
        if int(offsets.max()) + width > self.sizes[number]:
            raise OutOfBounds(
                f"{where}: byte {int(offsets.max())} of argument {number}, which has "
                f"{self.sizes[number]}"
            )
        region = self.regions[number]
        words = None if region is None else region.view(UNSIGNED[8 * width])
        return words, offsets // width

    def contents(self, region: int, like: Any) -> Any:
        """What an argument holds now, in the shape and dtype of the array that it began with."""
        buffer = self.regions[region]
        if buffer is None:
            raise ErnieQuantError(f"argument {region} has no contents")
        return buffer[: self.sizes[region]].view(like.dtype).reshape(like.shape).copy()


@dataclass
class SharedMemory:
    """Shared memory ``[programs, bytes]`` of programs of ``threads`` lanes."""

    contents: Array
    threads: int

    @classmethod
    def of(cls, programs: int, size: int, threads: int) -> "SharedMemory":
        """Zeros."""
        rounded = max(_ROOM, size + -size % _ROOM)
        return cls(np.zeros((programs, rounded), np.uint8), threads)

    def words(
        self, addresses: Array, lanes: Array, width: int, where: str
    ) -> tuple[Array | None, Array]:
        """As `Memory.words`, each lane in its own program's memory."""
        size = self.contents.shape[1]
        offsets = addresses.astype(np.int64)
        if (offsets % width).any() or int(offsets.max()) + width > size:
            raise OutOfBounds(f"{where}: byte {int(offsets.max())} of {size} shared ones")
        index = (lanes // self.threads * size + offsets) // width
        return self.contents.reshape(-1).view(UNSIGNED[8 * width]), index
