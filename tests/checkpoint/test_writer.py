"""Writing shards: sizes, names, and what is left behind when something goes wrong."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from erniequant.checkpoint.files import write_json
from erniequant.checkpoint.reader import INDEX_FILE, open_checkpoint
from erniequant.checkpoint.writer import CheckpointWriter
from erniequant.errors import ErnieQuantError


def tensors() -> dict[str, torch.Tensor]:
    # 40, 40, 200, 4 and 0 bytes; a bound of 100 gives shards of two, of one too large, of two.
    base = torch.arange(100, dtype=torch.float32)
    return {
        "a": base[:10],
        "b": base[:20:2],
        "c": base[:50].clone(),
        "d": torch.tensor([1.0]),
        "e": torch.zeros(0, 2),
    }


def write(folder: Path, bound: int) -> list[str]:
    with CheckpointWriter(folder, bound) as writer:
        for name, tensor in tensors().items():
            writer.add(name, tensor)
        written = writer.finish()
    assert written.tensors == 5 and written.total_bytes == 284
    for name, digest in written.sha256.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    return sorted(written.sha256)


def test_shards_are_bounded_and_indexed(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "model"
    shards = write(folder, 100)
    assert shards == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert {p.name for p in folder.iterdir()} == {*shards, INDEX_FILE}
    index = json.loads((folder / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == 284
    assert index["weight_map"]["c"] == shards[1]
    with safe_open(folder / shards[0], "pt") as shard:
        assert shard.metadata() == {"format": "pt"} and set(shard.keys()) == {"a", "b"}
    write_json(folder / "config.json", {})
    checkpoint = open_checkpoint(folder)
    for name, tensor in tensors().items():
        assert torch.equal(checkpoint.tensor(name), tensor)


def test_one_shard_has_the_plain_name(tmp_path: Path) -> None:
    assert write(tmp_path / "one", 10_000) == ["model.safetensors"]
    assert not (tmp_path / "one" / INDEX_FILE).exists()


def test_views_are_written_without_their_base(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "v") as writer:
        big = torch.zeros(1000, 100)
        writer.add("row", big[3])
        writer.add("next row", big[4])
        writer.add("transposed", torch.arange(6.0).view(2, 3).T)
        writer.finish()
    assert (tmp_path / "v" / "model.safetensors").stat().st_size < 2000
    write_json(tmp_path / "v" / "config.json", {})
    assert open_checkpoint(tmp_path / "v").tensor("transposed")[2, 1] == 5


def test_shards_follow_the_rights_of_their_folder(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o750)
    write(folder, 10_000)
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o640


def test_folder_must_be_new_or_empty(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("precious")
    with pytest.raises(ErnieQuantError, match="not empty"):
        CheckpointWriter(tmp_path)
    with pytest.raises(ErnieQuantError, match="cannot make"):
        CheckpointWriter(tmp_path / "x")


def test_nothing_that_looks_complete_after_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    twice = pytest.raises(ErnieQuantError, match="a was written twice")
    with twice, CheckpointWriter(folder, 50) as w:
        w.add("a", torch.zeros(10))
        w.add("b", torch.zeros(10))
        assert list(folder.iterdir()) != []
        w.add("a", torch.zeros(10))
    assert list(folder.iterdir()) == []
