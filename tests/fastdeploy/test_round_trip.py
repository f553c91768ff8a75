"""Written, read back, exported: every weight is what the codes mean, and stock transformers
computes with it."""

from pathlib import Path

import pytest
import torch

from erniequant.checkpoint.reader import Checkpoint, open_checkpoint
from erniequant.errors import ErnieQuantError
from erniequant.formats.fastdeploy import export_bf16, open_fastdeploy
from erniequant.formats.fastdeploy.reshard import reshard
from tests.fastdeploy.codes import MadeUpExperts, rounded_wint8
from tests.fastdeploy.conftest import W4_END, write

WINT8 = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CUT_ALONG_INPUTS = ("o_proj.weight", "down_proj.weight")


def expected(source: Checkpoint, name: str, k_order: str, ranks: int) -> torch.Tensor:
    """What a tensor of the original has become."""
    original, path = source.tensor(name), name.split(".")
    if path[-2] not in WINT8:
        return original
    if "experts" in path:
        layer, expert, inner = int(path[2]), int(path[5]), source.config["moe_intermediate_size"]
        experts = MadeUpExperts(source.config, W4_END)
        if path[-2] == "down_proj":
            return experts.weight(layer, expert, "down_proj", k_order)
        both = experts.weight(layer, expert, "up_gate_proj", k_order)
        return both[:inner] if path[-2] == "gate_proj" else both[inner:]
    if name.endswith(CUT_ALONG_INPUTS):
        # A rank has a scale of its own.
        return torch.cat([rounded_wint8(part) for part in original.chunk(ranks, 1)], 1)
    return rounded_wint8(original)


def require_expected(folder: Path, original: Path, k_order: str, ranks: int) -> None:
    source, found = open_checkpoint(original), open_fastdeploy(folder)
    assert found.k_order == k_order and len(found.ranks) == ranks
    wanted = set(source.names()) - ({"lm_head.weight"} if found.model.tied else set())
    assert set(found.names()) == wanted and len(found.names()) == len(wanted)
    for name in found.names():
        tensor, exact = found.tensor(name), expected(source, name, k_order, ranks)
        assert tensor.dtype == exact.dtype and found.shape(name) == tuple(exact.shape), name
        assert torch.equal(tensor, exact), name


def test_single_folder(fd_single: Path, fd_source: Path) -> None:
    require_expected(fd_single, fd_source, "mma64", 1)


def test_rank_folders(fd_ranks: Path, fd_source: Path) -> None:
    require_expected(fd_ranks, fd_source, "mma64", 2)


def test_plain_order_head_of_its_own_no_dense_layer(untied_source: Path, tmp_path: Path) -> None:
    require_expected(write(untied_source, tmp_path / "fd", "plain"), untied_source, "plain", 1)


def test_plain_order_in_ranks(untied_source: Path, tmp_path: Path) -> None:
    require_expected(write(untied_source, tmp_path / "fd", "plain", 2), untied_source, "plain", 2)


def test_wint8_is_within_half_a_step(fd_single: Path, fd_source: Path) -> None:
    source, found = open_checkpoint(fd_source), open_fastdeploy(fd_single)
    name = "model.layers.2.self_attn.o_proj.weight"
    exact = source.tensor(name).float()
    step = exact.abs().amax(1, keepdim=True) / 127
    # The scale is rounded to bfloat16, by which the largest weights may be clipped: 127 * 2^-9.
    assert ((found.tensor(name) - exact).abs() <= step * 0.76).all()


@pytest.mark.parametrize("ranks", [1, 2])
def test_stock_transformers_computes_what_the_codes_mean(
    ranks: int, fd_single: Path, fd_ranks: Path, fd_source: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    report = export_bf16(fd_single if ranks == 1 else fd_ranks, tmp_path / "plain", "fp32")
    assert report.to == "fp32" and (tmp_path / "plain" / "tokenizer.json").is_file()
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.rope_parameters["rope_theta"] == 500000.0

    truth = AutoModelForCausalLM.from_pretrained(fd_source, dtype=torch.float32)
    source = open_checkpoint(fd_source)
    parameters = dict(truth.named_parameters())
    inner = source.config["moe_intermediate_size"]
    with torch.no_grad():
        for name in source.names():
            tensor, path = expected(source, name, "mma64", ranks), name.split(".")
            if "experts" not in path:
                parameters[name.replace(".moe_statics.", ".gate.moe_statics.")].copy_(tensor)
                continue
            fused = ".".join([*path[:5], "down_proj" if "down_proj" in path else "gate_up_proj"])
            rows = slice(inner, None) if "up_proj" in path else slice(0, inner)
            place = parameters[fused][int(path[5])]
            (place if "down_proj" in path else place[rows]).copy_(tensor)
        tokens = torch.randint(2, 128, (2, 24))
        assert torch.equal(model(tokens).logits, truth(tokens).logits)


def test_export_to_bf16_rounds_what_was_decoded_only(
    fd_single: Path, fd_source: Path, tmp_path: Path
) -> None:
    export_bf16(fd_single, tmp_path / "plain", max_shard_bytes=1_000_000)
    exported, source = open_checkpoint(tmp_path / "plain"), open_checkpoint(fd_source)
    assert len(exported.shards) > 1 and exported.config["dtype"] == "bfloat16"
    assert "quantization_config" not in exported.config and "erniequant" not in exported.config
    for name in exported.names():
        assert exported.header(name).dtype == source.header(name).dtype, name
    name = "model.layers.3.mlp.experts.2.up_proj.weight"
    assert torch.equal(exported.tensor(name), expected(source, name, "mma64", 1).bfloat16())


def test_transformers_alone_refuses_such_a_folder(fd_single: Path) -> None:
    from transformers import AutoModelForCausalLM

    with pytest.raises(ValueError, match="quant_method"):
        AutoModelForCausalLM.from_pretrained(fd_single)


def test_export_to_nothing_else(fd_single: Path, tmp_path: Path) -> None:
    with pytest.raises(ErnieQuantError, match="bf16 or fp32"):
        export_bf16(fd_single, tmp_path / "plain", "int8")


def test_home_folders(fd_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(fd_source, Path("~/whole"))
    reshard("~/whole", "~/ranks", tensor_parallel=2)
    export_bf16("~/whole", "~/plain")
    require_expected(tmp_path / "whole", fd_source, "mma64", 1)
    assert len(open_fastdeploy(tmp_path / "ranks").ranks) == 2
    assert (tmp_path / "plain" / "config.json").is_file()
