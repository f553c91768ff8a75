"""Global and shared memory of the interpreter, and the list of accesses to it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
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
    """

    place: int
    space: str
    store: bool
    width: int
    addresses: Array
    active: Array | None


class OutOfBounds(ErnieQuantError):
    """An access outside of the memory that an argument points to."""


@dataclass
class Memory:
    """Memory of arguments by region, and shared memory of each program.

    A region without contents reads as zeros and forgets what is written: enough to count accesses
    to arrays that are larger than this machine's memory.
    """

    regions: list[Array | None]
    sizes: list[int]
    shared: Array
    accesses: list[Access] = field(default_factory=list)

    @staticmethod
    def address(region: int) -> int:
        """First byte of a region."""
        return (region + 1) << _REGION

    @classmethod
    def of(cls, contents: Iterable[Any], programs: int, shared_bytes: int) -> "Memory":
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
        size = shared_bytes + -shared_bytes % _ROOM
        return cls(regions, sizes, np.zeros((programs, max(size, _ROOM)), np.uint8))

    def _global(self, addresses: Array, width: int, where: str) -> tuple[Array | None, Array]:
        """The buffer that all addresses lie in, as words of ``width``, and their indices."""
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

    def _shared(
        self, addresses: Array, lanes: Array, width: int, where: str
    ) -> tuple[Array, Array]:
        size = self.shared.shape[1]
        offsets = addresses.astype(np.int64)
        if (offsets % width).any() or int(offsets.max()) + width > size:
            raise OutOfBounds(f"{where}: byte {int(offsets.max())} of {size} shared ones")
        threads = self.lanes // self.shared.shape[0]
        program = lanes // threads
        return self.shared.reshape(-1).view(UNSIGNED[8 * width]), (
            program * size + offsets
        ) // width

    lanes: int = 0
    """Lanes of all programs together, set by the machine."""

    def words(
        self, space: str, addresses: Array, lanes: Array, width: int, where: str
    ) -> tuple[Array | None, Array]:
        """The buffer and indices of words of ``width`` bytes (at most 8) for some lanes."""
        if space == "shared":
            return self._shared(addresses, lanes, width, where)
        return self._global(addresses, width, where)

    def load(self, space: str, addresses: Array, lanes: Array, width: int, where: str) -> Array:
        """One word of each lane."""
        words, index = self.words(space, addresses, lanes, width, where)
        return np.zeros(index.shape, UNSIGNED[8 * width]) if words is None else words[index]

    def store(
        self, space: str, addresses: Array, lanes: Array, width: int, value: Array, where: str
    ) -> None:
        """Write one word of each lane; the highest lane wins."""
        words, index = self.words(space, addresses, lanes, width, where)
        if words is not None:
            words[index] = value

    def contents(self, region: int, like: Any) -> Any:
        """What an argument holds now, in the shape and dtype of the array that it began with."""
        buffer = self.regions[region]
        if buffer is None:
            raise ErnieQuantError(f"argument {region} has no contents")
        return buffer[: self.sizes[region]].view(like.dtype).reshape(like.shape).copy()
