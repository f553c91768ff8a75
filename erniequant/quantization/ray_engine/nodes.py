"""The nodes of a Ray cluster that take jobs, some of which come and go during a run."""

import time
from dataclasses import dataclass

import ray

from erniequant.errors import ErnieQuantError, wrap_errors
from erniequant.progress import Progress

TICK = 2.0
"""Seconds between looks at the nodes."""

PATIENCE = 120.0
"""Seconds without any node after which the run ends; an autoscaler needs one or two minutes."""

_GO_ON = "repeat the command to continue where it stopped"


@dataclass(frozen=True)
class Node:
    """A node: its id in Ray, where it is, how many jobs it takes at once, and its GPUs."""

    id: str
    address: str
    cores: int
    gpus: float

    def __str__(self) -> str:
        return f"{self.address} ({_plural(self.cores, 'core')})"


class Nodes:
    """Those that are there.

    Raises:
        ErnieQuantError: there are none, or the cluster does not answer.
    """

    def __init__(self, on_gpu: bool, watch: Progress):
        self._on_gpu, self._watch = on_gpu, watch
        self._known = _nodes(on_gpu)
        self._looked = self._seen = time.monotonic()
        if not self._known:
            lacking = "has a GPU; use --device cpu" if on_gpu else "has a core for jobs"
            raise ErnieQuantError(f"no node of the Ray cluster {lacking}")

    def __str__(self) -> str:
        return f"{_plural(len(self._known), 'node')}, {_plural(self.cores, 'core')}"

    @property
    def cores(self) -> int:
        """Jobs that can be done at once."""
        return sum(node.cores for node in self._known.values())

    @property
    def all(self) -> list[Node]:
        """The nodes."""
        return list(self._known.values())

    @property
    def gpu_share(self) -> float:
        """The part of a GPU that a job asks for, so that all cores of every node can be at work;
        0 on the CPU. Ray counts in ten thousandths."""
        if not self._on_gpu:
            return 0.0
        share = min(node.gpus / node.cores for node in self._known.values())
        return max(int(min(share, 1.0) * 10_000), 1) / 10_000

    def at_work(self, jobs: int) -> str:
        """How much of them so many jobs keep at work, in words."""
        return (
            f"{_plural(len(self._known), 'node')}, {min(jobs, self.cores)} of "
            f"{_plural(self.cores, 'core')} at work"
        )

    def address(self, id: str) -> str:
        """Where a node is, or was."""
        node = self._known.get(id)
        return node.address if node else "a node that has left"

    def look(self) -> None:
        """Tell the observer which have come and gone, every few seconds.

        Raises:
            ErnieQuantError: there have been none for `PATIENCE`, or the cluster does not answer.
        """
        now = time.monotonic()
        if now - self._looked < TICK:
            return
        before, self._known, self._looked = self._known, _nodes(self._on_gpu), now
        for id in before.keys() - self._known:
            self._watch.message(f"the node {before[id]} is lost; its jobs are done again")
        for id in self._known.keys() - before:
            self._watch.message(f"the node {self._known[id]} has joined")
        if self._known:
            self._seen = now
        elif now - self._seen > PATIENCE:
            raise ErnieQuantError(
                f"no node of the Ray cluster has been there for {PATIENCE:.0f} seconds; {_GO_ON}"
            )


def _nodes(on_gpu: bool) -> dict[str, Node]:
    with wrap_errors(f"the Ray cluster is lost; {_GO_ON}"):
        listed = ray.nodes()
    found = {}
    for entry in listed:
        resources = entry["Resources"]
        cores, gpus = int(resources.get("CPU", 0)), resources.get("GPU", 0.0)
        if entry["Alive"] and cores and (gpus or not on_gpu):
            id = entry["NodeID"]
            found[id] = Node(id, entry["NodeManagerAddress"], cores, gpus)
    return found


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"
