"""Every tensor of a source checkpoint on a page: tensors of one kind share a line."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from erniequant.checkpoint.reader import Checkpoint, TensorHeader

_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class TensorGroup:
    """Tensors whose names differ in numbers only, of one shape, type and fate.

    ``names`` is the common name with ``{first..last}`` for numbers that differ.
    """

    names: str
    count: int
    shape: tuple[int, ...]
    dtype: str
    fate: str
    n_bytes: int

    def line(self) -> str:
        """The group as one line of text."""
        return f"{self.fate:8}  {self.count:>5} x {list(self.shape)} {self.dtype}  {self.names}"


def tensor_groups(
    checkpoint: Checkpoint,
    quantized: Iterable[str],
    copied: Iterable[str],
    tuned: Collection[str] = (),
) -> tuple[TensorGroup, ...]:
    """Group all tensors, those to be quantised first, in the order of the files otherwise;
    ``tuned`` are those of ``copied`` that are trained."""
    kinds: dict[tuple[str, str, tuple[int, ...], str], list[TensorHeader]] = {}
    for kind, names in (("quantise", quantized), ("copy", copied)):
        for name in names:
            fate = "tune" if name in tuned else kind
            header = checkpoint.header(name)
            key = (fate, _NUMBER.sub("#", name), header.shape, header.stored_dtype)
            kinds.setdefault(key, []).append(header)
    return tuple(
        TensorGroup(
            _common_name([header.name for header in headers]),
            len(headers),
            shape,
            dtype,
            fate,
            sum(header.n_bytes for header in headers),
        )
        for (fate, _, shape, dtype), headers in kinds.items()
    )


def _common_name(names: list[str]) -> str:
    """The names as one; they differ in numbers only."""
    columns = [sorted(set(map(int, n))) for n in zip(*map(_NUMBER.findall, names), strict=True)]
    ranges = iter(str(n[0]) if len(n) == 1 else f"{{{n[0]}..{n[-1]}}}" for n in columns)
    return _NUMBER.sub(lambda _: next(ranges), names[0])
