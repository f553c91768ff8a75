"""One pass over the layers of a checkpoint, continued where the journal ends.

What is written, in this order, so that a kill at any moment loses at most the experts under way:
an expert's words into their place in a shard, then its line in the journal; after a layer the
hidden states, then their line; a shard gets its name when everything in it is there.
"""

import hashlib
from typing import Any

import torch

from erniequant.calibration.rows import RowPool
from erniequant.calibration.texts import CalibrationWindows
from erniequant.checkpoint.files import sha256_of
from erniequant.checkpoint.scan import CheckedShard, changed_shards, check_shards
from erniequant.checkpoint.shards import ShardFiles
from erniequant.encoding.matrix import QuantizedMatrix
from erniequant.errors import ErnieQuantError
from erniequant.formats.base import stored_parts
from erniequant.models.architecture import EXPERT_MATRICES, ExpertGroup
from erniequant.packing.schema import PROJECTIONS
from erniequant.progress import Progress
from erniequant.quantization.executors import Executor
from erniequant.quantization.expert_job import (
    ExpertJob,
    ExpertLayer,
    ExpertOutcome,
    PackedExpert,
    Routed,
)
from erniequant.quantization.hidden_states import HiddenStates
from erniequant.quantization.job import Job
from erniequant.quantization.layer import LayerInput, layer_context
from erniequant.quantization.report import MatrixReport
from erniequant.resume.workfolder import WorkFolder
from erniequant.system import trim_memory

# What the journal's lines say, by kind of event.
_FACTS: dict[str, dict[str, type]] = {
    "session": {},
    "processor": {"processor": str},
    "checked": {"file": str, "size": int, "mtime_ns": int, "sha256": str},
    "shard": {"file": str, "sha256": str},
    "expert": {
        "layer": int, "expert": int, "tokens": int, "dropped_tokens": int, "sha256": str,
        "gate_up_proj": dict, "down_proj": dict,
    },
    "states": {"layer": int, "sha256": str},
    "layer": {"layer": int, "disk_bytes": int},
}  # fmt: skip


