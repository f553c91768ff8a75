"""Export: a plain checkpoint under the original's names, with config and companions."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import erniequant
from erniequant.checkpoint import open_checkpoint
from erniequant.errors import ErnieQuantError


@pytest.mark.parametrize(("to", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_names_types_and_config(
    packed_ernie: Path, micro_ernie: Path, tmp_path: Path, to: str, dtype: torch.dtype
) -> None:
    source = tmp_path / "source"
    shutil.copytree(packed_ernie, source)
    (source / "tokenizer.json").write_text("{}")
    report = erniequant.export(source, tmp_path / "out", to, max_shard_bytes=100_000)
    out, original = open_checkpoint(tmp_path / "out"), open_checkpoint(micro_ernie)
    assert set(out.names()) == set(original.names())
    assert len(out.shards) > 3 and set(report.sha256) == set(out.shards)
    for name in out.names():
        assert out.header(name).shape == original.header(name).shape
        # The router stays float32 in a bfloat16 export.
        assert out.header(name).dtype in (dtype, torch.float32)
        if ".experts." not in name:
            assert torch.equal(out.tensor(name).float(), original.tensor(name).float())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert report.to_dict()["tensors"] == len(out.names())


def test_refusals(packed_ernie: Path, micro_ernie: Path, tmp_path: Path) -> None:
    with pytest.raises(ErnieQuantError, match="use bf16 or fp32"):
        erniequant.export(packed_ernie, tmp_path / "a", "int4")
    with pytest.raises(ErnieQuantError, match="is not quantised"):
        erniequant.export(micro_ernie, tmp_path / "b")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "file").write_text("")
    with pytest.raises(ErnieQuantError, match="not empty"):
        erniequant.export(packed_ernie, tmp_path / "c")
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
