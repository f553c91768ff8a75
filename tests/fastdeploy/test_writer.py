"""Writing: planned files, what is left out, and nothing that looks finished after an error."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from erniequant.checkpoint.files import sha256_of
from erniequant.checkpoint.reader import open_checkpoint
from erniequant.errors import ErnieQuantError
from erniequant.formats.fastdeploy import check_folder, open_fastdeploy
from erniequant.formats.results import WrittenShards
from tests.conftest import FileLimit
from tests.fastdeploy.codes import MadeUpExperts
from tests.fastdeploy.conftest import W4_END
from tests.fastdeploy.writing import write_fastdeploy

Encoded = dict[str, torch.Tensor]


def write(source: Path, folder: Path, **options: Any) -> WrittenShards:
    checkpoint = open_checkpoint(source)
    experts = MadeUpExperts(checkpoint.config, W4_END).encoded
    settings: dict[str, Any] = dict(experts=experts, w4_end_layer=W4_END) | options
    return write_fastdeploy(checkpoint, folder, **settings)


def edited(source: Path, folder: Path, edit: Callable[[Encoded], Any]) -> Path:
    """A copy of the original with other tensors."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_report_and_the_files(fd_source: Path, tmp_path: Path) -> None:
    report = write(fd_source, tmp_path / "fd", max_shard_bytes=500_000, tensor_parallel=2)
    files = sorted((tmp_path / "fd").rglob("*.safetensors"))
    assert len(files) > 4 and len(report.sha256) == len(files)
    for file in files:
        assert report.sha256[file.relative_to(tmp_path / "fd").as_posix()] == sha256_of(file)
        with safe_open(file, framework="np") as opened:
            metadata = opened.metadata()
        assert metadata["format"] == "np" and metadata["k_order"] == "mma64"
        assert metadata["producer"].startswith("erniequant")
    found = open_fastdeploy(tmp_path / "fd")
    assert report.total_bytes == sum(rank.total_bytes for rank in found.ranks)
    assert report.tensors == sum(len(rank.headers) for rank in found.ranks)
    assert report.left_out == () and json.loads(json.dumps(report.to_dict()))["tensors"]
    names = {path.name for path in (tmp_path / "fd").iterdir()}
    assert {"rank0", "rank1", "config.json", "tokenizer.json", "generation_config.json"} == (
        names - {"tokenizer_config.json", "special_tokens_map.json"}
    )


def test_wide_types_come_first_in_a_file(fd_single: Path) -> None:
    for file in fd_single.glob("*.safetensors"):
        header = json.loads(file.read_bytes()[8:].split(b"}}", 1)[0] + b"}}")
        start = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        assert start % 8 == 0
        for name, entry in header.items():
            if name != "__metadata__":
                size = {"F32": 4, "BF16": 2, "U8": 1, "I8": 1}[entry["dtype"]]
                assert (start + entry["data_offsets"][0]) % size == 0


def test_a_stored_tied_head_and_mtp_are_left_out(fd_source: Path, tmp_path: Path) -> None:
    def edit(tensors: Encoded) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.mtp_emb_norm.0.weight"] = torch.ones(384)

    source = edited(fd_source, tmp_path / "source", edit)
    report = write(source, tmp_path / "fd")
    assert set(report.left_out) == {"lm_head.weight", "model.mtp_emb_norm.0.weight"}
    assert check_folder(tmp_path / "fd") == ()


def test_correction_biases_that_are_missing_or_called_otherwise(
    fd_source: Path, tmp_path: Path
) -> None:
    name = "model.layers.{}.mlp.moe_statics.e_score_correction_bias"

    def edit(tensors: Encoded) -> None:
        del tensors[name.format(1)]
        other = name.format(2).replace(".moe_statics.", ".gate.moe_statics.")
        tensors[other] = tensors.pop(name.format(2))

    source = edited(fd_source, tmp_path / "source", edit)
    assert write(source, tmp_path / "fd").left_out == ()
    found, original = open_fastdeploy(tmp_path / "fd"), open_checkpoint(fd_source)
    assert torch.equal(found.tensor(name.format(1)), torch.zeros(1, 4))
    assert torch.equal(found.tensor(name.format(2)), original.tensor(name.format(2)))


