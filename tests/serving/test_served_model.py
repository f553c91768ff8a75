"""Models before a weight is read: names, formats, bytes of a rank."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from erniequant.checkpoint.reader import open_checkpoint
from erniequant.errors import ErnieQuantError
from erniequant.formats.fastdeploy.config import RECORD
from erniequant.serving.served_model import read_served
from testing.micro_model import add_tokenizer, write_micro_ernie
from tests.fastdeploy.conftest import SIZES, write


@pytest.fixture(scope="module")
def wint2(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A FastDeploy checkpoint for one rank, and one for two."""
    root = tmp_path_factory.mktemp("wint2")
    source = add_tokenizer(write_micro_ernie(root / "source", **SIZES))
    return {n: write(source, root / f"ranks{n}", tensor_parallel=n) for n in (1, 2)}


def test_names_and_formats(
    divisible: Path, micro_source: Path, packed_dense: Path, packed_vl: Path,
    wint2: dict[int, Path], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    expected = {
        divisible: ("native", "erniequant format 1", True, True, 1),
        packed_dense: ("native", "erniequant format 2", False, False, 1),
        packed_vl: ("native", "erniequant format 1", True, True, 1),
        micro_source: ("plain", "not quantised", True, False, 1),
        wint2[1]: ("fastdeploy-wint2", "FastDeploy WINT2", True, False, 1),
        wint2[2]: ("fastdeploy-wint2", "FastDeploy WINT2", True, False, 2),
    }
    for folder, wanted in expected.items():
        found = read_served(str(folder))
        assert found.name == folder.name and not found.is_remote
        assert (
            found.format, found.description, found.has_tokenizer, found.has_template, found.cut_for
        ) == wanted  # fmt: skip
    monkeypatch.chdir(divisible)
    assert read_served(".").name == divisible.name  # not a dot


def test_sizes(divisible: Path, talker: Path, packed_vl: Path) -> None:
    found = read_served(str(divisible))
    assert (found.heads, found.kv_heads, found.head_dim, found.positions) == (4, 2, 32, 256)
    # Keys and values of 3 layers, 2 heads of 32, in two bytes each; a head is repeated on four.
    assert [found.token_bytes(n) for n in (1, 2, 4)] == [768, 384, 384]
    assert read_served(str(talker)).head_dim == read_served(str(packed_vl)).head_dim == 24


def test_bytes_of_one_rank_are_those_of_the_files(divisible: Path, micro_source: Path) -> None:
    """But for routers, which are float32 in the file and counted as bfloat16."""
    for folder in (divisible, micro_source):
        assert read_served(str(folder)).weight_bytes() == sum(stored(folder).values())


def test_bytes_of_a_rank(divisible: Path) -> None:
    """Matrices are cut; norms, routers, their biases, the scales of down, and the signs of gate and
    up each rank has whole."""
    model, headers = read_served(str(divisible)), stored(divisible)
    whole = ("norm.weight", "mlp.gate.weight", "bias", "down_proj_scale", "gate_up_proj_signs")
    expected = sum(size if name.endswith(whole) else size // 2 for name, size in headers.items())
    assert model.weight_bytes(2) == expected


def test_bytes_of_a_rank_of_whole_experts(divisible: Path) -> None:
    """3 of 8 experts are the most that one of three ranks has; signs belong to all of them. All
    else is cut, and rounded up."""
    expected = 0
    for name, size in stored(divisible).items():
        if name.endswith(("_packed", "_scale")):
            expected += size // 8 * 3
        elif name.endswith(("_signs", "norm.weight", "mlp.gate.weight", "bias")):
            expected += size
        else:
            expected += math.ceil(size / 3)
    assert read_served(str(divisible)).weight_bytes(3, whole_experts=True) == expected


def stored(folder: Path) -> dict[str, int]:
    """Bytes by name of all but the guards, which are nobody's parameters: of packed experts as in
    the file, of all else in bfloat16."""
    return {
        name: h.n_bytes if ".mlp.experts." in name else 2 * math.prod(h.shape)
        for name, h in open_checkpoint(folder).headers.items()
        if not name.endswith("mlp.experts.down_proj")
    }


def test_wint8_counts_as_it_is_computed(wint2: dict[int, Path]) -> None:
    """FastDeploy's bytes become bfloat16, experts stay packed."""
    headers = open_checkpoint(wint2[1]).headers
    attention = [h for n, h in headers.items() if "self_attn" in n and n.endswith("quant_weight")]
    assert attention
    expected = sum(
        h.n_bytes if ".mlp.experts." in n else 2 * h.elements for n, h in headers.items()
    )
    assert read_served(str(wint2[1])).weight_bytes() == expected


def test_unknown_version_of_the_format(
    talker: Path, with_config: Callable[[Path, Callable[[dict[str, Any]], Any]], Path]
) -> None:
    newer = with_config(talker, lambda c: c["quantization_config"].update(format_version=7))
    with pytest.raises(ErnieQuantError, match=r"format_version 7, this erniequant reads 1 and 2"):
        read_served(str(newer))


def test_other_quantisations_and_models(
    micro_source: Path, with_config: Callable[[Path, Callable[[dict[str, Any]], Any]], Path]
) -> None:
    other = with_config(
        micro_source, lambda c: c.update(quantization_config={"quant_method": "gptq"})
    )
    with pytest.raises(ErnieQuantError, match=r"does not serve \(config.json has .*'gptq'\)"):
        read_served(str(other))
    llama = with_config(micro_source, lambda c: c.update(model_type="llama"))
    with pytest.raises(ErnieQuantError, match="model_type 'llama'; supported: ernie4_5_moe, "):
        read_served(str(llama))


def test_incomplete_folders(talker: Path, tmp_path: Path) -> None:
    with pytest.raises(ErnieQuantError, match="no folder .*; give a checkpoint folder or"):
        read_served(str(tmp_path / "nowhere"))
    copy = shutil.copytree(talker, tmp_path / "copy")
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    (copy / min(index["weight_map"].values())).unlink()
    with pytest.raises(ErnieQuantError, match="there is no such file; complete the download"):
        read_served(str(copy))


def test_unknown_order_of_wint2(wint2: dict[int, Path], tmp_path: Path) -> None:
    """As FastDeploy's own checkpoints, which record none."""
    copy = shutil.copytree(wint2[1], tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != RECORD}))
    for shard in copy.glob("*.safetensors"):
        save_file(load_file(shard), shard)
    with pytest.raises(ErnieQuantError, match="does not say in which order its WINT2 codes"):
        read_served(str(copy))
