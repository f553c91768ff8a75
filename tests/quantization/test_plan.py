"""The plan accounts for every tensor, and refuses what it does not understand."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from erniequant.checkpoint.reader import open_checkpoint
from erniequant.errors import ErnieQuantError
from erniequant.formats.native.specs import layer_spec, settings_of, wording_of
from erniequant.formats.plan import Plan, QuantizeOptions
from erniequant.formats.registry import get_format
from erniequant.formats.rows import NATIVE
from erniequant.models.architecture import ExpertGroup, ModelSizes
from erniequant.models.registry import architecture_of
from erniequant.packing.schema import tile_size
from erniequant.quantization.estimate import describe, estimate
from erniequant.quantization.memory import MemoryPlan


def plan_for(folder: Path, **options: object) -> Plan:
    checkpoint = open_checkpoint(folder)
    model = architecture_of(checkpoint.config)
    chosen = QuantizeOptions(**{"bits": 2, **options})
    return get_format(NATIVE).output(checkpoint, model, chosen)[1]


def rate(plan: Plan) -> float:
    return get_format(NATIVE).encode_rate(plan.options)


MEMORY = MemoryPlan(2, False, 10**9, 0, 0)


@pytest.fixture
def edited(micro_ernie: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function that copies `micro_ernie` in one file after an edit of its tensors."""

    def write(edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
        tensors: dict[str, torch.Tensor] = {}
        for shard in micro_ernie.glob("*.safetensors"):
            tensors |= load_file(shard)
        edit(tensors)
        folder = tmp_path / "edited"
        folder.mkdir()
        shutil.copy(micro_ernie / "config.json", folder)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return write


def test_every_tensor_has_one_fate(micro_ernie: Path) -> None:
    plan = plan_for(micro_ernie)
    assert sorted(plan.quantized + plan.copied) == sorted(open_checkpoint(micro_ernie).names())
    assert len(plan.quantized) == 2 * 8 * 3
    assert plan.expert_weights == 2 * 8 * 3 * 64 * 96


def test_the_printed_plan_counts_every_tensor_once(micro_ernie: Path) -> None:
    plan = plan_for(micro_ernie)
    names = open_checkpoint(micro_ernie).names()
    assert sum(group.count for group in plan.groups) == len(names)
    assert sum(group.n_bytes for group in plan.groups) == plan.source_bytes
    gate = next(g for g in plan.groups if "experts." in g.names and "gate_proj" in g.names)
    # 8 experts in layers 1 and 2; layer 0 is dense.
    assert gate.names == "model.layers.{1..2}.mlp.experts.{0..7}.gate_proj.weight"
    assert (gate.count, gate.shape, gate.fate) == (16, (64, 96), "quantise")
    text = describe(plan, MEMORY, estimate(plan, MEMORY, 1000, rate(plan)))
    assert all(group.names in text for group in plan.groups)


def test_mtp_tensors_are_copied(edited: Callable[..., Path]) -> None:
    folder = edited(lambda t: t.update({"model.mtp_block.0.norm.weight": torch.ones(4)}))
    plan = plan_for(folder)
    assert "model.mtp_block.0.norm.weight" in plan.copied
    assert plan.mtp == ("model.mtp_block.0.norm.weight",)
    assert "1 of multi-token prediction" in describe(
        plan, MEMORY, estimate(plan, MEMORY, 1000, rate(plan))
    )


MATRIX = "model.layers.2.mlp.experts.5.up_proj.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(MATRIX), f"tensor {MATRIX} is missing"),
        (lambda t: t.update({MATRIX: torch.ones(64, 95)}), f"{MATRIX} has shape"),
        (lambda t: t.update({MATRIX: torch.ones(64, 96, dtype=torch.int8)}), "stored as I8"),
        (
            lambda t: t.update({"model.layers.1.mlp.experts.8.up_proj.weight": torch.ones(64, 96)}),
            "experts.8.up_proj.weight is not part of",
        ),
        (lambda t: t.pop("model.norm.weight"), "tensor model.norm.weight is missing"),
        (lambda t: t.pop("model.layers.2.mlp.gate.weight"), "2.mlp.gate.weight is missing"),
        (
            lambda t: t.update({"model.layers.1.self_attn.q_proj.weight": torch.ones(96, 95)}),
            r"1.self_attn.q_proj.weight has shape \[96, 95\]",
        ),
        (
            lambda t: t.update({"model.layers.1.mlp.experts.gate_up_proj": torch.ones(8, 128, 96)}),
            "experts.gate_up_proj holds all experts of a layer in one",
        ),
        (lambda t: t.update({"model.layers.0.extra": torch.ones(1)}), "layers.0.extra is not part"),
    ],
)
def test_what_does_not_fit_is_named(
    edited: Callable[..., Path],
    edit: Callable[[dict[str, torch.Tensor]], None],
    message: str,
) -> None:
    with pytest.raises(ErnieQuantError, match=message):
        plan_for(edited(edit))


