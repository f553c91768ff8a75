"""Where tensors will lie: every bound is kept, and the safetensors library finds every bit."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from erniequant.checkpoint.layout import OutputTensor, PlannedShard, index_of, plan_shards
from erniequant.checkpoint.reader import read_header
from erniequant.checkpoint.shards import ShardFiles
from tests.checkpoint.tensors import awkward_tensors, bits_of, planned, write_stored


def of_bytes(sizes: list[int]) -> list[OutputTensor]:
    return [OutputTensor.of(str(i), (size,), torch.uint8) for i, size in enumerate(sizes)]


def contents(shards: tuple[PlannedShard, ...]) -> list[list[str]]:
    return [sorted(tensor.name for tensor in shard.tensors) for shard in shards]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        # Exactly full; one byte too many.
        ([60, 40, 100], [["0", "1"], ["2"]]),
        ([60, 41], [["0"], ["1"]]),
        # Larger than the bound: first, in the middle, last, and followed by an empty tensor, which
        # would make a shard of two.
        ([101, 1], [["0"], ["1"]]),
        ([1, 500, 1], [["0"], ["1"], ["2"]]),
        ([1, 500, 0], [["0"], ["1"], ["2"]]),
        ([1, 500], [["0"], ["1"]]),
        # Small ones after a full shard do not go back to an earlier one with room.
        ([50, 90, 50], [["0"], ["1"], ["2"]]),
        ([0], [["0"]]),
        ([], []),
    ],
)
def test_shards_are_filled_in_order_up_to_their_bound(
    sizes: list[int], expected: list[list[str]]
) -> None:
    assert contents(plan_shards(of_bytes(sizes), 100)) == expected


def test_one_shard_has_the_plain_name_and_many_are_numbered() -> None:
    assert [s.file for s in plan_shards(of_bytes([1, 2]), 100)] == ["model.safetensors"]
    assert [s.file for s in plan_shards(of_bytes([100] * 3), 100)] == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
    ]


def test_the_library_reads_what_lies_where_it_was_planned(tmp_path: Path) -> None:
    tensors = awkward_tensors()
    # A bound that separates them, so that every shard begins with another type.
    shards = planned(tensors, 60)
    assert len(shards) > 3
    with ShardFiles(tmp_path, shards) as files:
        files.prepare()
        for name, tensor in tensors.items():
            files.write(name, tensor)
        for shard in shards:
            files.finish(shard)
    found: dict[str, torch.Tensor] = {}
    for shard in shards:
        path = tmp_path / shard.file
        assert path.stat().st_size == shard.n_bytes
        with safe_open(path, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        found |= load_file(path)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert bits_of(found[name]) == bits_of(tensor), name


@pytest.mark.parametrize("bound", [60, 10_000])
def test_every_tensor_lies_aligned_to_its_element(bound: int) -> None:
    for shard in planned(awkward_tensors(), bound):
        end = 8 + struct.unpack("<Q", shard.header[:8])[0]
        assert end == len(shard.header) and end % 8 == 0
        # Gapless and without overlap, which the library insists on.
        for tensor in sorted(shard.tensors, key=lambda t: (shard.offsets[t.name], t.n_bytes)):
            assert shard.offsets[tensor.name] == end
            width = awkward_tensors()[tensor.name].element_size()
            assert shard.offsets[tensor.name] % width == 0, tensor.name
            end += tensor.n_bytes
        assert end == shard.n_bytes


def test_types_that_torch_lacks_are_copied_aligned(tmp_path: Path) -> None:
    # Three bytes, and four-bit numbers of which two make a byte, before types of 4 and 8 bytes.
    stored = {
        "a": ("U8", (3,), b"abc"),
        "b": ("F4", (6,), b"def"),
        "c": ("U32", (1,), b"ghij"),
        "d": ("C64", (1,), b"klmnopqr"),
    }
    headers = read_header(write_stored(tmp_path / "model.safetensors", stored))
    (shard,) = plan_shards([OutputTensor.copy_of(header) for header in headers.values()], 100)
    assert shard.offsets["c"] % 4 == 0 and shard.offsets["d"] % 8 == 0
    entries = json.loads(shard.header[8:])
    for name, (dtype, shape, content) in stored.items():
        begin, end = entries[name]["data_offsets"]
        assert entries[name]["dtype"] == dtype and entries[name]["shape"] == list(shape)
        assert end - begin == len(content) and begin + len(shard.header) == shard.offsets[name]


def test_the_index_names_the_shard_that_holds_each_tensor(tmp_path: Path) -> None:
    tensors = awkward_tensors()
    shards = planned(tensors, 60)
    index = index_of(shards)
    assert index["metadata"]["total_size"] == sum(len(bits_of(t)) for t in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    for shard in shards:
        path = tmp_path / shard.file
        path.write_bytes(shard.header + bytes(shard.n_bytes - len(shard.header)))
        for name in load_file(path):
            assert index["weight_map"].pop(name) == shard.file
    assert index["weight_map"] == {}
