"""Verification: finds every kind of damage, and measures errors that are known beforehand."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import erniequant
from erniequant.checkpoint.files import sha256_of, write_json
from erniequant.errors import ErnieQuantError
from erniequant.formats.verbs import verify

Edit = Callable[[dict[str, torch.Tensor]], None]
Damaged = Callable[[Edit], Path]
PREFIX = "model.layers.1.mlp.experts."


def test_sound_checkpoint(packed_ernie: Path) -> None:
    report = verify(packed_ernie)
    assert report.ok and report.problems == ()
    # Two layers, eight experts, gate and up and down.
    assert report.decoded_matrices == 2 * 8 * 3
    assert report.mean_error is None and report.checksums == {}
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True


def test_against_its_own_export_nothing_is_lost(packed_ernie: Path, tmp_path: Path) -> None:
    erniequant.export(packed_ernie, tmp_path / "bf16", "bf16")
    report = verify(packed_ernie, tmp_path / "bf16")
    assert report.ok and len(report.errors) == 48
    # Rounding to bfloat16 has a relative error of at most 2^-9 per weight.
    assert all(0 < entry.error < 2**-16 for entry in report.errors)
    assert {entry.name for entry in report.errors} >= {f"{PREFIX}0.gate_proj.weight"}


def test_against_the_original_random_words_are_unrelated(
    packed_ernie: Path, micro_ernie: Path
) -> None:
    report = verify(packed_ernie, micro_ernie)
    assert report.ok and report.mean_error is not None and report.mean_error > 1


def test_kept_tensors_must_be_copies(damaged: Damaged, micro_ernie: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][3] += 1
        del tensors["model.layers.0.mlp.up_proj.weight"]
        tensors["model.extra"] = torch.zeros(1)

    problems = " ".join(verify(damaged(edit), micro_ernie).problems)
    for name in ("model.norm.weight differs", "mlp.up_proj.weight of the reference is missing",
                 "model.extra is not in the reference"):  # fmt: skip
        assert name in problems


def test_numbers_that_are_not_finite(damaged: Damaged) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{PREFIX}down_proj_scale"][2, 5, 0] = 0x7F80  # infinity as bfloat16
        tensors[f"{PREFIX}gate_up_proj_scale"][4, 64, 0] = 0x7FC0  # first row of up, not a number
        tensors["model.norm.weight"][0] = float("nan")

    problems = verify(damaged(edit)).problems
    assert len(problems) == 3
    for name in (f"{PREFIX}2.down_proj.weight", f"{PREFIX}4.up_proj.weight", "model.norm.weight"):
        assert any(name in line for line in problems), name


def test_signs_of_gate_and_up_must_agree(damaged: Damaged) -> None:
    name = f"{PREFIX}gate_up_proj_signs"

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][0, 1, 2] ^= 1

    assert any(name in line for line in verify(damaged(edit)).problems)


def test_all_problems_are_listed_and_the_rest_is_still_decoded(damaged: Damaged) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{PREFIX}down_proj_scale"]
        tensors[f"{PREFIX}gate_up_proj_packed"] = torch.zeros(3, dtype=torch.int32)

    report = verify(damaged(edit))
    assert not report.ok and len(report.problems) == 2
    assert report.decoded_matrices == 24  # layer 2


def test_checksums(packed_ernie: Path, tmp_path: Path) -> None:
    folder = tmp_path / "listed"
    shutil.copytree(packed_ernie, folder)
    shards = sorted(folder.glob("*.safetensors"))
    digests = {shard.name: sha256_of(shard) for shard in shards}
    write_json(folder / "quantization_report.json", {"sha256": digests})
    assert set(verify(folder).checksums.values()) == {"ok"} and verify(folder).ok
    # One bit of a packed word: everything still decodes, only the checksum can tell.
    words = bytearray(shards[-1].read_bytes())
    words[-100] ^= 4
    shards[-1].write_bytes(words)
    report = verify(folder)
    assert [name for name, state in report.checksums.items() if state != "ok"] == [shards[-1].name]
    assert not report.ok and shards[-1].name in report.problems[0]


def test_not_quantised(micro_ernie: Path) -> None:
    with pytest.raises(ErnieQuantError, match="is not quantised"):
        verify(micro_ernie)


def test_trained_tensors_are_those_that_the_report_lists(
    damaged: Damaged, micro_ernie: Path
) -> None:
    trained, listed = "model.layers.1.mlp.gate.weight", "model.layers.2.input_layernorm.weight"

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[trained] += 1
        # Training changes no type and no shape.
        tensors[listed] = tensors[listed].float()
        tensors["model.norm.weight"] += 1

    folder = damaged(edit)
    digests = {shard.name: sha256_of(shard) for shard in folder.glob("*.safetensors")}
    report = {"sha256": digests, "tuned": [{"moved": {trained: 0.1}}, {"moved": {listed: 0.0}}]}
    write_json(folder / "quantization_report.json", report)
    first, second = verify(folder, micro_ernie).problems
    assert listed in first + second and "has another shape or type" in first + second
    assert "model.norm.weight differs from the reference" in first + second
    # Without the report nothing was trained.
    (folder / "quantization_report.json").unlink()
    problems = " ".join(verify(folder, micro_ernie).problems)
    assert f"{trained} differs from the reference" in problems
    # A report without such a list, and lists that are none.
    for odd in ({}, {"tuned": None}, {"tuned": [7, {"moved": [trained]}]}):
        write_json(folder / "quantization_report.json", {"sha256": digests, **odd})
        assert f"{trained} differs" in " ".join(verify(folder, micro_ernie).problems)
