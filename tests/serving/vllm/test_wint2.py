"""vLLM says about FastDeploy's WINT2 checkpoints what transformers says, on one rank and two."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from erniequant.checkpoint.reader import open_checkpoint
from erniequant.errors import ErnieQuantError
from erniequant.formats.fastdeploy.load import load_fastdeploy
from erniequant.formats.fastdeploy.sizes import NO_WINT4
from erniequant.serving.vllm.experts import plain_experts
from erniequant.serving.vllm.fastdeploy_config import FastDeployVllmConfig
from erniequant.serving.vllm.wint2_experts import require_divisible
from testing.micro_model import write_micro_ernie
from tests.fastdeploy.codes import MadeUpExperts
from tests.fastdeploy.writing import write_fastdeploy
from tests.serving.vllm.harness import agrees, case, run_engines

# Hidden 384 = 3 * 128 has three bytes of scales; two ranks hold 128 of each expert's 256 inner
# channels, the least there is, or two of the four experts. Heads of 96 suit vLLM's attention.
SIZES = dict(hidden_size=384, intermediate_size=384, moe_intermediate_size=256, moe_num_experts=4,
             num_hidden_layers=4, moe_layer_end_index=3)  # fmt: skip


def write(
    source: Path, folder: Path, k_order: str = "mma64", ranks: int = 1, w4_end: int = 1
) -> Path:
    """A checkpoint with made-up experts; those of layer 1 are wint4 unless told otherwise."""
    checkpoint = open_checkpoint(source)
    write_fastdeploy(
        checkpoint, folder, MadeUpExperts(checkpoint.config, w4_end).encoded,
        w4_end_layer=w4_end, k_order=k_order, tensor_parallel=ranks, max_shard_bytes=1_000_000,
    )  # fmt: skip
    return folder


def unrecorded(folder: Path, to: Path) -> Path:
    """A copy as others write it: nothing says which K order it has."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    del config["erniequant"]
    (to / "config.json").write_text(json.dumps(config))
    for shard in to.glob("*.safetensors"):
        save_file(load_file(shard), shard, metadata={"format": "np"})
    return to


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original, with correction biases that change the choice of experts."""
    folder = write_micro_ernie(tmp_path_factory.mktemp("wint2") / "source", **SIZES)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(4)
    for name, tensor in tensors.items():
        if name.endswith("e_score_correction_bias"):
            tensors[name] = torch.rand(tensor.shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def checkpoints(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    found = {
        "mma64": write(source, root / "mma64"),
        "plain": write(source, root / "plain", "plain"),
        "all wint2": write(source, root / "all", w4_end=NO_WINT4),
        "rank folders": write(source, root / "ranks", ranks=2),
    }
    return found | {"unrecorded": unrecorded(found["plain"], root / "unrecorded")}


@pytest.fixture(scope="module")
def models(checkpoints: dict[str, Path]) -> Callable[[str], Any]:
    """The model of a name in transformers, in float32."""
    loaded: dict[str, Any] = {}

    def load(name: str) -> Any:
        name = "plain" if name == "unrecorded" else name
        if name not in loaded:
            loaded[name] = load_fastdeploy(checkpoints[name], torch.device("cpu"), torch.float32)
        return loaded[name]

    return load


@pytest.fixture(scope="module")
def one_rank_wint2(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    runs = [case(name, checkpoints[name]) for name in ("mma64", "plain", "all wint2")]
    given = {"erniequant": {"k_order": "plain"}}
    runs.append(case("unrecorded", checkpoints["unrecorded"], hf_overrides=given))
    runs.append(case("compiled", checkpoints["mma64"], eager=False))
    runs.append(case("cut", checkpoints["rank folders"], fails=True))
    return run_engines(tmp_path_factory.mktemp("wint2_one"), *runs)


@pytest.fixture(scope="module")
def two_ranks_wint2(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    runs = [case(name, checkpoints[name], ranks=2) for name in ("mma64", "rank folders")]
    runs.append(case("experts", checkpoints["all wint2"], ranks=2, enable_expert_parallel=True))
    return run_engines(tmp_path_factory.mktemp("wint2_two"), *runs)


@pytest.mark.parametrize("name", ["mma64", "plain", "all wint2", "unrecorded"])
def test_one_rank(name: str, one_rank_wint2: dict[str, Any], models: Callable[[str], Any]) -> None:
    agrees(one_rank_wint2[name], models(name))


def test_one_rank_compiled(one_rank_wint2: dict[str, Any], models: Callable[[str], Any]) -> None:
    agrees(one_rank_wint2["compiled"], models("mma64"))


@pytest.mark.parametrize(
    ("run", "name"),
    [("mma64", "mma64"), ("rank folders", "rank folders"), ("experts", "all wint2")],
)
def test_two_ranks(
    run: str, name: str, two_ranks_wint2: dict[str, Any], models: Callable[[str], Any]
) -> None:
    agrees(two_ranks_wint2[run], models(name))


def test_the_k_order_shows(one_rank_wint2: dict[str, Any], models: Callable[[str], Any]) -> None:
    # Same codes in the other order: otherwise the tests above would prove little.
    said = one_rank_wint2["plain"]["said"][0]
    assert said["tokens"] != one_rank_wint2["mma64"]["said"][0]["tokens"]


def test_rank_folders_need_their_number_of_ranks(one_rank_wint2: dict[str, Any]) -> None:
    error = one_rank_wint2["cut"]["error"]
    assert "was cut for 2 ranks; serve it with --tensor-parallel-size 2" in error


def test_an_unknown_k_order_is_refused_before_the_model_is_built(
    checkpoints: dict[str, Path],
) -> None:
    folder = checkpoints["unrecorded"]
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = FastDeployVllmConfig.from_config(settings)
    with pytest.raises(ErnieQuantError, match="does not say in which order.*hf-overrides"):
        config.maybe_update_config(str(folder))
    config.maybe_update_config(str(checkpoints["plain"]))
    assert config.k_order == "plain"


def test_a_missing_tensor_is_named_before_the_model_is_built(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoints["mma64"], tmp_path / "damaged")
    name = "ernie.layers.2.mlp.experts.3.down_proj.code_zp"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / index["weight_map"].pop(name)
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard, metadata={"format": "np"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    with pytest.raises(ErnieQuantError, match=f"{name} is missing"):
        FastDeployVllmConfig.from_config(settings).maybe_update_config(str(folder))


def test_plain_experts_are_not_divided_on_a_cpu() -> None:
    # vLLM 0.32 would end with a segmentation fault in cpu_fused_moe.
    parallel = SimpleNamespace(use_ep=True)
    layer = SimpleNamespace(moe_config=SimpleNamespace(moe_parallel_config=parallel))
    with pytest.raises(ErnieQuantError, match="layer 1, wint4, has experts that are not packed"):
        plain_experts(layer, "layer 1, wint4,")


@pytest.mark.parametrize(
    ("inner", "ranks", "fits"),
    [(256, 2, True), (1536, 4, True), (3584, 4, True), (3584, 8, False), (384, 2, False),
     (384, 1, True)],
)  # fmt: skip
def test_bytes_of_scales_are_not_cut(inner: int, ranks: int, fits: bool) -> None:
    if fits:
        require_divisible(inner, ranks, "layer 3")
        return
    with pytest.raises(ErnieQuantError, match=f"layer 3: .*{inner} cannot be .* {ranks} ranks"):
        require_divisible(inner, ranks, "layer 3")
