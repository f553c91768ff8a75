"""The Ray engine on two nodes of one core writes what threads write: whatever dies, wherever the
source is read, and whoever began."""

import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

ray = pytest.importorskip("ray")

import erniequant  # noqa: E402
from erniequant.errors import ErnieQuantError  # noqa: E402
from erniequant.models.architecture import EXPERT_MATRICES  # noqa: E402
from erniequant.progress import NullProgress  # noqa: E402
from erniequant.quantization.expert_job import (  # noqa: E402
    ExpertJob,
    ExpertLayer,
    ExpertOutcome,
)
from erniequant.quantization.ray_engine import executor, nodes  # noqa: E402
from erniequant.quantization.ray_engine.cluster import connected  # noqa: E402
from erniequant.quantization.ray_engine.executor import RayExecutor  # noqa: E402
from erniequant.quantization.ray_engine.matrices import Reader  # noqa: E402
from erniequant.quantization.ray_engine.worker import Answer, Machine, this_machine  # noqa: E402
from tests.engines import cluster as two  # noqa: E402
from tests.micro import CALIBRATION, StopAfter  # noqa: E402
from tests.quantization.same_bytes import shards_of  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

Edit = Callable[[Any], Any]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Connected to, so that workers stay from test to test."""
    # A short name, because it goes before those of sockets.
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_TMPDIR", str(folder))
        found = two.start()
        try:
            ray.init(address=found.address, log_to_driver=False, logging_level="ERROR")
            yield found
        finally:
            ray.shutdown()
            found.shutdown()
            left = two.eventually(lambda: not two.processes(str(folder)))
            shutil.rmtree(folder, ignore_errors=True)
            assert left


class Heard(NullProgress):
    """Keeps messages and labels."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.labels: list[str] = []

    def advance(self, units: int, label: str) -> None:
        self.labels.append(label)

    def message(self, text: str) -> None:
        self.messages.append(text)


@pytest.fixture(scope="module")
def options(micro_text: Path) -> dict[str, Any]:
    return {
        "bits": 2, "calib": str(micro_text), "device": "cpu", "tune": "layer", **CALIBRATION,
    }  # fmt: skip


