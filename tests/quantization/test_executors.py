"""Wherever jobs are done the bytes are the same. Outcomes keep their order, errors reach the
caller, and Ctrl-C does not wait."""

import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import erniequant
from erniequant.checkpoint.reader import open_checkpoint
from erniequant.errors import ErnieQuantError
from erniequant.models.architecture import EXPERT_MATRICES, TensorSource
from erniequant.models.registry import architecture_of
from erniequant.quantization import executors, pipeline
from erniequant.quantization.executors import Executor, ThreadExecutor
from erniequant.quantization.expert_job import ExpertJob, ExpertLayer, ExpertOutcome
from erniequant.quantization.memory import MemoryInputs, largest_layer, plan_memory
from tests.micro import CALIBRATION, StopAfter
from tests.quantization.elsewhere import PickledExecutor, ProcessExecutor
from tests.quantization.same_bytes import runs, shards_of

pytestmark = pytest.mark.usefixtures("one_thread")

PATIENCE = 20
"""Seconds after which something that should have happened has not."""

Use = Callable[[Executor], None]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """Have another executor do the jobs of `erniequant.quantize` from now on."""
    return lambda executor: monkeypatch.setattr(pipeline, "ThreadExecutor", lambda _: executor)


@pytest.fixture(scope="module")
def small_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    return runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessExecutor]:
    executor = ProcessExecutor(2)
    yield executor
    executor.shutdown()


def quantized(run: tuple[Path, dict[str, Any]], folder: Path, **more: Any) -> dict[str, str]:
    erniequant.quantize(run[0], folder, **{**run[1], **more})
    return shards_of(folder)


# Our own codes, two groups of experts in a layer, and both quantisers of FastDeploy's format.
@pytest.mark.parametrize("name", ["2 bits", "vision-language", "wint2"])
def test_jobs_that_were_pickled_give_the_same_bytes(
    small_runs: dict[str, Any], use: Use, tmp_path: Path, name: str
) -> None:
    expected = quantized(small_runs[name], tmp_path / "threads", threads=2)
    use(PickledExecutor())
    assert quantized(small_runs[name], tmp_path / "pickled") == expected


def test_jobs_in_other_processes_give_the_same_bytes(
    small_runs: dict[str, Any], use: Use, processes: ProcessExecutor, tmp_path: Path
) -> None:
    expected = quantized(small_runs["2 bits"], tmp_path / "threads", threads=2)
    use(processes)
    assert quantized(small_runs["2 bits"], tmp_path / "processes") == expected


def test_tables_on_disk_can_be_sent(small_runs: dict[str, Any], use: Use, tmp_path: Path) -> None:
    source, options = small_runs["2 bits"]
    checkpoint = open_checkpoint(source)
    model = architecture_of(checkpoint.config)
    needs = MemoryInputs(
        CALIBRATION["calib_samples"] * CALIBRATION["calib_length"], CALIBRATION["calib_length"], 0,
        largest_layer(checkpoint, model),
    )  # fmt: skip
    least = plan_memory(model, needs, 1, 0, True)
    expected = quantized((source, options), tmp_path / "in memory")
    use(PickledExecutor())
    options = {**options, "threads": 1, "max_memory": least.peak_bytes}
    report = erniequant.quantize(source, tmp_path / "on disk", **options)
    assert "activations in mapped files" in report.plan_text
    assert shards_of(tmp_path / "on disk") == expected


@pytest.mark.parametrize("first", [ThreadExecutor(1), PickledExecutor()], ids=["here", "elsewhere"])
def test_an_executor_goes_on_where_another_stopped(
    small_runs: dict[str, Any], use: Use, tmp_path: Path, first: Executor
) -> None:
    """Experts that are packed already are sent too."""
    run = small_runs["2 bits"]
    expected = quantized(run, tmp_path / "at once")
    use(first)
    with pytest.raises(KeyboardInterrupt):
        quantized(run, tmp_path / "q", progress=StopAfter(3))
    use(PickledExecutor() if isinstance(first, ThreadExecutor) else ThreadExecutor(1))
    assert quantized(run, tmp_path / "q", resume=True) == expected


def test_jobs_and_outcomes_hold_no_tables_and_no_source_matrices(
    small_runs: dict[str, Any], use: Use, tmp_path: Path
) -> None:
    """Their size as bytes shows what they keep alive in memory too."""
    sizes: list[tuple[int, int]] = []
    layers: list[float] = []

    class Weighed(ThreadExecutor):
        def run(self, layer: ExpertLayer, jobs: Iterable[ExpertJob]) -> Iterator[ExpertOutcome]:
            layers.append(len(pickle.dumps(layer)) / (4 * layer.inputs.drift.numel()))

            def weighed() -> Iterator[ExpertJob]:
                for job in jobs:
                    tokens = len(job.quantized.rows) + len(job.original.rows)
                    sizes.append((len(pickle.dumps(job)), 12 * tokens))
                    yield job

            for outcome in super().run(layer, weighed()):
                matrices = (outcome.packed.gate_up, outcome.packed.down)
                parts = [part for matrix in matrices for part in matrix.parts.values()]
                rows = (outcome.quantized, outcome.original)
                tables = sum(8 * len(r.rows) + 4 * r.values.tensor.numel() for r in rows)
                needed = sum(part.numel() * part.itemsize for part in parts) + tables
                sizes.append((len(pickle.dumps(outcome)), needed))
                yield outcome

    use(Weighed(2))
    quantized(small_runs["2 bits"], tmp_path / "q", tune="none")
    # What pickle says beside the numbers of a dozen tensors; the smallest matrix has 24 KB.
    assert len(sizes) == 32 and all(0 <= size - needed < 5000 for size, needed in sizes), sizes
    # Three tables, and as many of the sample, which is all tokens here: none is there twice.
    assert len(layers) == 2 and all(6 < tables < 7 for tables in layers), layers


