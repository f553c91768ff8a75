"""Tensors of the result that were trained, on their way into its shards.

They are first kept in the work folder, then named in the journal, then written into the shards,
over what is there. A kill in between loses nothing: they are written again.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from erniequant.checkpoint.shards import ShardFiles
from erniequant.errors import ErnieQuantError
from erniequant.formats.base import OutputFormat
from erniequant.quantization.report import TUNED_KEYS, TunedReport
from erniequant.resume.workfolder import WorkFolder

_PARAMETER, _SCALE = "parameter:", "scale:"


@dataclass(frozen=True, eq=False)
class Tuned:
    """The outcome of a stage.

    Attributes:
        parameters: trained tensors by their names in the source, in its dtypes.
        scales: tensors of the result that hold output scales of experts.
        facts: for the report.
    """

    parameters: Mapping[str, torch.Tensor]
    scales: dict[str, torch.Tensor]
    facts: Mapping[str, Any]


class TunedTensors:
    """What training has made so far, by stage: the number of a layer, or the number of layers for
    the whole model."""

    def __init__(self, work: WorkFolder, shards: ShardFiles, output: OutputFormat):
        self._work, self._shards, self._output = work, shards, output
        self._events = {event["layer"]: event for event in work.journal.of("tuned")}

    @property
    def names(self) -> frozenset[str]:
        """Tensors of the result that do not hold what was written first."""
        return frozenset(name for event in self._events.values() for name in event["tensors"])

    def event(self, stage: int) -> dict[str, Any] | None:
        """What the journal says of a stage; None before `keep`."""
        return self._events.get(stage)

    def reports(self) -> tuple[TunedReport, ...]:
        """What training did, stage after stage."""
        return tuple(
            TunedReport(*(self._events[stage][key] for key in TUNED_KEYS))
            for stage in sorted(self._events)
        )

    def keep(self, stage: int, tuned: Tuned) -> None:
        """Record the outcome of a stage."""
        named = {f"{_PARAMETER}{name}": tensor for name, tensor in tuned.parameters.items()}
        named |= {f"{_SCALE}{name}": tensor for name, tensor in tuned.scales.items()}
        stored = self._output.stored(tuned.parameters) | tuned.scales
        digest = self._work.save_tensors("tuned", stage, named)
        self._work.journal.append(
            "tuned",
            layer=stage,
            file=digest,
            tensors={name: _sha256(tensor) for name, tensor in stored.items()},
            **tuned.facts,
        )
        self._events[stage] = self._work.journal.events[-1]

    def parameters(self, stage: int) -> dict[str, torch.Tensor]:
        """Trained parameters of a stage by their names in the source; none if it changed
        nothing."""
        return self._load(stage, _PARAMETER)

    def write(self, stage: int) -> None:
        """Put what a stage made into the shards; doing it again changes nothing, nor do shards that
        were finished since."""
        stored = self._output.stored(self.parameters(stage)) | self._load(stage, _SCALE)
        names = [n for n in stored if not self._shards.finished(self._shards.shard_of(n))]
        for name in names:
            self._shards.write(name, stored[name])
        self._shards.sync(names)

    def _load(self, stage: int, kind: str) -> dict[str, torch.Tensor]:
        kept = self._work.load_tensors("tuned", stage, self._events[stage]["file"])
        return {n.removeprefix(kind): t for n, t in kept.items() if n.startswith(kind)}

    def drop(self, stage: int) -> None:
        """Forget the file of a stage whose tensors are in the shards for good."""
        self._work.drop_tensors("tuned", stage)

    def require(self, layers: Iterable[int]) -> None:
        """Make sure that the journal tells of all these layers.

        Raises:
            ErnieQuantError: it does not.
        """
        for layer in layers:
            if layer not in self._events:
                raise ErnieQuantError(
                    f"the journal in {self._work.folder} does not say how layer {layer} was "
                    "trained; use --restart"
                )

    def check(self, stages: range) -> None:
        """Make sure that the shards hold what stages made, the last of them where several trained
        one tensor. Tensors of later stages may be half-written; `write` mends them.

        Raises:
            ErnieQuantError: they do not.
        """
        last: dict[str, str] = {}
        for stage in sorted(self._events):
            if stage in stages:
                last |= self._events[stage]["tensors"]
        later = {
            n for s, event in self._events.items() if s not in stages for n in event["tensors"]
        }
        for name in last.keys() - later:
            if hashlib.sha256(self._shards.read_whole(name)).hexdigest() != last[name]:
                raise ErnieQuantError(
                    f"{name} in {self._shards.folder} is not what this run wrote; use --restart"
                )


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()
