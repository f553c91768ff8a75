"""Reading folders of shards: what is there, and every way in which it can be broken."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from erniequant.checkpoint.reader import INDEX_FILE, open_checkpoint
from erniequant.errors import ErnieQuantError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards, an index and a config."""
    root = tmp_path / "model"
    root.mkdir()
    # An empty tensor, a scalar and a 3-D one: their byte ranges are the odd ones in a header.
    first = {"a.empty": torch.zeros(0, 3), "a.scalar": torch.tensor(2.5)}
    second = {"b.cube": torch.arange(24, dtype=torch.int16).view(2, 3, 4)}
    save_file(first, root / "model-00001-of-00002.safetensors")
    save_file(second, root / "model-00002-of-00002.safetensors")
    weight_map = dict.fromkeys(first, "model-00001-of-00002.safetensors")
    weight_map |= dict.fromkeys(second, "model-00002-of-00002.safetensors")
    (root / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    (root / "config.json").write_text('{"model_type": "test"}')
    return root


def refusal(folder: Path) -> str:
    with pytest.raises(ErnieQuantError) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_headers_and_tensors(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.names()) == {"a.empty", "a.scalar", "b.cube"}
    header = checkpoint.header("b.cube")
    assert (header.shape, header.dtype, header.n_bytes) == ((2, 3, 4), torch.int16, 48)
    assert checkpoint.tensor("b.cube")[1, 2, 3] == 23
    assert checkpoint.tensor("a.scalar") == 2.5
    assert checkpoint.total_bytes == 48 + 4
    with pytest.raises(ErnieQuantError, match=r"tensor nothing is missing"):
        checkpoint.tensor("nothing")


def test_single_file_needs_no_index(folder: Path) -> None:
    (folder / INDEX_FILE).unlink()
    shutil.copy(folder / "model-00002-of-00002.safetensors", folder / "model.safetensors")
    assert open_checkpoint(folder).names() == ["b.cube"]


def test_index_names_a_missing_file(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()
    message = refusal(folder)
    assert "model-00002-of-00002.safetensors" in message and "b.cube" in message


def test_index_disagrees_with_a_shard(folder: Path) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    index["weight_map"]["b.cube"] = "model-00001-of-00002.safetensors"
    index["weight_map"]["c"] = "model-00002-of-00002.safetensors"
    (folder / INDEX_FILE).write_text(json.dumps(index))
    assert "b.cube" in refusal(folder)


# One byte less than whole, half of the data, in the header, in the length itself, nothing at all.
@pytest.mark.parametrize("keep", [-1, -20, 60, 5, 0])
def test_truncated_shard(folder: Path, keep: int) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    message = refusal(folder)
    assert path.name in message and "truncated" in message
    if keep < 0:
        assert "b.cube" in message


def test_header_that_contradicts_itself(folder: Path) -> None:
    header = {"b.cube": {"dtype": "I16", "shape": [2, 3, 5], "data_offsets": [0, 48]}}
    text = json.dumps(header).encode()
    data = struct.pack("<Q", len(text)) + text + bytes(48)
    (folder / "model-00002-of-00002.safetensors").write_bytes(data)
    assert "b.cube" in refusal(folder)


def test_pickle_only(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / INDEX_FILE]:
        path.unlink()
    assert "has no weights" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert "pickle (pytorch_model.bin)" in refusal(folder)


def test_config_missing_or_damaged(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert "config.json" in refusal(folder)
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(folder)


def test_sources_that_are_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    assert "is a file" in refusal(file)
    assert "no folder" in refusal(tmp_path / "nowhere")
