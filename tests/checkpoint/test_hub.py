"""Models on Hugging Face: what is asked for, when, and what happens when it fails. The hub is a
folder here; its client's functions are replaced."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors import safe_open

import erniequant
from erniequant.checkpoint.reader import INDEX_FILE, open_checkpoint
from erniequant.checkpoint.writer import CheckpointWriter
from erniequant.errors import ErnieQuantError
from erniequant.formats.verbs import inspect
from tests.micro import CALIBRATION

NAME = "someone/some-model"


class Hub:
    """A repository in a folder, a cache in another, and a record of what was asked for."""

    def __init__(self, repository: Path, cache: Path):
        self.repository, self.cache = repository, cache / "snapshots" / "0123abcd"
        self.cache.mkdir(parents=True)
        self.asked: list[str] = []

    def snapshot_download(self, name: str, allow_patterns: list[str]) -> str:
        assert name == NAME
        self.asked.append("small files")
        for pattern in allow_patterns:
            for path in self.repository.glob(pattern):
                assert path.suffix not in (".safetensors", ".bin", ".pt")
                shutil.copy(path, self.cache)
        return str(self.cache)

    def get_safetensors_metadata(self, name: str, revision: str) -> Any:
        assert (name, revision) == (NAME, "0123abcd")
        self.asked.append("headers")
        files = {}
        for path in self.repository.glob("*.safetensors"):
            raw = path.read_bytes()
            entries = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
            entries.pop("__metadata__", None)
            tensors = {name: SimpleNamespace(**entry) for name, entry in entries.items()}
            files[path.name] = SimpleNamespace(tensors=tensors)
        return SimpleNamespace(files_metadata=files)

    def hf_hub_download(self, name: str, file: str, revision: str) -> str:
        assert (name, revision) == (NAME, "0123abcd")
        self.asked.append(file)
        return str(shutil.copy(self.repository / file, self.cache))


@pytest.fixture
def hub(micro_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """`micro_source` in several shards."""
    repository = tmp_path / "repository"
    source = open_checkpoint(micro_source)
    with CheckpointWriter(repository, max_shard_bytes=200_000) as writer:
        for name in source.names():
            writer.add(name, source.tensor(name))
        writer.finish()
    for path in micro_source.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, repository)
    assert len(list(repository.glob("*.safetensors"))) >= 3
    found = Hub(repository, tmp_path / "cache")
    for function in ("snapshot_download", "get_safetensors_metadata", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, function, getattr(found, function))
    return found


def shards(hub: Hub) -> list[str]:
    return sorted(path.name for path in hub.repository.glob("*.safetensors"))


def test_a_plan_and_an_inspection_need_no_weights(hub: Hub, tmp_path: Path) -> None:
    report = erniequant.quantize(NAME, tmp_path / "q", bits=2, max_tp=1, dry_run=True)
    size = open_checkpoint(hub.repository).total_bytes
    assert f"to download before that: {size / 1e6:.1f} MB" in report.plan_text
    assert len(inspect(NAME).tensors) == len(open_checkpoint(hub.repository).names())
    assert hub.asked == ["small files", "headers"] * 2
    assert not list(hub.cache.glob("*.safetensors"))


def test_a_tensor_brings_its_shard_and_no_other(hub: Hub) -> None:
    checkpoint = open_checkpoint(NAME)
    name = checkpoint.names()[-1]
    shard = checkpoint.header(name).shard
    with safe_open(hub.repository / shard, framework="pt") as file:
        assert torch.equal(checkpoint.tensor(name), file.get_tensor(name))
    assert hub.asked == ["small files", "headers", shard]
    others = [h.n_bytes for h in checkpoint.headers.values() if h.shard != shard]
    assert checkpoint.absent_bytes == sum(others)


def test_quantising_downloads_shard_by_shard(
    hub: Hub, micro_source: Path, micro_text: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"bits": 2, "calib": str(micro_text), "threads": 1, **CALIBRATION}
    erniequant.quantize(NAME, tmp_path / "q", **options)
    assert hub.asked == ["small files", "headers", *shards(hub)]
    erniequant.quantize(micro_source, tmp_path / "local", **options)
    name = "model.layers.2.mlp.experts.down_proj_packed"
    found, expected = (open_checkpoint(tmp_path / f).tensor(name) for f in ("q", "local"))
    assert torch.equal(found, expected)


def test_a_bad_weight_in_an_early_shard_stops_before_the_last_is_downloaded(
    hub: Hub, micro_text: Path, tmp_path: Path
) -> None:
    path = hub.repository / shards(hub)[0]
    data = bytearray(path.read_bytes())
    data[-2:] = b"\x80\x7f"  # inf
    path.write_bytes(data)
    with pytest.raises(ErnieQuantError, match="holds inf or nan"):
        erniequant.quantize(
            NAME, tmp_path / "q", bits=2, calib=str(micro_text), threads=1, **CALIBRATION
        )
    assert shards(hub)[-1] not in hub.asked
    assert not (tmp_path / "q").exists()


def test_what_is_in_the_cache_is_not_asked_for_again(hub: Hub) -> None:
    open_checkpoint(NAME).fetch()
    hub.asked.clear()
    model, tokenizer = erniequant.load(NAME, device="cpu")
    assert model is not None and tokenizer is not None
    assert hub.asked == ["small files"]


def test_a_model_in_one_file(hub: Hub, micro_source: Path) -> None:
    for path in (*hub.repository.glob("*.safetensors"), hub.repository / INDEX_FILE):
        path.unlink()
    shutil.copy(micro_source / "model.safetensors", hub.repository)
    checkpoint = open_checkpoint(NAME)
    assert checkpoint.shards == ("model.safetensors",)
    assert torch.equal(
        checkpoint.tensor("model.norm.weight"),
        open_checkpoint(micro_source).tensor("model.norm.weight"),
    )


def test_a_shard_that_is_not_as_promised_is_refused(hub: Hub) -> None:
    checkpoint = open_checkpoint(NAME)
    first, second = shards(hub)[:2]
    shutil.copy(hub.repository / second, hub.repository / first)
    with pytest.raises(ErnieQuantError, match=f"{first} holds other tensors than its repository"):
        checkpoint.fetch()


@pytest.mark.parametrize(
    "function", ["snapshot_download", "get_safetensors_metadata", "hf_hub_download"]
)
def test_a_hub_that_fails_is_one_line(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    def fail(*_: Any, **__: Any) -> Callable[[], None]:
        raise OSError("offline\nsecond line")

    monkeypatch.setattr(huggingface_hub, function, fail)
    with pytest.raises(ErnieQuantError, match=f"{NAME}.*offline$"):
        open_checkpoint(NAME).fetch()
