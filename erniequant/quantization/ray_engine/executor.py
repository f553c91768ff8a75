"""Jobs as tasks of a Ray cluster, one core each.

A layer's tables are put into the object store once, and Ray copies them to each node that asks for
them. A task whose worker or node dies is done again by Ray. Nothing else is shared: no task waits
for another.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from erniequant.errors import ErnieQuantError
from erniequant.models.architecture import TensorSource
from erniequant.progress import Progress
from erniequant.quantization.expert_job import ExpertJob, ExpertLayer, ExpertOutcome
from erniequant.quantization.layer import LayerInput
from erniequant.quantization.ray_engine.cluster import ask
from erniequant.quantization.ray_engine.matrices import Reader
from erniequant.quantization.ray_engine.nodes import TICK, Nodes
from erniequant.quantization.ray_engine.parcels import pack, unpack
from erniequant.quantization.ray_engine.worker import (
    Errand,
    Reply,
    Setting,
    do_job,
    this_machine,
)

RETRIES = 3
"""Times that a job is done again after its worker or node has died."""

SPARE = 2
"""Jobs sent beyond one for every core, so that a core finds its next one there."""

FETCH_SECONDS = 60.0
"""Seconds for an outcome to arrive before the nodes are looked at again."""


@dataclass(eq=False)
class _Sent:
    """A job on its way: Ray's reference to the reply, or the error that kept it from being sent."""

    job: ExpertJob
    reference: Any = None
    error: ErnieQuantError | None = None
    ended: bool = False


class RayExecutor:
    """See `Executor`; the cluster is the one that Ray is connected to."""

    def __init__(self, source: TensorSource, on_gpu: bool, watch: Progress):
        """Ask the nodes what they are and whether they see the files of ``source``, and tell
        ``watch``.

        Raises:
            ErnieQuantError: no node can take jobs, or one has other versions of packages.
        """
        self._watch, self._machine = watch, this_machine()
        self._processors = {self._machine.processor}
        self._nodes = Nodes(on_gpu, watch)
        self._source, self._reader = source, Reader(source)
        self._tables: WeakKeyDictionary[LayerInput, Any] = WeakKeyDictionary()
        self._way: deque[_Sent] = deque()
        self._sends = False
        self._task = ray.remote(
            num_cpus=1, num_gpus=self._nodes.gpu_share, max_retries=RETRIES
        )(do_job)  # fmt: skip
        self._introduce()

    def _introduce(self) -> None:
        file = self._reader.first_file()
        answers = ask(self._nodes.all, file)
        for node, answer in answers.items():
            answer.machine.require_versions_of(self._machine, node.address)
        blind = [node.address for node, answer in answers.items() if not answer.sees]
        self._sends = file is None or bool(blind)
        found = "all nodes read the source themselves"
        if self._sends:
            found = "this process reads the source and sends its matrices"
        if blind:
            found += f", because {blind[0]} does not see the same files"
        self._watch.message(f"engine ray: {self._nodes}; {found}")
        for node, answer in answers.items():
            self._meet(answer.machine.processor, node.id)

    def _meet(self, processor: str, node: str) -> None:
        """Warn of a kind of processor that was not there before."""
        if processor not in self._processors:
            self._processors.add(processor)
            self._watch.message(
                f"{self._nodes.address(node)} has another kind of processor ({processor}, here "
                f"{self._machine.processor}); the result is sound, but not bit-identical to one "
                "made on either"
            )

    def at_work(self) -> str:
        """The nodes and cores at work, in words; empty between layers."""
        jobs = sum(not sent.ended for sent in self._way)
        return self._nodes.at_work(jobs) if jobs else ""

    def run(self, layer: ExpertLayer, jobs: Iterable[ExpertJob]) -> Iterator[ExpertOutcome]:
        """See `Executor`."""
        if layer.source is not self._source:
            self._source, self._reader = layer.source, Reader(layer.source)
        shared = self._shared(layer)
        way = self._way = deque()
        coming = iter(jobs)
        try:
            while True:
                while self._has_room(way) and (job := next(coming, None)) is not None:
                    way.append(self._send(job, shared))
                if not way:
                    return
                if not way[0].ended:
                    self._wait(way)
                    continue
                first = way.popleft()
                outcome = self._outcome(first)
                if outcome is None:
                    way.appendleft(self._send(first.job, shared))
                else:
                    yield outcome
        finally:
            # Jobs under way end with the connection. Ray 2.60 has a cancellation, but one that met
            # the end of its task ended this process: "Tried to complete task that was not pending".
            way.clear()

    def _shared(self, layer: ExpertLayer) -> tuple[Any, Any]:
        """References to the layer's tables, and to everything else that its jobs share."""
        if layer.inputs not in self._tables:
            # Workers have nothing to release.
            self._tables[layer.inputs] = ray.put(pack(replace(layer.inputs, tables=())))
        setting = Setting(layer.context, layer.pool.folder is not None, self._machine)
        return self._tables[layer.inputs], ray.put(pack(setting))

    def _has_room(self, way: deque[_Sent]) -> bool:
        """Outcomes that wait for an earlier one hold tables, so there are few of these too."""
        most = self._nodes.cores + SPARE
        return sum(not sent.ended for sent in way) < most and len(way) < 2 * most

    def _send(self, job: ExpertJob, shared: tuple[Any, Any]) -> _Sent:
        names = list(job.matrices.values())
        try:
            stored = None if self._sends else self._reader.stored(names)
            errand = Errand(job, stored or self._reader.sent(names))
        except ErnieQuantError as error:
            return _Sent(job, error=error, ended=True)
        return _Sent(job, self._task.remote(*shared, pack(errand)))

    def _wait(self, way: deque[_Sent]) -> None:
        """Wait for the end of a job, or for a moment."""
        open_ = {sent.reference: sent for sent in way if not sent.ended}
        done, _ = ray.wait(list(open_), num_returns=1, timeout=TICK, fetch_local=False)
        for reference in done:
            open_[reference].ended = True
        self._nodes.look()

    def _outcome(self, sent: _Sent) -> ExpertOutcome | None:
        """What became of a job; None if its matrices have to be sent with it.

        Raises:
            ErnieQuantError: the job's own, or Ray has given it up.
        """
        if sent.error is not None:
            raise sent.error
        reply = self._reply(sent)
        self._meet(reply.processor, reply.node)
        if reply.error is not None:
            raise reply.error
        if reply.outcome is not None:
            return unpack(reply.outcome)
        if not self._sends:
            self._sends = True
            self._watch.message(
                f"{self._nodes.address(reply.node)} does not see the source's files: this process "
                "reads them from now on"
            )
        return None

    def _reply(self, sent: _Sent) -> Reply:
        while True:
            try:
                return ray.get(sent.reference, timeout=FETCH_SECONDS)
            except GetTimeoutError:
                self._nodes.look()
            except RayTaskError as error:
                raise error.cause or error from error
            except RayError as error:
                lines = str(error).strip().splitlines() or [type(error).__name__]
                raise ErnieQuantError(
                    f"Ray gave up expert {sent.job.expert} after {RETRIES + 1} attempts "
                    f"({lines[0]}); repeat the command to continue where it stopped"
                ) from error
