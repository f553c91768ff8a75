"""Measure the Ray engine against threads, on clusters of one-core nodes on this machine.

    python -m benchmarks.engines.speed --work DIR [--source SRC] [--nodes 1 2] [--bits 2]
        [--effort standard] [--samples 64] [--length 512] [--memory MB]

A row per engine: threads on one core, clusters of so many nodes, and the first cluster once more
with a worker killed in the middle of the run. Seconds are those of the whole run, and those from
the first to the last expert, without the start of workers and the compilation of the encoder;
speeds compare the latter. Every run must write the same files. The source is the embedded tiny
language model unless another is given; nothing is trained, because the cluster has no part in that.
"""

import argparse
import hashlib
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import erniequant
import erniequant_data
from erniequant.progress import NullProgress


@dataclass(frozen=True)
class Outcome:
    """A run: seconds in all and from the first to the last expert, and sha256 of its shards."""

    seconds: float
    experts: float
    shards: tuple[str, ...]


class _Watch(NullProgress):
    """Notes when experts were done, and kills one worker after ``kill_at`` of them."""

    def __init__(self, kill_at: int | None):
        self.times: list[float] = []
        self.kills_at = kill_at

    def advance(self, units: int, label: str) -> None:
        if not units:
            return
        self.times.append(time.perf_counter())
        if self.kills_at is not None and len(self.times) >= self.kills_at:
            for worker in _workers()[:1]:
                os.kill(worker, signal.SIGKILL)
                self.kills_at = None


def main() -> None:
    """Print the table."""
    options = _parser().parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    print("| engine | seconds | first to last expert | speed | same files |\n|---|---|---|---|---|")
    local = _quantize(options, "threads", {"engine": "local"})
    _print("threads, one core", local, local)
    for nodes in options.nodes:
        with _cluster(nodes, options.memory) as address:
            on_ray = {"engine": "ray", "ray_address": address}
            found = _quantize(options, f"nodes-{nodes}", on_ray)
        _print(f"Ray, one-core nodes: {nodes}", found, local)
    with _cluster(options.nodes[0], options.memory) as address:
        on_ray = {"engine": "ray", "ray_address": address}
        found = _quantize(options, "killed", on_ray, kill_at=options.kill_at)
    _print(f"Ray, one-core nodes: {options.nodes[0]}, a worker killed", found, local)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the results")
    parser.add_argument("--source", type=Path, default=Path(erniequant_data.tiny_model_dir()))
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2], help="sizes of clusters")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--effort", default="standard")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="their tokens")
    parser.add_argument("--memory", type=int, default=500, help="object store of a node, in MB")
    parser.add_argument("--kill-at", type=int, default=10, help="experts before the kill")
    return parser


def _quantize(
    options: argparse.Namespace, name: str, engine: dict[str, Any], kill_at: int | None = None
) -> Outcome:
    folder, watch = options.work / name, _Watch(kill_at)
    start = time.perf_counter()
    erniequant.quantize(
        options.source, folder, bits=options.bits, effort=options.effort, tune="none",
        calib_samples=options.samples, calib_length=options.length, device="cpu", threads=1,
        progress=watch, **engine,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    if watch.kills_at is not None:
        raise SystemExit("no worker was killed: the run was over too soon; try a lower --kill-at")
    shards = sorted(folder.glob("*.safetensors"))
    digests = tuple(hashlib.sha256(shard.read_bytes()).hexdigest() for shard in shards)
    return Outcome(seconds, watch.times[-1] - watch.times[0], digests)


def _print(name: str, found: Outcome, local: Outcome) -> None:
    speed = local.experts / found.experts
    same = "yes" if found.shards == local.shards else "NO"
    print(
        f"| {name} | {found.seconds:.1f} | {found.experts:.1f} | {speed:.2f} | {same} |", flush=True
    )


@contextmanager
def _cluster(nodes: int, memory: int) -> Iterator[str]:
    """The address of a cluster of one-core nodes, and a head that does no jobs."""
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    store = memory * 1_000_000
    head = {"num_cpus": 0, "object_store_memory": store, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(nodes):
            cluster.add_node(num_cpus=1, object_store_memory=store)
        yield cluster.address
    finally:
        cluster.shutdown()


def _workers() -> list[int]:
    """Processes below this one that do a job."""
    parents, jobs = {}, []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            status = (entry / "stat").read_text().rpartition(")")[2].split()
            command = (entry / "cmdline").read_bytes()
        except OSError:
            continue  # it has ended
        parents[int(entry.name)] = int(status[1])
        if command.startswith(b"ray::do_job"):
            jobs.append(int(entry.name))

    def is_ours(process: int) -> bool:
        while process in parents and process != os.getpid():
            process = parents[process]
        return process == os.getpid()

    return [process for process in jobs if is_ours(process)]


if __name__ == "__main__":
    main()
