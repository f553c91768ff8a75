"""The measurements of `make gpu` without a GPU: in Triton's interpreter, with fake graphs, and for
a card that only the driver speaks of."""

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import records, run
from benchmarks.pages import ROOT
from erniequant_kernels.bench import run as bench
from erniequant_kernels.bench.problem import SHAPES
from erniequant_kernels.bench.rows import TOLERANCE
from erniequant_kernels.bench.timing import Timer

CPU = torch.device("cpu")


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[dict[str, Any]]]:
    """A function that gives the records so far."""
    path = tmp_path / "records"
    monkeypatch.setenv(records.VARIABLE, str(path))
    return lambda: records.read(path)


def options(**changes: Any) -> argparse.Namespace:
    settings = {"shapes": ["tiny"], "bits": [2], "tokens": [3], "device": "cpu"}
    return argparse.Namespace(**settings | changes)


def test_products_are_measured_and_checked(
    found: Callable[[], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "ROUNDS", 3)
    monkeypatch.setattr(run, "cuda_timer", lambda: Timer(lambda call, _: call, lambda _: 1e-3))
    monkeypatch.setattr(run, "copy_bandwidth", lambda _: 1e12)
    results = list(run.measure(["tiny"], [3], [2], CPU, run.cuda_timer(), 1e12))
    monkeypatch.setattr(run, "measure", lambda *_: iter(results))
    assert run.products(options())
    rows = [r["row"] for r in found() if "row" in r]
    ratios = [r["ratio"] for r in found() if "ratio" in r]
    assert {row["bits"] for row in rows} == {2, 16} and len(ratios) == len(rows) - 1
    assert found()[0] == {"copy_gb_per_s": 1000.0}
    off = dataclasses.replace(results[0].rows[0], error=2 * TOLERANCE)
    results.append(bench.BatchResult([off], []))
    assert not run.products(options())


class FakeGraph:
    """A graph whose replay runs the function again on the inputs of its capture."""

    replays = True

    def __init__(self) -> None:
        self.calls: list[Callable[[], object]] = []

    def replay(self) -> None:
        if self.replays:
            for call in self.calls:
                call()


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[run.Layer], run.Layer]]:
    """A function that makes a layer take part in captures."""
    current: list[FakeGraph] = []

    @contextlib.contextmanager
    def graph(target: FakeGraph) -> Iterator[None]:
        current.append(target)
        yield
        current.pop()

    def take_part(layer: run.Layer) -> run.Layer:
        def run_layer(*inputs: torch.Tensor) -> torch.Tensor:
            out = layer(*inputs)
            if current:
                current[-1].calls.append(lambda: out.copy_(layer(*inputs)))
            return out

        return run_layer

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    yield take_part


def test_a_replay_is_compared_on_other_inputs(
    capturing: Callable[[run.Layer], run.Layer], monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = run.layer("tiny", 2, CPU)
    assert run.replays_equal(capturing(sound), "tiny", 5, CPU)

    class Baked:
        """A layer that keeps the routing of its first call."""

        first: torch.Tensor | None = None

        def __call__(self, x: torch.Tensor, index: torch.Tensor, routing: torch.Tensor) -> Any:
            if self.first is None:
                self.first = index.clone()
            return sound(x, self.first, routing)

    def only_in_the_graph(x: torch.Tensor, index: torch.Tensor, routing: torch.Tensor) -> Any:
        baked = Baked()
        taking_part = capturing(lambda *_: baked(x, index, routing))
        return taking_part(x, index, routing)

    assert not run.replays_equal(capturing_only(only_in_the_graph, sound), "tiny", 5, CPU)
    monkeypatch.setattr(FakeGraph, "replays", False)
    assert not run.replays_equal(capturing(sound), "tiny", 5, CPU)


def capturing_only(captured: run.Layer, eager: run.Layer) -> run.Layer:
    """The second call, which is captured, is one layer, every other call another."""
    calls = iter(range(100))
    return lambda *inputs: (captured if next(calls) == 1 else eager)(*inputs)


def test_tasks_of_the_compilation_have_every_batch_and_rival() -> None:
    tasks = list(run.tasks(["21b", "vl"], [2, run.RIVALS], [1, 16]))
    ours = [(t.shape, t.bits, t.tokens) for t in tasks if t.rival is None]
    assert ours == [(shape, 2, (n,)) for shape in ("21b", "vl") for n in (1, 16)]
    rivals = [(t.shape, t.rival) for t in tasks if t.rival is not None]
    assert rivals == [(shape, n) for shape in ("21b", "vl") for n in range(len(run.TRITON_CONFIGS))]
    assert {t.tokens for t in tasks if t.rival is not None} == {(1, 16)}


COMPILING = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

class Card:
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)

driver.set_active(Card())
torch.cuda.get_device_capability = lambda device: (9, 0)
from benchmarks.gpu import run
from erniequant_kernels.bench import compiling
names = []
real = compiling.compiled_by
run.compiled_by = lambda call: names.extend(k.name for k in real(call))
run.Compiling("tiny", (1,), 4).run("cuda")
run.Compiling("tiny", (3, 5), 16, rival=0).run("cuda")
print(names)
assert triton.JITFunction.run.__name__ == "run"
"""


def test_everything_is_compiled_without_a_launch(tmp_path: Path) -> None:
    # The kernels that run, with a card's table, for tensors without memory.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(tmp_path),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", COMPILING], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    names = json.loads(done.stdout.replace("'", '"'))
    layer = ["prepare_kernel", "packed_gemm_kernel", "swiglu_rotate_kernel", "packed_gemm_kernel",
             "combine_kernel"]  # fmt: skip
    rival = ["row_tiles_kernel", "dense_gemm_kernel", "swiglu_rotate_kernel", "dense_gemm_kernel",
             "combine_kernel"]  # fmt: skip
    assert names == layer + 2 * rival
    # Other processes find them on disk: prepare, two products, SwiGLU, sum; then the rival's.
    assert len(list(tmp_path.rglob("*.cubin"))) >= 5 + 4


def test_the_rivals_compile_for_the_shapes_that_are_measured() -> None:
    size = SHAPES["21b"]
    weights = run.no_weights(size)
    assert weights.gate_up.shape == (64, 3072, 2560) and weights.down.shape == (64, 2560, 1536)
    assert weights.gate_up.dtype == torch.bfloat16 and weights.gate_up.device.type == "meta"


def test_the_encoder_is_timed_on_one_core_and_on_all(
    found: Callable[[], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "ENCODED_SEQUENCES", 4)
    assert run.encoder(options(bits=[4]))
    (result,) = found()
    assert result["code"] == "cc4 L13" and result["one_core"] > 0 and result["all_cores"] > 0