def test_an_original_in_float32(fd_source: Path, tmp_path: Path) -> None:
    def widen(tensors: Encoded) -> None:
        tensors |= {name: tensor.float() for name, tensor in tensors.items()}

    write(edited(fd_source, tmp_path / "source", widen), tmp_path / "fd")
    write(fd_source, tmp_path / "same")
    digests = [sha256_of(tmp_path / name / "model.safetensors") for name in ("fd", "same")]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda t: t.update({"model.extra": torch.zeros(2)}), "model.extra is not part"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(2)}), "has shape"),
    ],
)
def test_originals_that_are_not_what_config_says(
    edit: Callable[[Encoded], Any], match: str, fd_source: Path, tmp_path: Path
) -> None:
    source = edited(fd_source, tmp_path / "source", edit)
    with pytest.raises(ErnieQuantError, match=match):
        write(source, tmp_path / "fd")
    assert not (tmp_path / "fd").exists()


@pytest.mark.parametrize("options", [dict(k_order="other"), dict(tensor_parallel=4)])
def test_options_are_refused_before_anything_is_made(
    options: dict[str, Any], fd_source: Path, tmp_path: Path
) -> None:
    with pytest.raises(ErnieQuantError, match="no k_order|cut for 4 ranks"):
        write(fd_source, tmp_path / "fd", **options)
    assert not (tmp_path / "fd").exists()


def test_a_folder_in_use(fd_source: Path, tmp_path: Path) -> None:
    (tmp_path / "fd").mkdir()
    (tmp_path / "fd" / "mine").write_text("mine")
    with pytest.raises(ErnieQuantError, match="not empty"):
        write(fd_source, tmp_path / "fd")


@pytest.mark.parametrize("tensor_parallel", [1, 2])
@pytest.mark.parametrize(
    "wrong",
    [
        lambda t: t.pop("code_zp"),
        lambda t: t.update(bias=torch.zeros(1)),
        lambda t: t.update(super_scales=t["super_scales"].float()),
        lambda t: t.update(quant_weight=t["quant_weight"].T.contiguous()),
    ],
    ids=["missing", "too many", "dtype", "shape"],
)
def test_experts_that_are_not_of_the_format_leave_nothing(
    wrong: Callable[[Encoded], Any], tensor_parallel: int, fd_source: Path, tmp_path: Path
) -> None:
    made_up = MadeUpExperts(open_checkpoint(fd_source).config, W4_END)

    def experts(layer: int, expert: int, projection: str) -> Encoded:
        tensors = made_up.encoded(layer, expert, projection)
        if (layer, expert, projection) == (3, 2, "down_proj"):
            wrong(tensors)
        return tensors

    with pytest.raises(ValueError, match=r"layers.3.mlp.experts.2.down_proj"):
        write(fd_source, tmp_path / "fd", experts=experts, tensor_parallel=tensor_parallel)
    assert list((tmp_path / "fd").iterdir()) == []
    # The same folder can be used again.
    write(fd_source, tmp_path / "fd", tensor_parallel=tensor_parallel)
    assert check_folder(tmp_path / "fd") == ()


def test_a_full_disk_leaves_nothing(
    fd_source: Path, tmp_path: Path, files_of_at_most: FileLimit
) -> None:
    with files_of_at_most(100_000), pytest.raises(ErnieQuantError, match="cannot write"):
        write(fd_source, tmp_path / "fd", tensor_parallel=2)
    assert list((tmp_path / "fd").iterdir()) == []


def test_experts_are_asked_for_once_in_order(fd_source: Path, tmp_path: Path) -> None:
    made_up, asked = MadeUpExperts(open_checkpoint(fd_source).config, W4_END), []

    def experts(layer: int, expert: int, projection: str) -> Encoded:
        asked.append((layer, expert, projection))
        assert not (tmp_path / "fd" / "config.json").exists()
        return made_up.encoded(layer, expert, projection)

    write(fd_source, tmp_path / "fd", experts=experts, tensor_parallel=2)
    assert asked == [
        (layer, expert, projection)
        for layer in (1, 2, 3)
        for expert in range(4)
        for projection in ("up_gate_proj", "down_proj")
    ]
