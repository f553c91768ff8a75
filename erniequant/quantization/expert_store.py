"""Packed experts between the search and the end of a run: in the shards and in the journal."""

import hashlib
from typing import Any

import torch

from erniequant.checkpoint.shards import ShardFiles
from erniequant.encoding.matrix import QuantizedMatrix
from erniequant.errors import ErnieQuantError
from erniequant.formats.base import OutputFormat, stored_parts
from erniequant.models.architecture import ModelSizes
from erniequant.packing.schema import PROJECTIONS
from erniequant.quantization.expert_job import ExpertOutcome, PackedExpert
from erniequant.quantization.layer_tuning import PackedLayer
from erniequant.quantization.report import MatrixReport
from erniequant.quantization.tuned_tensors import TunedTensors
from erniequant.resume.workfolder import WorkFolder


class ExpertStore:
    """The experts that are finished. An expert is first on the disk, then in the journal."""

    def __init__(
        self,
        work: WorkFolder,
        shards: ShardFiles,
        output: OutputFormat,
        sizes: ModelSizes,
        tuned: TunedTensors,
    ):
        self._work, self._shards, self._output = work, shards, output
        self._sizes, self._tuned = sizes, tuned
        self._events = {(e["layer"], e["expert"]): e for e in work.journal.of("expert")}
        self.matrices()  # damage to their lines shows now, not at the end

    def __len__(self) -> int:
        return len(self._events)

    def __contains__(self, key: tuple[int, int]) -> bool:
        """Whether an expert, by layer and number, is finished."""
        return key in self._events

    def before(self, layer: int) -> int:
        """Number of finished experts of the layers before one."""
        return sum(index < layer for index, _ in self._events)

    def matrices(self) -> tuple[MatrixReport, ...]:
        """What the journal says of every matrix, in the order of layers and experts."""
        events = (self._events[key] for key in sorted(self._events))
        return tuple(self._report(event, name) for event in events for name in PROJECTIONS)

    def _report(self, event: dict[str, Any], projection: str) -> MatrixReport:
        return MatrixReport.from_event(
            event, projection, self._sizes.groups, self._work.journal.path
        )

    def record(self, layer: int, outcome: ExpertOutcome) -> None:
        """Put an expert on the disk, then into the journal."""
        digests: dict[str, str] = {}
        facts = {}
        matrices = (outcome.packed.gate_up, outcome.packed.down)
        for name, matrix in zip(PROJECTIONS, matrices, strict=True):
            for suffix, place in self._output.places(layer, outcome.expert, name).items():
                tensor = matrix.parts[suffix]
                self._shards.write(place.tensor, tensor, place.row or 0)
                data = tensor.contiguous().view(torch.uint8).numpy().data
                digests[place.tensor] = hashlib.sha256(data).hexdigest()
            facts[name] = {
                "error": matrix.error, "damping": matrix.damping, "fallback": matrix.fallback
            }  # fmt: skip
        self._shards.sync(list(digests))
        self._work.journal.append(
            "expert",
            layer=layer,
            expert=outcome.expert,
            tokens=outcome.tokens,
            dropped_tokens=outcome.dropped,
            sha256=digests,
            **facts,
        )
        self._events[layer, outcome.expert] = self._work.journal.events[-1]

    def packed(self, layer: int, expert: int) -> PackedExpert | None:
        """An expert that was finished before a restart, read back; None if it was not.

        Raises:
            ErnieQuantError: what is on the disk is not what was written.
        """
        event = self._events.get((layer, expert))
        if event is None:
            return None
        stored = self._stored(event)
        matrices = []
        for name in PROJECTIONS:
            parts = stored_parts(self._output.places(layer, expert, name), stored)
            told = self._report(event, name)
            matrix = QuantizedMatrix(parts, torch.empty(0), told.error, told.damping, told.fallback)
            matrices.append(matrix)
        return PackedExpert(*matrices)

    def _stored(self, event: dict[str, Any]) -> dict[str, bytes]:
        """The bytes of an expert in the shards, by name of the tensor.

        Raises:
            ErnieQuantError: they are not those that were written.
        """
        layer, expert = event["layer"], event["expert"]
        places = [
            place
            for projection in PROJECTIONS
            for place in self._output.places(layer, expert, projection).values()
        ]
        parts = {
            place.tensor: self._shards.read(place.tensor, 0, place.shape[0])
            if place.row is None
            else self._shards.read(place.tensor, place.row, 1)
            for place in places
        }
        for name, data in parts.items():
            known = event["sha256"].get(name)
            if name not in self._tuned.names and hashlib.sha256(data).hexdigest() != known:
                raise ErnieQuantError(
                    f"layer {layer} expert {expert} in {self._shards.folder} is not what this run "
                    "wrote; use --restart"
                )
        return parts

    def check(self, first: int) -> None:
        """Make sure that every expert of the layers before ``first`` is there, and none that the
        model lacks; read back those in unfinished shards, whose checksums are not known yet.

        Raises:
            ErnieQuantError: the journal and the shards do not agree.
        """
        sizes = self._sizes
        possible = {(layer, e) for layer in sizes.moe_layers for e in range(sizes.experts)}
        done = {key for key in possible if key[0] < first}
        known = set(self._events)
        if not done <= known <= possible:
            layer, expert = min((done - known) | (known - possible))
            raise ErnieQuantError(
                f"the journal in {self._work.folder} is wrong about layer {layer} expert {expert}; "
                "use --restart"
            )
        for layer, expert in sorted(done):
            places = self._output.places(layer, expert, "down_proj").values()
            if any(not self._shards.finished(self._shards.shard_of(p.tensor)) for p in places):
                self._stored(self._events[layer, expert])
        self._tuned.check(range(first))

    def packed_layer(self, index: int) -> PackedLayer:
        """All experts of a layer, read back."""
        experts, quantizers = {}, {}
        for group in self._sizes.groups:
            both = self._output.quantizers(index, group)
            for number in group.numbers:
                packed = self.packed(index, number)
                assert packed is not None
                experts[number] = packed
                quantizers[number] = both["gate_up_proj"], both["down_proj"]
        return PackedLayer(experts, quantizers)