@pytest.mark.parametrize("where", ["threads", "pickled", "processes"])
def test_an_error_stops_the_run_which_can_go_on(
    small_runs: dict[str, Any], use: Use, processes: ProcessExecutor, tmp_path: Path, where: str
) -> None:
    executor: Executor = {
        "threads": ThreadExecutor(2), "pickled": PickledExecutor(), "processes": processes
    }[where]  # fmt: skip

    class Failing:
        def run(self, layer: ExpertLayer, jobs: Iterable[ExpertJob]) -> Iterator[ExpertOutcome]:
            wrong = dict.fromkeys(EXPERT_MATRICES, "nothing")
            return executor.run(
                layer, (replace(job, matrices=wrong) if job.expert == 2 else job for job in jobs)
            )

    run = small_runs["2 bits"]
    use(Failing())
    with pytest.raises(ErnieQuantError, match="tensor nothing is missing"):
        quantized(run, tmp_path / "q")
    # The experts before it were recorded.
    journal = (tmp_path / "q/.erniequant-work/journal.jsonl").read_text()
    assert journal.count('"event":"expert"') == 2
    use(executor)
    assert quantized(run, tmp_path / "q") == quantized(run, tmp_path / "at once")


class Watched:
    """A source that wants its readers to multiply on one thread, without gradients."""

    def __init__(self, source: TensorSource):
        self.source = source

    def names(self) -> list[str]:
        return self.source.names()

    def tensor(self, name: str) -> torch.Tensor:
        assert torch.get_num_threads() == 1 and not torch.is_grad_enabled()
        return self.source.tensor(name)


def test_a_job_runs_on_one_thread_whatever_was_set(
    small_runs: dict[str, Any], use: Use, tmp_path: Path
) -> None:
    class Careless(PickledExecutor):
        def run(self, layer: ExpertLayer, jobs: Iterable[ExpertJob]) -> Iterator[ExpertOutcome]:
            def before() -> Iterator[ExpertJob]:
                for job in jobs:
                    torch.set_num_threads(2)
                    yield job

            with torch.enable_grad():
                yield from super().run(replace(layer, source=Watched(layer.source)), before())

    use(Careless())
    assert quantized(small_runs["2 bits"], tmp_path / "q")


Work = Callable[[int, None], int]
Begin = Callable[[int, Work], tuple[list[int], Iterator[int]]]


@pytest.fixture
def begin(monkeypatch: pytest.MonkeyPatch) -> Begin:
    """Six numbers as jobs for so many threads: those that were taken so far, and the outcomes."""

    def begun(at_once: int, work: Work) -> tuple[list[int], Iterator[int]]:
        monkeypatch.setattr(executors, "run_job", work)
        taken: list[int] = []

        def jobs() -> Iterator[Any]:
            for number in range(6):
                taken.append(number)
                yield number

        nothing: Any = None
        outcomes: Any = ThreadExecutor(at_once).run(nothing, jobs())
        return taken, outcomes

    return begun


def test_outcomes_come_in_order_and_few_jobs_are_taken(begin: Begin) -> None:
    ended: list[int] = []
    second = threading.Event()

    def work(number: int, _: None) -> int:
        if number == 0:
            assert second.wait(PATIENCE)
        ended.append(number)
        if number == 1:
            second.set()
        return number * 10

    taken, outcomes = begin(2, work)
    found = []
    for outcome in outcomes:
        found.append(outcome)
        # One is being looked at, another under way or waiting for its turn.
        assert len(taken) == min(len(found) + 1, 6)
    assert ended[:2] == [1, 0]
    assert found == [0, 10, 20, 30, 40, 50]


def test_an_error_comes_in_its_place_and_ends_the_rest(begin: Begin) -> None:
    def work(number: int, _: None) -> int:
        if number == 2:
            raise ErnieQuantError("enough")
        return number

    taken, outcomes = begin(2, work)
    assert [next(outcomes), next(outcomes)] == [0, 1]
    with pytest.raises(ErnieQuantError, match="enough"):
        next(outcomes)
    assert taken == [0, 1, 2, 3]


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """Lets go of work that waits for it, after the test at the latest."""
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.parametrize("when", ["while it waits", "while its caller works"])
def test_ctrl_c_does_not_wait_for_jobs_under_way(
    begin: Begin, release: threading.Event, when: str
) -> None:
    began, ended, seen = (threading.Event() for _ in range(3))

    def work(number: int, _: None) -> int:
        if number == 1:
            began.set()
            if when == "while it waits":
                assert seen.wait(PATIENCE)
                # A signal on the way into a wait would not end it.
                time.sleep(0.5)
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            release.wait(PATIENCE)
            ended.set()
        return number

    def consume() -> None:
        for _ in begin(2, work)[1]:
            assert began.wait(PATIENCE)
            seen.set()
            if when == "while its caller works":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consume()
    assert not ended.is_set()
