"""A format is two things: `Format`, the verbs for checkpoints in it, and `OutputFormat`, the layout
of one result: its tensors, the slots of an expert's matrices, and their codes."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from erniequant.checkpoint.layout import PlannedShard
from erniequant.checkpoint.reader import Checkpoint
from erniequant.checkpoint.shards import ShardFiles
from erniequant.encoding.matrix import MatrixQuantizer
from erniequant.errors import ErnieQuantError
from erniequant.formats.plan import Plan, QuantizeOptions
from erniequant.formats.results import ExportReport, ModelSummary, VerifyReport, WrittenShards
from erniequant.models.architecture import Architecture, ExpertGroup

EXPORT_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Types of plain checkpoints that `erniequant.export` writes."""


@dataclass(frozen=True)
class ReadOptions:
    """Facts about a checkpoint that its files may not record.

    Attributes:
        k_order: the order of inputs in FastDeploy's WINT2: "plain" or "mma64".
        reference: the original, from which the order can be detected.
    """

    k_order: str | None = None
    reference: str | Path | None = None


@dataclass(frozen=True)
class TensorSlot:
    """The storage of one part of a coded matrix: a tensor, or one row of it."""

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
    def write_kept(self, shards: ShardFiles, but: Collection[str] = ()) -> None:
        """Write these into the shards that are not finished; ``but`` are left as they are."""

    @abstractmethod
    def stored(self, trained: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors of the result, by name, that hold tensors of the source which were trained;
        ``trained`` are those by name, in the source's dtypes."""

    @abstractmethod
    def tensors_of(self, layer: int) -> frozenset[str]:
        """Tensors of the result that hold the experts of a layer."""

    @abstractmethod
    def quantizers(self, layer: int, group: ExpertGroup) -> dict[str, MatrixQuantizer]:
        """Coders for the matrices of a group of experts, by projection."""

    @abstractmethod
    def write_shared(self, layer: int, group: ExpertGroup, shards: ShardFiles) -> None:
        """Write the tensors that all experts of a group share."""

    @abstractmethod
    def places(self, layer: int, expert: int, projection: str) -> dict[str, TensorSlot]:
        """Slots for the parts of an expert's matrix, by suffix; ``expert`` counts within a
        layer."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """config.json of the result."""


class Format(ABC):
    """Everything that depends on the format of a checkpoint.

    Attributes:
        name: as `--format` has it.
        title: for people.
        own_options: options of `quantize` that no other format has.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    own_options: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def recognises(self, config: Mapping[str, Any]) -> bool:
        """True if a config.json describes a checkpoint of this format."""

    @abstractmethod
    def check(self, options: QuantizeOptions) -> None:
        """Raises ErnieQuantError for options that this format does not have."""

    @abstractmethod
    def output(
        self, checkpoint: Checkpoint, model: Architecture, options: QuantizeOptions
    ) -> tuple[OutputFormat, Plan]:
        """The layout of a result, and the plan for it.

        Raises:
            ErnieQuantError: the model does not fit the format.
        """

    @abstractmethod
    def load(
        self,
        source: str | Path,
        device: torch.device,
        dtype: torch.dtype | str,
        read: ReadOptions,
    ) -> tuple[Any, Path]:
        """The transformers model with packed experts, and the folder that it came from."""

    @abstractmethod
    def inspect(self, source: str | Path) -> ModelSummary:
        """Summary of a checkpoint, from its headers."""

    @abstractmethod
    def verify(self, source: str | Path, reference: str | Path | None) -> VerifyReport:
        """Problems of a checkpoint; with its original, also the error of every matrix."""

    @abstractmethod
    def export(
        self,
        source: str | Path,
        destination: str | Path,
        to: str,
        read: ReadOptions,
        max_shard_bytes: int,
    ) -> ExportReport:
        """Write a plain checkpoint in one of `EXPORT_DTYPES`."""

    def reshard(
        self, source: str | Path, destination: str | Path, ranks: int, read: ReadOptions
    ) -> WrittenShards:
        """Write a checkpoint of this format once more, cut for several ranks."""
        raise ErnieQuantError(f"checkpoints of the format {self.name} are not cut; use them whole")

    @abstractmethod
    def encoder_bytes(self, inputs: int) -> int:
        """Memory that coding a matrix with ``inputs`` inputs takes beside its moments and
        weights."""

    @abstractmethod
    def encode_rate(self, options: QuantizeOptions) -> float:
        """Weights per second and core that the search finds, roughly."""


def stored_parts(
    places: Mapping[str, TensorSlot], stored: Mapping[str, bytes]
) -> dict[str, torch.Tensor]:
    """Parts of a matrix by suffix, from the bytes of their tensors by name."""
    return {
        suffix: torch.frombuffer(bytearray(stored[slot.tensor]), dtype=slot.dtype).view(slot.shape)
        for suffix, slot in places.items()
    }