class Run:
    """A quantisation between its plan and its last file."""

    def __init__(
        self,
        job: Job,
        work: WorkFolder,
        shards: ShardFiles,
        watch: Progress,
        executor: Executor,
    ) -> None:
        self.checkpoint, self.model, self.output = job.checkpoint, job.model, job.output
        self.memory, self.device, self.threads = job.memory, job.device, job.threads
        self.work, self.journal, self.shards, self.watch = work, work.journal, shards, watch
        self._executor = executor
        self.journal.require(_FACTS)
        self._pool = RowPool(work.folder if self.memory.tables_on_disk else None)
        self._events = {(e["layer"], e["expert"]): e for e in self.journal.of("expert")}
        self.matrices()  # damage to their lines shows now, not at the end

    @property
    def has_experts(self) -> bool:
        """Whether any expert is finished."""
        return bool(self._events)

    def check_source(self) -> None:
        """Read all weights once, or make sure that they are those read before.

        Raises:
            ErnieQuantError: one is inf or nan, or a file has changed since the run was begun.
        """
        known = [
            CheckedShard(e["file"], e["size"], e["mtime_ns"], e["sha256"])
            for e in self.journal.of("checked")
        ]
        changed = changed_shards(self.checkpoint, known)
        if changed:
            raise ErnieQuantError(
                f"{self.work.folder} holds an unfinished run for other weights: {changed[0]} of "
                "the source has changed. Put it back to continue, or add --restart to start over"
            )
        done = {entry.file for entry in known}
        for found in check_shards(self.checkpoint, self.threads, done):
            self.journal.append("checked", **found.to_dict())

    def copy_tensors(self) -> None:
        """Write everything but experts into the shards that are not finished yet, and check those
        that are.

        Raises:
            ErnieQuantError: a finished shard is not what was written.
        """
        planned = {shard.file for shard in self.shards.shards}
        for event in self.journal.of("shard"):
            path = self.shards.folder / event["file"]
            known = event["file"] in planned and path.is_file()
            if not known or sha256_of(path) != event["sha256"]:
                raise ErnieQuantError(f"{path} is not what this run wrote; use --restart")
        self.output.write_kept(self.shards)
        self._finish_shards(0)

    def quantize_layers(self, windows: CalibrationWindows | None) -> None:
        """Quantise layer after layer; without windows nothing flows and every Hessian is the
        identity."""
        sizes = self.model.sizes
        streams = HiddenStates(
            self.checkpoint, self.model, windows, self.device, self.threads, self._pool
        )
        first = self._first_layer(streams)
        self._check_experts(first)
        self._finish_shards(first)
        for index in range(first, sizes.layers):
            if index in sizes.moe_layers:
                self._quantize_layer(index, streams)
            else:
                streams.through_dense_layer(index)
            if streams.tokens and index + 1 < sizes.layers:
                self.work.save_states(index + 1, streams.tables)
            self.journal.append("layer", layer=index, disk_bytes=self._disk_bytes())
            self._finish_shards(index + 1)

    def matrices(self) -> tuple[MatrixReport, ...]:
        """What the journal says of every matrix, in the order of layers and experts."""
        events = (self._events[key] for key in sorted(self._events))
        return tuple(self._report(event, name) for event in events for name in PROJECTIONS)

    def _report(self, event: dict[str, Any], projection: str) -> MatrixReport:
        return MatrixReport.from_event(
            event, projection, self.model.sizes.groups, self.journal.path
        )

    def disk_peak(self) -> int:
        """The most that the result and the work folder took together, in bytes."""
        return max((event["disk_bytes"] for event in self.journal.of("layer")), default=0)

    def _first_layer(self, streams: HiddenStates) -> int:
        """The layer to go on with; the streams hold what goes into it."""
        layers = self.model.sizes.layers
        finished = {event["layer"] for event in self.journal.of("layer")}
        if layers - 1 in finished:
            first = layers  # which leaves no states behind
        elif not streams.tokens:
            first = len(finished)
        else:
            first = self.work.load_states(streams.tables)
            if not first:
                streams.embed()
        done = [e for e in self._events.values() if e["layer"] < first]
        if self._events:
            under_way = len(self._events) - len(done)
            self.watch.message(f"continuing with layer {first}, {under_way} of its experts done")
        self.watch.advance(len(done), f"layer {first}")
        return first

    def _quantize_layer(self, index: int, streams: HiddenStates) -> None:
        inputs = streams.into_experts(index)
        for group in self.model.sizes.groups:
            self._quantize_group(index, group, inputs, streams)

    def _quantize_group(
        self, index: int, group: ExpertGroup, inputs: LayerInput, streams: HiddenStates
    ) -> None:
        key = group.layer_key(index)
        quantizers = self.output.quantizers(index, group)
        self.output.write_shared(index, group, self.shards)
        context = layer_context(
            inputs, group, quantizers["gate_up_proj"], quantizers["down_proj"], self.device
        )
        layer = ExpertLayer(self.checkpoint, inputs, context, self._pool)
        jobs = (self._expert_job(index, expert, inputs) for expert in group.numbers)
        for outcome in self._executor.run(layer, jobs):
            streams.add(outcome.quantized, outcome.original)
            trim_memory()
            if (index, outcome.expert) not in self._events:
                self._record(index, outcome)
            self.watch.advance(1, f"layer {key} expert {outcome.expert - group.first}")

    def _expert_job(self, layer: int, expert: int, inputs: LayerInput) -> ExpertJob:
        return ExpertJob(
            expert,
            {m: self.model.expert_matrix_name(layer, expert, m) for m in EXPERT_MATRICES},
            Routed(*inputs.quantized.routed_to(expert)),
            Routed(*inputs.original.routed_to(expert)),
            self._packed(layer, expert),
        )

    def _record(self, layer: int, outcome: ExpertOutcome) -> None:
        """Put an expert on the disk, then into the journal."""
        digest = hashlib.sha256()
        names, facts = [], {}
        matrices = (outcome.packed.gate_up, outcome.packed.down)
        for name, matrix in zip(PROJECTIONS, matrices, strict=True):
            for suffix, place in self.output.places(layer, outcome.expert, name).items():
                tensor = matrix.parts[suffix]
                names.append(place.tensor)
                self.shards.write(place.tensor, tensor, place.row or 0)
                digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
            facts[name] = {
                "error": matrix.error, "damping": matrix.damping, "fallback": matrix.fallback
            }  # fmt: skip
        self.shards.sync(names)
        self.journal.append(
            "expert",
            layer=layer,
            expert=outcome.expert,
            tokens=outcome.tokens,
            dropped_tokens=outcome.dropped,
            sha256=digest.hexdigest(),
            **facts,
        )
        self._events[layer, outcome.expert] = self.journal.events[-1]

    def _packed(self, layer: int, expert: int) -> PackedExpert | None:
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
            parts = stored_parts(self.output.places(layer, expert, name), stored)
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
            for place in self.output.places(layer, expert, projection).values()
        ]
        parts = {
            place.tensor: self.shards.read(place.tensor, 0, place.shape[0])
            if place.row is None
            else self.shards.read(place.tensor, place.row, 1)
            for place in places
        }
        if hashlib.sha256(b"".join(parts.values())).hexdigest() != event["sha256"]:
            raise ErnieQuantError(
                f"layer {layer} expert {expert} in {self.shards.folder} is not what this run "
                "wrote; use --restart"
            )
        return parts

    def _check_experts(self, first: int) -> None:
        """Make sure that every expert of the layers before ``first`` is there, and none that the
        model lacks; read back those in unfinished shards, whose checksums are not known yet.

        Raises:
            ErnieQuantError: the journal and the shards do not agree.
        """
        sizes = self.model.sizes
        possible = {(layer, e) for layer in sizes.moe_layers for e in range(sizes.experts)}
        done = {key for key in possible if key[0] < first}
        known = set(self._events)
        if not done <= known <= possible:
            layer, expert = min((done - known) | (known - possible))
            raise ErnieQuantError(
                f"the journal in {self.work.folder} is wrong about layer {layer} expert {expert}; "
                "use --restart"
            )
        for layer, expert in sorted(done):
            places = self.output.places(layer, expert, "down_proj").values()
            if any(not self.shards.finished(self.shards.shard_of(p.tensor)) for p in places):
                self._stored(self._events[layer, expert])

    def _finish_shards(self, layers: int) -> None:
        """Finish every shard whose tensors are all there, ``layers`` layers being done."""
        done = set(self.output.kept())
        for index in self.model.sizes.moe_layers:
            if index < layers:
                done |= self.output.tensors_of(index)
        recorded = {event["file"] for event in self.journal.of("shard")}
        for shard in self.shards.shards:
            if shard.file not in recorded and all(t.name in done for t in shard.tensors):
                self.journal.append("shard", file=shard.file, sha256=self.shards.finish(shard))

    def _disk_bytes(self) -> int:
        folders = {self.work.folder, self.shards.folder}
        files = [p for folder in folders for p in folder.iterdir() if p.is_file()]
        named = sum(path.stat().st_blocks * 512 for path in files)
        return named + self.memory.scratch_bytes
