"""One pass over the layers of a checkpoint, continued where the journal ends.

What is written, in this order, so that a kill at any moment loses at most the experts under way:
an expert's words into their place in a shard, then its line in the journal; after a layer the
hidden states, then their line; a shard gets its name when everything in it is there.
"""

import math
import re

import torch

from erniequant.calibration.rows import RowPool, Rows
from erniequant.calibration.texts import CalibrationWindows
from erniequant.checkpoint.files import sha256_of
from erniequant.checkpoint.overlay import Overlay
from erniequant.checkpoint.scan import CheckedShard, changed_shards, check_shards
from erniequant.checkpoint.shards import ShardFiles
from erniequant.errors import ErnieQuantError
from erniequant.models.architecture import EXPERT_MATRICES, ExpertGroup
from erniequant.progress import Progress
from erniequant.quantization.executors import Executor
from erniequant.quantization.expert import LayerContext
from erniequant.quantization.expert_job import (
    ExpertJob,
    ExpertLayer,
    Routed,
)
from erniequant.quantization.expert_store import ExpertStore
from erniequant.quantization.gradients import gradient_moments
from erniequant.quantization.hidden_states import FEWEST_WINDOWS, HiddenStates
from erniequant.quantization.job import Job
from erniequant.quantization.layer import LayerInput, layer_context
from erniequant.quantization.layer_tuning import train_layer
from erniequant.quantization.model_tuning import train_model
from erniequant.quantization.report import MatrixReport, TunedReport
from erniequant.quantization.tuned_tensors import TunedTensors
from erniequant.resume.workfolder import WorkFolder
from erniequant.system import available_memory, trim_memory
from erniequant.tuning.config import LAYER, MODEL

# What the journal's lines say, by kind of event.
_FACTS: dict[str, dict[str, type]] = {
    "session": {},
    "processor": {"processor": str},
    "checked": {"file": str, "size": int, "mtime_ns": int, "sha256": str},
    "shard": {"file": str, "sha256": str},
    "expert": {
        "layer": int, "expert": int, "tokens": int, "dropped_tokens": int, "sha256": dict,
        "gate_up_proj": dict, "down_proj": dict,
    },
    "tuned": {
        "layer": int, "file": str, "tensors": dict, "before": float, "after": float,
        "epochs": int, "moved": dict,
    },
    "gradient": {"layer": int, "sha256": str},
    "states": {"layer": int, "sha256": str},
    "layer": {"layer": int, "disk_bytes": int},
}  # fmt: skip


