"""What is sent to workers: tensors beside a small pickle, memory that no job writes to, and source
files that are the same or not."""

import os
import pickle
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import erniequant
from erniequant.calibration.rows import Rows
from erniequant.checkpoint.reader import open_checkpoint
from erniequant.quantization import pipeline
from erniequant.quantization.executors import ThreadExecutor
from erniequant.quantization.expert_job import ExpertJob, ExpertLayer, ExpertOutcome
from erniequant.quantization.ray_engine.matrices import Reader, SeenFile, seen_file
from erniequant.quantization.ray_engine.parcels import Parcel, pack, unpack
from tests.micro import CALIBRATION

pytestmark = pytest.mark.usefixtures("one_thread")


# A scalar, nothing, a type that numpy lacks, booleans, a transposed view, a slice of a larger one.
TENSORS = [
    torch.tensor(3.5), torch.empty(0, 7), torch.randn(3, 5).bfloat16(), torch.tensor([True, False]),
    torch.arange(12).view(3, 4).T, torch.arange(1000.0)[10:13],
]  # fmt: skip


@pytest.mark.parametrize("tensor", TENSORS, ids=[str(tuple(t.shape)) for t in TENSORS])
def test_tensors_come_out_as_they_went_in(tensor: torch.Tensor) -> None:
    parcel = pack({"one": tensor})
    found = unpack(parcel)["one"]
    assert found.dtype == tensor.dtype and found.shape == tensor.shape
    assert torch.equal(found, tensor)
    assert sum(buffer.nbytes for buffer in parcel.buffers) == tensor.numel() * tensor.itemsize


def test_a_tensor_is_sent_once_and_is_not_in_the_pickle() -> None:
    table = torch.randn(100, 100)
    parcel = pack([table, Rows(table), {"again": table}])
    assert [buffer.nbytes for buffer in parcel.buffers] == [40_000]
    assert len(parcel.pickled) < 1000
    # Nothing was copied on this side either.
    table[0, 0] = 7
    assert unpack(parcel)[1].tensor[0, 0] == 7


class _Sealed(ThreadExecutor):
    """Threads that are sent parcels, and look whether these are as they were."""

    def __init__(self) -> None:
        super().__init__(2)
        self.compared = 0

    def run(self, layer: ExpertLayer, jobs: Iterable[ExpertJob]) -> Iterator[ExpertOutcome]:
        sent = pack(replace(layer.inputs, tables=())), pack(layer.context)
        before = pickle.dumps(sent)
        shared = [_read_only(parcel) for parcel in sent]
        yield from super().run(replace(layer, inputs=shared[0], context=shared[1]), jobs)
        assert pickle.dumps(sent) == before
        self.compared += 1


def _read_only(parcel: Parcel) -> Any:
    for buffer in parcel.buffers:
        buffer.flags.writeable = False
    return unpack(parcel)


@pytest.mark.parametrize(
    "options",
    [{"bits": 2}, {"bits": 2, "sensitivity": "gradient", "calib_length": 32}],
    ids=["layer", "gradient"],
)
@pytest.mark.filterwarnings("error::UserWarning")
def test_no_job_writes_to_what_is_shared(
    micro_source: Path, micro_text: Path, tmp_path: Path, monkeypatch: Any, options: dict[str, Any]
) -> None:
    sealed = _Sealed()
    monkeypatch.setattr(pipeline, "ThreadExecutor", lambda _: sealed)
    options = {"calib": str(micro_text), "device": "cpu", **CALIBRATION, **options}
    erniequant.quantize(micro_source, tmp_path / "q", **options)
    assert sealed.compared >= 2


def test_the_layer_of_a_parcel_is_that_of_a_pickle() -> None:
    array = np.arange(5, dtype=np.int16)
    value = (TENSORS[:3], array, torch.device("cpu"))
    found = unpack(pickle.loads(pickle.dumps(pack(value))))
    assert torch.equal(found[0][2], TENSORS[2]) and found[1].tolist() == array.tolist()


@pytest.fixture
def file(micro_ernie: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "model.safetensors"
    copy.write_bytes((micro_ernie / "model.safetensors").read_bytes())
    return copy


def _touch(path: Path) -> None:
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def _change(path: Path, at: int) -> None:
    """One byte of a file, whose size and times stay."""
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize(
    "alter",
    [_touch, lambda path: _change(path, 20), Path.unlink, lambda path: os.truncate(path, 5000)],
    ids=["time", "header", "missing", "size"],
)
def test_another_file_is_not_taken_for_the_same(file: Path, alter: Any) -> None:
    seen = seen_file(file)
    # A worker's answer is kept, so the two ask under different names.
    assert replace(seen, path=f"{file.parent}/./{file.name}") != seen
    assert SeenFile(*vars(seen).values()) == seen
    alter(file)
    assert not seen.is_here()


def test_matrices_are_read_or_sent(micro_ernie: Path) -> None:
    checkpoint = open_checkpoint(micro_ernie)
    names = [name for name in checkpoint.names() if ".experts.3." in name][:3]
    reader = Reader(checkpoint)
    stored, sent = reader.stored(names), reader.sent(names)
    assert stored is not None and stored.are_here() and sent.are_here()
    for name in names:
        assert torch.equal(stored.tensor(name), checkpoint.tensor(name))
        assert torch.equal(sent.tensor(name), checkpoint.tensor(name))
    # A job names its matrices; the rest of a checkpoint's headers would be megabytes a task.
    assert len(pack(stored).pickled) < 2000 and not pack(stored).buffers
    # A source that is not in files of its own can only be sent.
    assert Reader(stored).stored(names) is None
