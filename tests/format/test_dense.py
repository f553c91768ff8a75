"""Dense models on disk: an MLP is one expert, in format version 2, and damage is named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import erniequant
from erniequant.checkpoint import open_checkpoint
from erniequant.errors import ErnieQuantError
from erniequant.formats.verbs import inspect, verify
from erniequant.models.header_check import check_headers

Edit = Callable[[dict[str, torch.Tensor]], None]
Damaged = Callable[[Edit], Path]
WithConfig = Callable[[Path, Callable[[dict[str, Any]], Any]], Path]
PREFIX = "model.layers.1.mlp."
# One MLP: gate, up and down of 96 x 160.
MLP = 3 * 96 * 160


def test_names_shapes_and_version(packed_dense: Path, packed_ernie: Path) -> None:
    checkpoint = open_checkpoint(packed_dense)
    stored = {
        name.removeprefix("model.layers.0.mlp."): (header.shape, header.stored_dtype)
        for name, header in checkpoint.headers.items()
        if name.startswith("model.layers.0.mlp.")
    }
    # Tiles of 32: 10 and 3 of them; 2 bits make 2 words, 4 bits make 4; 96 signs fill 3 words.
    assert stored == {
        "gate_up_proj_packed": ((1, 10, 192), "I32"),
        "gate_up_proj_scale": ((1, 320, 1), "I16"),
        "gate_up_proj_signs": ((1, 2, 3), "I32"),
        "down_proj_packed": ((1, 3, 640), "I32"),
        "down_proj_scale": ((1, 96, 1), "I16"),
        "down_proj_signs": ((1, 1, 5), "I32"),
        "down_proj.weight": ((1,), "BF16"),
    }
    assert checkpoint.config["quantization_config"]["format_version"] == 2
    # Checkpoints without an MLP can still be read by what knows version 1 alone.
    older = open_checkpoint(packed_ernie).config["quantization_config"]
    assert older["format_version"] == 1


def test_inspect(packed_dense: Path, micro_dense: Path) -> None:
    found, plain = inspect(packed_dense), inspect(micro_dense)
    assert (found.model_type, found.format_version) == ("ernie4_5", 2)
    assert found.quantized_layers == ("0.mlp", "1.mlp")
    assert found.codes["down_proj: cc4, register 10, tile 32, rotation 16"] == 1
    assert sum(found.codes.values()) == 4
    assert found.expert_weights == plain.expert_weights == 3 * MLP
    assert found.total_weights == plain.total_weights
    # gate_up is two thirds: words of (2 + 3) and (4 + 2) bits, 2 bytes per output, signs, guards;
    # layer 2 has 2 bytes per weight.
    words = (96 * 320 * (2 + 3) + 96 * 160 * (4 + 2)) // 8
    scales, signs, guards = 2 * (320 + 96) * 2, 2 * 4 * (2 * 3 + 5), 2 * 2
    assert found.expert_bytes == words + scales + signs + guards + 2 * MLP
    assert plain.expert_bits_per_weight == plain.total_bits_per_weight == 16
    by_name = {tensor.name: tensor.code for tensor in found.tensors}
    assert by_name[f"{PREFIX}down_proj.weight"] == "guard"
    assert by_name[f"{PREFIX}gate_up_proj_signs"] == "cc3/16"
    assert by_name["model.layers.2.mlp.down_proj.weight"] is None


def test_a_mixture_has_dense_layers_of_the_same_names(micro_ernie: Path) -> None:
    # Its first layer has model.layers.0.mlp.down_proj.weight, which is no expert.
    assert inspect(micro_ernie).expert_weights == 2 * 8 * 3 * 96 * 64


def test_verify(packed_dense: Path, micro_dense: Path, tmp_path: Path) -> None:
    report = verify(packed_dense, micro_dense)
    assert report.ok, report.problems
    assert {entry.name for entry in report.errors} == {
        f"model.layers.{layer}.mlp.{matrix}_proj.weight"
        for layer in (0, 1)
        for matrix in ("gate", "up", "down")
    }
    assert report.mean_error is not None and report.mean_error > 1  # random words
    erniequant.export(packed_dense, tmp_path / "bf16", "bf16")
    report = verify(packed_dense, tmp_path / "bf16")
    # Rounding to bfloat16 has a relative error of at most 2^-9 per weight.
    assert report.ok and all(0 < entry.error < 2**-16 for entry in report.errors)


def test_verify_finds_changed_copies(damaged_dense: Damaged, micro_dense: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.mlp.up_proj.weight"][3, 4] += 1
        tensors[f"{PREFIX}down_proj_scale"][0, 5, 0] = 0x7F80  # infinity as bfloat16

    problems = verify(damaged_dense(edit), micro_dense).problems
    assert len(problems) == 2
    assert "model.layers.2.mlp.up_proj.weight differs" in problems[0]
    assert f"{PREFIX}down_proj.weight does not decode to finite" in problems[1]


@pytest.mark.parametrize(("to", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_export(
    packed_dense: Path, micro_dense: Path, tmp_path: Path, to: str, dtype: torch.dtype
) -> None:
    erniequant.export(packed_dense, tmp_path / "out", to)
    out, original = open_checkpoint(tmp_path / "out"), open_checkpoint(micro_dense)
    assert set(out.names()) == set(original.names())
    for name in out.names():
        assert out.header(name).dtype == dtype
        assert out.header(name).shape == original.header(name).shape
        quantized = ".mlp." in name and "layers.2." not in name
        same = torch.equal(out.tensor(name).float(), original.tensor(name).float())
        assert same != quantized, name
    assert "quantization_config" not in out.config


def problems(folder: Path) -> tuple[str, ...]:
    return check_headers(open_checkpoint(folder)).problems


@pytest.mark.parametrize(
    "name", ["gate_up_proj_packed", "down_proj_scale", "down_proj_signs", "down_proj.weight"]
)
def test_missing(damaged_dense: Damaged, name: str) -> None:
    (line,) = problems(damaged_dense(lambda tensors: tensors.__delitem__(PREFIX + name)))
    what = "the guard tensor" if name == "down_proj.weight" else "tensor"
    assert line == f"{what} {PREFIX}{name} is missing"


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("down_proj_scale", torch.zeros(1, 96, 1).bfloat16(), "dtype BF16, expected int16"),
        ("gate_up_proj_packed", torch.zeros(1, 10, 96).int(), "[1, 10, 96], expected [1, 10, 288]"),
        # What the stock model would load: a checkpoint that is plain and quantised at once.
        ("down_proj.weight", torch.zeros(96, 160).bfloat16(), "[96, 160], expected [1]"),
    ],
)
def test_wrong(damaged_dense: Damaged, name: str, tensor: torch.Tensor, said: str) -> None:
    (line,) = problems(damaged_dense(lambda tensors: tensors.__setitem__(PREFIX + name, tensor)))
    assert line.startswith(f"tensor {PREFIX}{name} has ") and line.endswith(said)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (f"{PREFIX}up_proj.weight", "does not belong: its layer is quantised"),
        (f"{PREFIX}up_proj.bias", "does not belong: its layer is quantised"),
        (f"{PREFIX}experts.gate_up_proj_packed", "does not belong: its layer is quantised"),
        ("model.layers.2.mlp.gate_up_proj_packed", "does not name layer 2.mlp"),
    ],
)
def test_orphans(damaged_dense: Damaged, name: str, said: str) -> None:
    (line,) = problems(damaged_dense(lambda tensors: tensors.update({name: torch.zeros(2)})))
    assert line.startswith(f"tensor {name} ") and said in line


def test_packed_mlp_in_a_mixture(damaged: Damaged) -> None:
    name = "model.layers.0.mlp.gate_up_proj_packed"
    (line,) = problems(damaged(lambda tensors: tensors.update({name: torch.zeros(2)})))
    assert name in line and "does not name its layer" in line


def test_keys_must_fit_the_architecture(
    packed_dense: Path, packed_ernie: Path, with_config: WithConfig
) -> None:
    def rename(config: dict[str, Any], old: str, new: str) -> None:
        layers = config["quantization_config"]["layers"]
        layers[new] = layers.pop(old)
        config["quantization_config"]["format_version"] = 2

    dense = with_config(packed_dense, lambda c: rename(c, "1.mlp", "1"))
    with pytest.raises(ErnieQuantError, match="names layer 1, but layers of model_type 'ernie4_5'"):
        check_headers(open_checkpoint(dense))
    mixture = with_config(packed_ernie, lambda c: rename(c, "1", "1.mlp"))
    with pytest.raises(ErnieQuantError, match=r"1\.mlp, but .*'ernie4_5_moe' have keys without"):
        check_headers(open_checkpoint(mixture))


def test_biases_have_no_place(packed_dense: Path, with_config: WithConfig) -> None:
    folder = with_config(packed_dense, lambda c: c.update(use_bias=True))
    with pytest.raises(ErnieQuantError, match=r"use_bias, but quantised layer 0\.mlp"):
        check_headers(open_checkpoint(folder))


def test_sizes_are_those_of_the_config(packed_dense: Path, with_config: WithConfig) -> None:
    folder = with_config(packed_dense, lambda c: c.update(intermediate_size=192))
    assert any("expected [1, 12, 192]" in line for line in problems(folder))
    folder = with_config(packed_dense, lambda c: c.pop("intermediate_size"))
    with pytest.raises(ErnieQuantError, match="config.json has intermediate_size None"):
        check_headers(open_checkpoint(folder))


def test_versions(packed_dense: Path, packed_ernie: Path, with_config: WithConfig) -> None:
    def version(number: int) -> Callable[[dict[str, Any]], Any]:
        return lambda config: config["quantization_config"].update(format_version=number)

    with pytest.raises(ErnieQuantError, match=r"format_version 1, but layer 0\.mlp needs 2"):
        inspect(with_config(packed_dense, version(1)))
    with pytest.raises(ErnieQuantError, match="format_version 3, this erniequant reads 1 and 2"):
        inspect(with_config(packed_dense, version(3)))
    # Version 2 only adds to version 1.
    assert inspect(with_config(packed_ernie, version(2))).format_version == 2