_LAYER = re.compile(r"\.layers\.(\d+)\.")


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
        self._tune = job.plan.options.tune
        self._by_gradient = job.plan.options.sensitivity == "gradient"
        self._quantized = job.plan.quantized
        self._tuned = TunedTensors(work, shards, job.output)
        self._pool = RowPool(work.folder if self.memory.tables_on_disk else None)
        self._experts = ExpertStore(work, shards, job.output, job.model.sizes, self._tuned)

    @property
    def has_experts(self) -> bool:
        """Whether any expert is finished."""
        return len(self._experts) > 0

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
        self.output.write_kept(self.shards, self._tuned.names)
        self._finish_shards(0)

    def quantize_layers(self, windows: CalibrationWindows | None) -> None:
        """Quantise layer after layer; without windows nothing flows and every Hessian is the
        identity."""
        sizes = self.model.sizes
        streams = self._streams(windows)
        first = self._first_layer(streams)
        if self._tune != "none" and not streams.fresh:
            self.watch.message(
                f"nothing is trained: that takes {FEWEST_WINDOWS} windows of calibration data"
            )
        if self._by_gradient and streams.tokens:
            self._judge_outputs(streams)
        if self._tune != "none" and streams.fresh:
            self._tuned.require(index for index in sizes.moe_layers if index < first)
        self._experts.check(first)
        self._finish_shards(first)
        for index in range(first, sizes.layers):
            if index in sizes.moe_layers:
                self._quantize_layer(index, streams)
            else:
                streams.through_dense_layer(index)
            if streams.tokens and (index + 1 < sizes.layers or self._tune == "model"):
                self.work.save_states(index + 1, streams.tables)
            self.journal.append("layer", layer=index, disk_bytes=self._disk_bytes())
            self.work.drop_tensors("gradient", index)
            if self._tune != "model":
                self._tuned.drop(index)
            self._finish_shards(index + 1)
        if self._tune == "model":
            if windows is not None and streams.fresh:
                self._tune_model(windows, streams)
            self._finish_shards(sizes.layers + 1)

    def _streams(self, windows: CalibrationWindows | None) -> HiddenStates:
        return HiddenStates(
            self.checkpoint, self.model, windows, self.device, self.threads, self._pool,
            trains=self._tune != "none",
        )  # fmt: skip

    def _judge_outputs(self, streams: HiddenStates) -> None:
        """Run the original backwards, unless that was done before."""
        done = {event["layer"] for event in self.journal.of("gradient")}
        if not done.issuperset(self.model.sizes.moe_layers):
            self.watch.advance(0, "gradients of the original")

            def keep(index: int, moments: torch.Tensor) -> None:
                digest = self.work.save_tensors("gradient", index, {"moments": moments})
                self.journal.append("gradient", layer=index, sha256=digest)

            gradient_moments(
                self.checkpoint, self.model, streams.windows, streams.quantized,
                RowPool(self.work.folder), self.device, self.memory.experts_at_once, keep,
            )  # fmt: skip

    def _gradient(self, index: int) -> torch.Tensor | None:
        """What `_judge_outputs` found for a layer."""
        digests = {e["layer"]: e["sha256"] for e in self.journal.of("gradient")}
        if index not in digests:
            return None
        return self.work.load_tensors("gradient", index, digests[index])["moments"]

    def matrices(self) -> tuple[MatrixReport, ...]:
        """What the journal says of every matrix, in the order of layers and experts."""
        return self._experts.matrices()

    def tuned(self) -> tuple[TunedReport, ...]:
        """What training did, stage after stage."""
        return self._tuned.reports()

    def disk_peak(self) -> int:
        """The most that the result and the work folder took together, in bytes."""
        return max((event["disk_bytes"] for event in self.journal.of("layer")), default=0)

    def _first_layer(self, streams: HiddenStates) -> int:
        """The layer to go on with; the streams hold what goes into it."""
        layers = self.model.sizes.layers
        finished = {event["layer"] for event in self.journal.of("layer")}
        if layers - 1 in finished and self._tune != "model":
            first = layers  # which leaves no states behind
        elif not streams.tokens:
            first = len(finished)
        else:
            first = self.work.load_states(streams.tables)
            if not first:
                streams.embed()
        done = self._experts.before(first)
        if self.has_experts:
            under_way = len(self._experts) - done
            self.watch.message(f"continuing with layer {first}, {under_way} of its experts done")
        self.watch.advance(done, f"layer {first}")
        return first

    def _quantize_layer(self, index: int, streams: HiddenStates) -> None:
        tunes = self._tune != "none" and bool(streams.fresh)
        if self._tuned.event(index) is not None:
            self._tuned.write(index)
        entering = streams.copy_quantized() if tunes else None
        inputs = streams.into_experts(index)
        contexts: dict[int, LayerContext] = {}
        for group in self.model.sizes.groups:
            context = self._quantize_group(index, group, inputs, streams)
            contexts |= dict.fromkeys(group.numbers, context)
        if entering is not None:
            self._tune_layer(index, inputs, contexts, streams, entering)

    def _tune_layer(
        self,
        index: int,
        inputs: LayerInput,
        contexts: dict[int, LayerContext],
        streams: HiddenStates,
        entering: Rows,
    ) -> None:
        """Train what is not packed in a layer, and take the quantised stream through it again."""
        if self._tuned.event(index) is None:
            self.watch.advance(0, f"tuning layer {index}")
            tuned = train_layer(
                self.checkpoint, self.model, self.output, index, self._experts.packed_layer(index),
                streams, entering, self.device, LAYER, self.memory.experts_at_once,
            )  # fmt: skip
            self._tuned.keep(index, tuned)
            self._tuned.write(index)
        parameters = self._tuned.parameters(index)
        if not parameters:
            return
        source = Overlay(self.checkpoint, parameters)
        again = streams.into_tuned_experts(source, index, entering, inputs)
        packed = self._experts.packed_layer(index).experts
        for group in self.model.sizes.groups:
            layer_again = ExpertLayer(self.checkpoint, again, contexts[group.first], self._pool)
            jobs = (
                ExpertJob(n, {}, Routed(*again.quantized.routed_to(n)), None, packed[n])
                for n in group.numbers
            )
            for outcome in self._executor.run(layer_again, jobs):
                streams.add(outcome.quantized, outcome.original)

    def _tune_model(self, windows: CalibrationWindows, streams: HiddenStates) -> None:
        """Train the whole model; ``streams`` have left its last layer."""
        layers = self.model.sizes.layers
        if self._tuned.event(layers) is None:
            self.watch.advance(0, "tuning the model")
            tuned: dict[str, torch.Tensor] = {}
            for index in self.model.sizes.moe_layers:
                tuned |= self._tuned.parameters(index)
            start = self._streams(windows)
            start.embed()
            decoded = 2 * sum(
                math.prod(self.checkpoint.header(name).shape) for name in self._quantized
            )
            outcome = train_model(
                self.checkpoint, self.model, self.output, self._experts.packed_layer, tuned,
                streams.fresh, start.quantized, streams.original, self.device, MODEL,
                self.memory.experts_at_once, decoded < available_memory() / 4,
            )  # fmt: skip
            self._tuned.keep(layers, outcome)
        self._tuned.write(layers)

    def _quantize_group(
        self, index: int, group: ExpertGroup, inputs: LayerInput, streams: HiddenStates
    ) -> LayerContext:
        key = group.layer_key(index)
        quantizers = self.output.quantizers(index, group)
        self.output.write_shared(index, group, self.shards)
        context = layer_context(
            inputs, group, quantizers["gate_up_proj"], quantizers["down_proj"], self.device,
            self._gradient(index),
        )  # fmt: skip
        layer = ExpertLayer(self.checkpoint, inputs, context, self._pool)
        jobs = (self._expert_job(index, expert, inputs) for expert in group.numbers)
        for outcome in self._executor.run(layer, jobs):
            streams.add(outcome.quantized, outcome.original)
            trim_memory()
            if (index, outcome.expert) not in self._experts:
                self._experts.record(index, outcome)
            self.watch.advance(1, f"layer {key} expert {outcome.expert - group.first}")
        return context

    def _expert_job(self, layer: int, expert: int, inputs: LayerInput) -> ExpertJob:
        return ExpertJob(
            expert,
            {m: self.model.expert_matrix_name(layer, expert, m) for m in EXPERT_MATRICES},
            Routed(*inputs.quantized.routed_to(expert)),
            Routed(*inputs.original.routed_to(expert)),
            self._experts.packed(layer, expert),
        )

    def _finish_shards(self, layers: int) -> None:
        """Finish every shard whose tensors are all there, ``layers`` layers being done."""
        done = set(self.output.kept())
        for index in self.model.sizes.moe_layers:
            if index < layers:
                done |= self.output.tensors_of(index)
        if self._tune != "none":
            # What is not packed changes when its layer is trained.
            last = self.model.sizes.layers if self._tune == "model" else 0
            done = {name for name in done if max(_layer_of(name), last) < layers}
        recorded = {event["file"] for event in self.journal.of("shard")}
        for shard in self.shards.shards:
            if shard.file not in recorded and all(t.name in done for t in shard.tensors):
                self.journal.append("shard", file=shard.file, sha256=self.shards.finish(shard))

    def _disk_bytes(self) -> int:
        folders = {self.work.folder, self.shards.folder}
        files = [p for folder in folders for p in folder.iterdir() if p.is_file()]
        named = sum(path.stat().st_blocks * 512 for path in files)
        return named + self.memory.scratch_bytes


def _layer_of(name: str) -> int:
    """The layer that a tensor belongs to, -1 for one of none."""
    found = _LAYER.search(name)
    return int(found[1]) if found else -1
