"""Opening: ranks, K orders, and folders that are not what they should be."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from erniequant.checkpoint.reader import open_checkpoint
from erniequant.errors import ErnieQuantError
from erniequant.formats.fastdeploy import detect_k_order, export_bf16, open_fastdeploy
from tests.fastdeploy.codes import MadeUpExperts, decode_wint2, encode_wint2
from tests.fastdeploy.conftest import W4_END
from tests.fastdeploy.writing import write_fastdeploy

Change = Callable[[dict[str, Any]], Any]


def copied(folder: Path, to: Path, change: Change | None = None) -> Path:
    """A copy of a checkpoint with another config.json."""
    shutil.copytree(folder, to)
    if change is not None:
        config = json.loads((to / "config.json").read_text())
        change(config)
        (to / "config.json").write_text(json.dumps(config))
    return to


def without_record(folder: Path, to: Path) -> Path:
    """As a file of somebody else: nothing says the K order or who made it."""
    copied(folder, to, lambda config: config.pop("erniequant"))
    for shard in to.rglob("*.safetensors"):
        save_file(load_file(shard), shard, metadata={"format": "np"})
    return to


def test_the_first_wint2_matrix_of_a_rank_is_its_part_of_gate_then_up(fd_ranks: Path) -> None:
    # What FastDeploy itself would compute with on the second rank.
    found = open_fastdeploy(fd_ranks)
    prefix = "ernie.layers.2.mlp.experts.3.up_gate_proj."
    names = ("quant_weight", "weight_scale", "super_scales", "code_scale", "code_zp")
    rank = decode_wint2(*(found.ranks[1].tensor(prefix + n) for n in names), k_order="mma64").T
    expert = "model.layers.2.mlp.experts.3."
    gate, up = (found.tensor(f"{expert}{name}.weight") for name in ("gate_proj", "up_proj"))
    assert torch.equal(rank, torch.cat([gate[128:], up[128:]]))


def test_tensors_that_are_not_there(fd_single: Path) -> None:
    found = open_fastdeploy(fd_single)
    for name in ("lm_head.weight", "model.layers.0.mlp.gate.weight", "nonsense"):
        with pytest.raises(ErnieQuantError, match="is missing"):
            found.tensor(name)


def test_a_tensor_may_be_changed_by_who_asked_for_it(fd_single: Path) -> None:
    found, name = open_fastdeploy(fd_single), "model.layers.2.self_attn.q_proj.weight"
    found.tensor(name).zero_()
    assert found.tensor(name).any()


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda f: shutil.rmtree(f / "rank1"), "1 rank folders, but no rank1"),
        (lambda f: shutil.rmtree(f / "rank0"), "1 rank folders, but no rank0"),
        (lambda f: (f / "rank1").rename(f / "rank2"), "but no rank1"),
        (lambda f: shutil.copytree(f / "rank1", f / "rank2"), "cut for 2 ranks, but has 3"),
        (lambda f: (f / "rank0" / "model.safetensors.index.json").unlink(), "rank0 has no weights"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "both rank folders and weights"),
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
    ],
)
def test_rank_folders_that_are_incomplete(
    damage: Callable[[Path], Any], match: str, fd_ranks: Path, tmp_path: Path
) -> None:
    folder = copied(fd_ranks, tmp_path / "ranks")
    damage(folder)
    with pytest.raises(ErnieQuantError, match=match):
        open_fastdeploy(folder)


def edit_rank(folder: Path, name: str, edit: Callable[[torch.Tensor], Any]) -> None:
    """Change a tensor of rank 1 in place."""
    for shard in (folder / "rank1").glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            with safe_open(shard, framework="pt") as file:
                metadata = file.metadata()
            tensors[name] = edit(tensors[name])
            save_file(tensors, shard, metadata=metadata)


def test_ranks_that_disagree(fd_ranks: Path, tmp_path: Path) -> None:
    folder = copied(fd_ranks, tmp_path / "ranks")
    name = "ernie.layers.1.mlp.gate.weight"
    edit_rank(folder, name, lambda tensor: tensor + 1)
    found = open_fastdeploy(folder)
    with pytest.raises(ErnieQuantError, match=f"{name} of rank1 differs from that of rank0"):
        found.tensor("model.layers.1.mlp.gate.weight")


def test_a_wrong_tensor_names_its_rank(fd_ranks: Path, tmp_path: Path) -> None:
    folder = copied(fd_ranks, tmp_path / "ranks")
    edit_rank(folder, "ernie.norm.weight", lambda tensor: tensor[:-1].contiguous())
    with pytest.raises(ErnieQuantError, match=r"rank1: tensor ernie.norm.weight has shape \[383\]"):
        open_fastdeploy(folder)


def test_ranks_cut_for_another_number(fd_ranks: Path, tmp_path: Path) -> None:
    # Without our record only the shapes tell.
    folder = without_record(fd_ranks, tmp_path / "ranks")
    for number in (2, 3):
        shutil.copytree(folder / "rank1", folder / f"rank{number}")
    with pytest.raises(ErnieQuantError, match="cut for 4 ranks"):
        open_fastdeploy(folder)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c.update(num_hidden_layers=2**20), "num_hidden_layers"),
        (lambda c: c.update(moe_num_experts=2**20), "moe_num_experts"),
        (lambda c: c.update(hidden_size=256), "has shape"),
        (lambda c: c.update(model_type="llama"), "model_type"),
        (lambda c: c.pop("quantization_config"), "no FastDeploy WINT2"),
        (lambda c: c["quantization_config"]["moe_quant_config"]["moe_w4_quant_config"].update(
            quant_end_layer=2), "layers.2.mlp.experts.0.up_gate_proj.quant_weight"),
    ],
)  # fmt: skip
def test_a_config_of_another_model(
    change: Change, match: str, fd_single: Path, tmp_path: Path
) -> None:
    with pytest.raises(ErnieQuantError, match=match):
        open_fastdeploy(copied(fd_single, tmp_path / "other", change))


def test_the_k_order_that_files_record(fd_single: Path, tmp_path: Path) -> None:
    assert open_fastdeploy(fd_single, "mma64").k_order == "mma64"
    with pytest.raises(ErnieQuantError, match="plain was given"):
        open_fastdeploy(fd_single, "plain")
    # The headers of the files say it as well.
    only_files = copied(fd_single, tmp_path / "files", lambda config: config.pop("erniequant"))
    assert open_fastdeploy(only_files).k_order == "mma64"
    other = copied(fd_single, tmp_path / "x", lambda c: c["erniequant"].update(k_order="plain"))
    with pytest.raises(ErnieQuantError, match="do not belong together"):
        open_fastdeploy(other)


def test_without_a_k_order_experts_are_not_guessed(fd_single: Path, tmp_path: Path) -> None:
    found = open_fastdeploy(without_record(fd_single, tmp_path / "foreign"))
    assert found.k_order is None
    with pytest.raises(ErnieQuantError, match="give k_order"):
        found.tensor("model.layers.2.mlp.experts.0.gate_proj.weight")
    # wint4 and wint8 have no such order.
    for part in ("mlp.experts.0.gate_proj", "self_attn.q_proj"):
        assert found.tensor(f"model.layers.1.{part}.weight").any()


@pytest.mark.parametrize("k_order", ["plain", "mma64"])
def test_the_original_tells_the_k_order(k_order: str, fd_source: Path, tmp_path: Path) -> None:
    source = open_checkpoint(fd_source)
    made_up = MadeUpExperts(source.config, W4_END)

    def experts(layer: int, expert: int, projection: str) -> dict[str, torch.Tensor]:
        if (layer, expert, projection) != (2, 0, "up_gate_proj"):
            return made_up.encoded(layer, expert, projection)
        prefix = "model.layers.2.mlp.experts.0."
        both = [source.tensor(f"{prefix}{name}.weight") for name in ("gate_proj", "up_proj")]
        return encode_wint2(torch.cat(both).T, k_order)

    write_fastdeploy(source, tmp_path / "fd", experts, w4_end_layer=W4_END, k_order=k_order)
    folder = without_record(tmp_path / "fd", tmp_path / "foreign")
    assert detect_k_order(open_fastdeploy(folder), source) == k_order
    export_bf16(folder, tmp_path / "plain", "fp32", reference=fd_source)
    name = "model.layers.3.mlp.experts.1.down_proj.weight"
    exported = open_checkpoint(tmp_path / "plain").tensor(name)
    assert torch.equal(exported, made_up.weight(3, 1, "down_proj", k_order))


def test_another_original_does_not_tell_it(fd_single: Path, fd_source: Path) -> None:
    with pytest.raises(ErnieQuantError, match="in no k_order .*plain 1.*mma64 1"):
        detect_k_order(open_fastdeploy(fd_single), open_checkpoint(fd_source))
