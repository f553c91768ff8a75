"""How a result is laid out: which tensors it has, where a matrix of an expert goes among them, and
how it is coded."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from erniequant.checkpoint.layout import PlannedShard
from erniequant.checkpoint.shards import ShardFiles
from erniequant.encoding.matrix import MatrixQuantizer
from erniequant.models.architecture import ExpertGroup


@dataclass(frozen=True)
class Place:
    """Where one part of a coded matrix is stored: a tensor, or one row of it."""

    tensor: str
    row: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype


class OutputFormat(ABC):
    """The layout of one result."""

    @abstractmethod
    def shards(self, max_bytes: int) -> tuple[PlannedShard, ...]:
        """The files of the result."""

    @abstractmethod
    def kept(self) -> frozenset[str]:
        """Tensors of the result that hold no weights of experts that are quantised."""

    @abstractmethod
    def write_kept(self, shards: ShardFiles) -> None:
        """Write these into the shards that are not finished."""

    @abstractmethod
    def tensors_of(self, layer: int) -> frozenset[str]:
        """Tensors of the result that hold the experts of a layer."""

    @abstractmethod
    def quantizers(self, layer: int, group: ExpertGroup) -> dict[str, MatrixQuantizer]:
        """How the matrices of a group of experts are coded, by projection."""

    @abstractmethod
    def write_shared(self, layer: int, group: ExpertGroup, shards: ShardFiles) -> None:
        """Write what all experts of a group have in common."""

    @abstractmethod
    def places(self, layer: int, expert: int, projection: str) -> dict[str, Place]:
        """Where the parts of an expert's matrix go, by suffix; ``expert`` counts within a layer."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """config.json of the result."""


def stored_parts(
    places: Mapping[str, Place], stored: Mapping[str, bytes]
) -> dict[str, torch.Tensor]:
    """Parts of a matrix by suffix, from the bytes of their tensors by name."""
    return {
        suffix: torch.frombuffer(bytearray(stored[place.tensor]), dtype=place.dtype).view(
            place.shape
        )
        for suffix, place in places.items()
    }
