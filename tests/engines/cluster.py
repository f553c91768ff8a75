"""A Ray cluster on this machine: a head without cores and two nodes of one core each."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

STORE_BYTES = 80_000_000
PATIENCE = 60
"""Seconds after which something that should have happened has not."""


def start() -> Cluster:
    """The cluster, with its files in ``RAY_TMPDIR``."""
    head = dict(num_cpus=0, object_store_memory=STORE_BYTES, include_dashboard=False)
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        add_node(cluster)
    return cluster


def add_node(cluster: Cluster) -> Any:
    return cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)


def processes(word: str) -> list[int]:
    """Ids of processes that have a word in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if entry.name.isdigit() and word.encode() in command:
            found.append(int(entry.name))
    return found


def eventually(true: Callable[[], Any]) -> bool:
    """Whether something becomes true within `PATIENCE`."""
    end = time.monotonic() + PATIENCE
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def alive(process: int) -> bool:
    """Whether a process runs: a dead one may wait for its parent to notice."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


class Wrapped:
    """A quantiser that another event comes before; made anew in each worker from its pickle."""

    def __init__(self, quantizer: Any, folder: Path):
        self.quantizer, self.folder = quantizer, folder

    def __getattr__(self, name: str) -> Any:
        # While it is unpickled it has no attributes yet.
        if name == "quantizer":
            raise AttributeError(name)
        return getattr(self.quantizer, name)

    def quantize(self, *arguments: Any) -> Any:
        self.event()
        return self.quantizer.quantize(*arguments)

    def first(self, name: str) -> bool:
        """Whether nobody has asked for this name before, in any process."""
        try:
            with (self.folder / name).open("x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            return False
        return True

    def event(self) -> None:
        raise NotImplementedError


class Dying(Wrapped):
    """The worker of the third matrix is killed, once."""

    def event(self) -> None:
        if not any(self.first(name) for name in ("one", "two")) and self.first("killed"):
            os.kill(os.getpid(), signal.SIGKILL)


class AlwaysDying(Wrapped):
    def event(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Stuck(Wrapped):
    """Matrices take a minute on one node; the file ``stuck`` has the process. Those of the other
    nodes wait meanwhile for a file ``noticed``, if ``wait``."""

    def __init__(self, quantizer: Any, folder: Path, node: str, wait: bool = False):
        super().__init__(quantizer, folder)
        self.node, self.wait = node, wait

    def event(self) -> None:
        import ray

        if ray.get_runtime_context().get_node_id() == self.node:
            self.first("stuck")
            eventually(lambda: False)
        elif self.wait:
            eventually((self.folder / "noticed").is_file)