@pytest.mark.parametrize(
    ("hidden", "inner", "max_tp", "gate_up", "down"),
    [
        (2560, 1536, 2, (256, 128), (256, 128)),  # 21B
        (2560, 1536, 4, (128, 128), (256, 128)),
        (8192, 3584, 2, (256, 128), (256, 128)),  # 300B
        (576, 384, 1, (128, 64), (64, 128)),
        (576, 384, 2, (64, 64), (64, 64)),
    ],
)
def test_tiles_and_blocks_of_known_shapes(
    hidden: int, inner: int, max_tp: int, gate_up: tuple[int, int], down: tuple[int, int]
) -> None:
    spec = layer_spec(hidden, ExpertGroup("", 8, inner), QuantizeOptions(2, max_tp=max_tp))
    assert (spec.gate_up_proj.tile, spec.gate_up_proj.rotation_block) == gate_up
    assert (spec.down_proj.tile, spec.down_proj.rotation_block) == down


@pytest.mark.parametrize(
    ("hidden", "inner", "max_tp", "message"),
    [
        (576, 384, 16, "inner size per rank, 24, is not a multiple of 32"),
        (576, 384, 5, "--max-tp 5 does not divide"),
        (48, 64, 1, "the hidden size, 48, is not a multiple of 32"),
    ],
)
def test_sizes_without_a_tile_are_refused(
    hidden: int, inner: int, max_tp: int, message: str
) -> None:
    with pytest.raises(ErnieQuantError, match=message):
        layer_spec(hidden, ExpertGroup("", 8, inner), QuantizeOptions(2, max_tp=max_tp))


def test_tile_is_the_largest_power_of_two_up_to_256() -> None:
    assert [tile_size(n, "n") for n in (32, 96, 192, 1536, 4096)] == [32, 32, 64, 256, 256]


@pytest.mark.parametrize(
    "bad", [{"bits": 5}, {"bits": 2, "effort": "extreme"}, {"bits": 2, "max_tp": 0}]
)
def test_bad_options_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ErnieQuantError):
        QuantizeOptions(**bad)


def test_a_21b_model_on_one_core_takes_more_than_a_day_at_most_effort(micro_ernie: Path) -> None:
    small = plan_for(micro_ernie, effort="max")
    settings = json.loads((micro_ernie / "config.json").read_text())
    assert settings["num_hidden_layers"] == 3
    group = ExpertGroup("", 64, 1536)
    model = ModelSizes(2560, (group,), 6, 28, tuple(range(1, 28)), 103424)
    weights = 27 * 64 * 3 * 2560 * 1536
    specs = {"": layer_spec(2560, group, small.options)}
    large = Plan(
        model, small.options, (), (), (), (), weights, 21_830_000_000, 43_660_000_000,
        weights // 4, 2_900_000_000, (), settings_of(specs), wording_of(model, specs),
    )  # fmt: skip
    memory = replace(MEMORY, experts_at_once=1)
    predicted = estimate(large, memory, 131_072, rate(large))
    assert predicted.seconds > 86_400
    assert "more than a day" in describe(large, memory, predicted)
    assert estimate(small, MEMORY, 1000, rate(small)).seconds < 60