@pytest.fixture(scope="module")
def expected(
    micro_source: Path, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """What threads of this process write."""
    folder = tmp_path_factory.mktemp("local") / "q"
    erniequant.quantize(micro_source, folder, **options, threads=1)
    return shards_of(folder)


@pytest.fixture
def quantized(
    cluster: Any, micro_source: Path, options: dict[str, Any], tmp_path: Path
) -> Callable[..., dict[str, str]]:
    """What the cluster writes."""

    def run(name: str = "q", **more: Any) -> dict[str, str]:
        given = {**options, "engine": "ray", **more}
        erniequant.quantize(micro_source, tmp_path / name, **given)
        return shards_of(tmp_path / name)

    return run


def alter(
    patch: pytest.MonkeyPatch, quantizer: Edit = lambda same: same, job: Edit = lambda same: same
) -> None:
    """Have jobs, and the quantiser of gate and up, replaced on their way to the cluster."""
    original = RayExecutor.run

    def run(
        self: RayExecutor, layer: ExpertLayer, jobs: Iterable[ExpertJob]
    ) -> Iterator[ExpertOutcome]:
        context = replace(layer.context, gate_up=quantizer(layer.context.gate_up))
        return original(self, replace(layer, context=context), map(job, jobs))

    patch.setattr(RayExecutor, "run", run)


def test_two_nodes_write_the_same_bytes(quantized: Any, expected: dict[str, str]) -> None:
    """With training, after which the jobs of a layer are done once more."""
    heard = Heard()
    assert quantized(progress=heard) == expected
    assert "engine ray: 2 nodes, 2 cores; all nodes read the source themselves" in heard.messages
    layers = [label for label in heard.labels if " expert " in label]
    assert len(layers) == 16 and layers[0] == "layer 1 expert 0, 2 nodes, 2 of 2 cores at work"
    # Between layers nothing is at work but this process.
    assert {"layer 1 expert 7", "tuning layer 1"} <= set(heard.labels)


def test_tables_are_stored_once_a_layer(
    quantized: Any, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, tasks = [], []
    put, send = ray.put, RayExecutor._send
    monkeypatch.setattr(ray, "put", lambda parcel: stored.append(parcel) or put(parcel))

    def sent(self: RayExecutor, job: ExpertJob, shared: Any) -> Any:
        tasks.append(shared)
        return send(self, job, shared)

    monkeypatch.setattr(RayExecutor, "_send", sent)
    assert quantized() == expected
    # A layer's tables, of 768 tokens by 96 channels, and what else its jobs share; after training
    # its tables have changed, and it is done once more.
    sizes = [sum(buffer.nbytes for buffer in parcel.buffers) for parcel in stored]
    assert [size // (768 * 96 * 4) for size in sizes[::2]] == [3] * 4 and len(sizes) == 8
    assert len(tasks) == 32 and len({id(tables) for tables, _ in tasks}) == 4


@pytest.mark.parametrize("known", ["before", "later"])
def test_matrices_are_sent_to_nodes_that_do_not_see_the_source(
    quantized: Any, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch, known: str
) -> None:
    seen = Reader._seen
    monkeypatch.setattr(
        Reader, "_seen", lambda self, *which: replace(seen(self, *which), mtime_ns=1)
    )
    if known == "later":  # as if the nodes had joined since
        answer = Answer(this_machine(), True)
        monkeypatch.setattr(executor, "ask", lambda nodes, file: dict.fromkeys(nodes, answer))
    heard = Heard()
    assert quantized(progress=heard) == expected
    if known == "before":
        assert "this process reads the source and sends its matrices, because" in heard.messages[1]
    else:
        assert [m for m in heard.messages if "does not see the source's files" in m] != []


def test_an_error_comes_in_its_place_and_the_run_can_go_on(
    quantized: Any, expected: dict[str, str], tmp_path: Path
) -> None:
    """In the last job of a layer. Errors of ours that workers found are in the test of versions."""
    journal = tmp_path / "q/.erniequant-work/journal.jsonl"
    # Found missing by this process; of the wrong shape by a worker, which is no error of ours.
    for name, kind in (("nothing", ErnieQuantError), ("model.norm.weight", IndexError)):
        wrong = dict.fromkeys(EXPERT_MATRICES, name)
        with pytest.MonkeyPatch.context() as patch:
            alter(
                patch,
                job=lambda job, wrong=wrong: (
                    replace(job, matrices=wrong) if job.expert == 7 else job
                ),
            )
            with pytest.raises(kind) as caught:
                quantized()
        assert not isinstance(caught.value, ray.exceptions.RayError)
        assert journal.read_text().count('"event":"expert"') == 7
    assert quantized() == expected


@pytest.mark.parametrize("first", ["local", "ray"])
def test_an_engine_goes_on_where_the_other_stopped(
    quantized: Any, expected: dict[str, str], first: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantized(engine=first, progress=StopAfter(3))
    other = "ray" if first == "local" else "local"
    assert quantized(engine=other, resume=True) == expected


def test_another_processor_is_named_and_other_versions_are_refused(
    quantized: Any, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, heard = this_machine(), Heard()
    monkeypatch.setattr(executor, "this_machine", lambda: Machine("m68k", here.versions))
    assert quantized(progress=heard) == expected
    # Once, though both nodes are of that kind.
    warnings = [m for m in heard.messages if "another kind of processor" in m]
    assert len(warnings) == 1 and f"({here.processor}, here m68k)" in warnings[0]
    others = tuple((name, "0.1") for name, _ in here.versions)
    monkeypatch.setattr(executor, "this_machine", lambda: Machine(here.processor, others))
    with pytest.raises(ErnieQuantError, match=r"has erniequant \S+ instead of 0.1; install"):
        quantized("r")
    # Nodes that join later were not asked; their workers refuse.
    monkeypatch.setattr(executor, "ask", lambda nodes, file: {})
    with pytest.raises(ErnieQuantError, match=r"has erniequant \S+ instead of 0.1; install"):
        quantized("r")


def test_the_head_and_the_node_of_this_process_are_needed(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "TICK", 0)
    heard = Heard()
    known = nodes.Nodes(False, heard)
    known.look()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nodes, "answers", lambda address: False)
        known.look()
        patch.setattr(nodes, "SILENCE", 0)
        with pytest.raises(ErnieQuantError, match="the head of the Ray cluster, .*, is lost; rep"):
            known.look()
    known.look()
    entries = ray.nodes()
    mine = ray.get_runtime_context().get_node_id()
    for entry in entries:
        entry["Alive"] = entry["NodeID"] != mine
    monkeypatch.setattr(ray, "nodes", lambda: entries)
    with pytest.raises(ErnieQuantError, match="the Ray node of this process is lost; repeat"):
        known.look()
    assert heard.messages == []


def test_on_gpus_every_core_has_its_part_of_one(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two GPUs for 16 cores, one for three, none: that node takes no jobs."""
    sizes = ((16, 2), (3, 1), (64, 0))
    entries = [
        {
            "NodeID": str(cores), "NodeManagerAddress": "10.0.0.1", "Alive": True,
            "Resources": {"CPU": float(cores), **({"GPU": float(gpus)} if gpus else {})},
        }
        for cores, gpus in sizes
    ]  # fmt: skip
    monkeypatch.setattr(ray, "nodes", lambda: entries)
    known = nodes.Nodes(True, Heard())
    assert (known.cores, known.gpu_share, str(known)) == (19, 0.125, "2 nodes, 19 cores")
    on_cpus = nodes.Nodes(False, Heard())
    assert (on_cpus.cores, on_cpus.gpu_share) == (83, 0)
    entries.pop(0), entries.pop(0)
    with pytest.raises(ErnieQuantError, match="no node of the Ray cluster has a GPU; use --device"):
        nodes.Nodes(True, Heard())


def test_an_address_where_nothing_answers_is_refused_at_once(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    begun = time.monotonic()
    with (
        pytest.raises(ErnieQuantError, match="cannot reach the Ray cluster at 127.0.0.1:1: noth"),
        connected("127.0.0.1:1", 1),
    ):
        pass
    assert time.monotonic() - begun < two.PATIENCE / 2
    with (
        pytest.raises(ErnieQuantError, match="ray://a:1 is an address for clients; run this on"),
        connected("ray://a:1", 1),
    ):
        pass


def test_a_process_is_in_one_cluster(quantized: Any) -> None:
    with pytest.raises(ErnieQuantError, match="is connected to the Ray cluster at .*, not 10.0"):
        quantized(ray_address="10.0.0.1:6379")


def test_a_killed_worker_changes_nothing(
    quantized: Any, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alter(monkeypatch, lambda quantizer: two.Dying(quantizer, tmp_path))
    assert quantized() == expected
    assert not two.alive(int((tmp_path / "killed").read_text()))


# From here on there are fewer nodes, and fewer workers that have compiled the encoder.


def test_a_lost_node_costs_only_its_jobs(
    quantized: Any,
    cluster: Any,
    expected: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nodes, "TICK", 0.2)
    monkeypatch.setattr(executor, "TICK", 0.2)
    victim = cluster.list_all_nodes()[-1]
    alter(monkeypatch, lambda quantizer: two.Stuck(quantizer, tmp_path, victim.node_id, True))

    def remove() -> None:
        two.eventually((tmp_path / "stuck").is_file)
        cluster.remove_node(victim, allow_graceful=False)

    class Noticing(Heard):
        def message(self, text: str) -> None:
            super().message(text)
            if "is lost" in text:
                (tmp_path / "noticed").touch()

    thread, heard = threading.Thread(target=remove), Noticing()
    thread.start()
    try:
        assert quantized(progress=heard) == expected
    finally:
        thread.join()
    lost = [m for m in heard.messages if "is lost; its jobs are done again" in m]
    assert len(lost) == 1 and "(1 core)" in lost[0]
    assert any(label.endswith(", 1 node, 1 of 1 core at work") for label in heard.labels)


def test_ctrl_c_ends_the_connection_and_jobs_under_way(
    quantized: Any, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a process that was not connected before; the only node's jobs take a minute."""
    node = cluster.list_all_nodes()[-1].node_id
    alter(monkeypatch, lambda quantizer: two.Stuck(quantizer, tmp_path, node))
    ray.shutdown()
    began: list[float] = []

    def interrupt() -> None:
        if two.eventually((tmp_path / "stuck").is_file):
            # A signal on the way into a wait would not end it.
            time.sleep(0.5)
            began.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            quantized(ray_address=cluster.address)
        assert time.monotonic() - began[0] < two.PATIENCE / 2
        assert not ray.is_initialized()
        worker = int((tmp_path / "stuck").read_text())
        assert two.eventually(lambda: not two.alive(worker))
    finally:
        thread.join()
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")


def test_a_job_that_kills_every_worker_ends_the_run(
    quantized: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "RETRIES", 0)
    alter(monkeypatch, lambda quantizer: two.AlwaysDying(quantizer, tmp_path))
    with pytest.raises(ErnieQuantError, match=r"gave up expert 0 after 1 attempts? .*repeat"):
        quantized()


def test_without_any_node_the_run_ends(
    quantized: Any, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "TICK", 0.2)
    monkeypatch.setattr(nodes, "PATIENCE", 1.0)
    last = cluster.list_all_nodes()[-1]
    alter(monkeypatch, lambda quantizer: two.Stuck(quantizer, tmp_path, last.node_id))

    def remove() -> None:
        two.eventually((tmp_path / "stuck").is_file)
        cluster.remove_node(last, allow_graceful=False)

    thread = threading.Thread(target=remove)
    thread.start()
    with pytest.raises(ErnieQuantError, match="no node of the Ray cluster has been there for 1 s"):
        quantized()
    thread.join()
    with pytest.raises(ErnieQuantError, match="no node of the Ray cluster has a core"):
        quantized()
