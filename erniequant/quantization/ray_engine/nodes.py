"""The nodes of a Ray cluster that take jobs, some of which come and go during a run."""

import socket
import time
from dataclasses import dataclass
from typing import Any

import ray

from erniequant.errors import ErnieQuantError
from erniequant.progress import Progress

TICK = 2.0
"""Seconds between looks at the nodes."""

PATIENCE = 120.0
"""Seconds without any node after which the run ends; an autoscaler needs one or two minutes."""

SILENCE = 30.0
"""Seconds without the cluster's head after which the run ends: after 60 Ray ends the process."""

CONNECT_SECONDS = 2.0
"""Seconds for a connection to be made."""

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
        ErnieQuantError: there are none.
    """

    def __init__(self, on_gpu: bool, watch: Progress):
        self._on_gpu, self._watch = on_gpu, watch
        self._known = _able(ray.nodes(), on_gpu)
        self._looked = time.monotonic()
        self._silent_since: float | None = None
        self._alone_since: float | None = None
        context = ray.get_runtime_context()
        self._head, self._own = context.gcs_address, context.get_node_id()
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
            ErnieQuantError: there have been none for `PATIENCE`, the cluster's head has been silent
                for `SILENCE`, or the node of this process is lost.
        """
        now = time.monotonic()
        if now - self._looked < TICK:
            return
        self._looked = now
        if not answers(self._head):
            # Ray itself would wait.
            self._silent_since = self._silent_since or now
            if now - self._silent_since > SILENCE:
                raise ErnieQuantError(
                    f"the head of the Ray cluster, {self._head}, is lost; {_GO_ON}"
                )
            return
        self._silent_since = None
        listed = ray.nodes()
        if not any(entry["NodeID"] == self._own and entry["Alive"] for entry in listed):
            raise ErnieQuantError(f"the Ray node of this process is lost; {_GO_ON}")
        before, self._known = self._known, _able(listed, self._on_gpu)
        for id in before.keys() - self._known:
            self._watch.message(f"the node {before[id]} is lost; its jobs are done again")
        for id in self._known.keys() - before:
            self._watch.message(f"the node {self._known[id]} has joined")
        self._alone_since = None if self._known else self._alone_since or now
        if self._alone_since is not None and now - self._alone_since > PATIENCE:
            raise ErnieQuantError(
                f"no node of the Ray cluster has been there for {PATIENCE:.0f} seconds; {_GO_ON}"
            )


def answers(address: str) -> bool:
    """Whether something listens at "host:port"."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS):
            return True
    except (OSError, ValueError):
        return False


def _able(listed: list[dict[str, Any]], on_gpu: bool) -> dict[str, Node]:
    """The nodes that can take jobs."""
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
