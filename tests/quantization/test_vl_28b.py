"""ERNIE-4.5-VL-28B-A3B by its headers alone: every tensor of the released layout is accounted for,
and none can be missing, left over or of another shape without being named."""

import json
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import erniequant
from erniequant.errors import ErnieQuantError
from erniequant.quantization.report import QuantizationReport
from tests.micro_original import RELEASED

LAYERS, HIDDEN, EXPERTS, TEXT, VISION = 28, 2560, 64, 1536, 512
BLOCKS, WIDTH = 32, 1280
Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""Types and shapes by name."""


def released() -> Tensors:
    """All tensors of the released checkpoint, in its names."""
    found: Tensors = {name: ("BF16", shape) for name, shape in _bf16()}
    for layer in range(1, LAYERS):
        mlp = f"model.layers.{layer}.mlp"
        for router in ("weight", "weight_1"):
            found[f"{mlp}.gate.{router}"] = ("F32", (HIDDEN, EXPERTS))
        found[f"{mlp}.moe_statics.e_score_correction_bias"] = ("F32", (2, EXPERTS))
    return found


def _bf16() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (103424, HIDDEN)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{norm}.weight", (HIDDEN,)
        # 20 heads of 128 for queries, 4 for keys and values.
        for name, width in (("q", 2560), ("k", 512), ("v", 512), ("o", 2560)):
            yield f"{prefix}.self_attn.{name}_proj.weight", (width, HIDDEN)
        if layer == 0:
            yield from _mlp(f"{prefix}.mlp", 12288)
            continue
        # Two shared experts are one of twice the size.
        yield from _mlp(f"{prefix}.mlp.shared_experts", 2 * TEXT)
        for expert in range(2 * EXPERTS):
            inner = TEXT if expert < EXPERTS else VISION
            yield from _mlp(f"{prefix}.mlp.experts.{expert}", inner)
    yield "model.norm.weight", (HIDDEN,)
    # 3 colours of 14 x 14 pixels.
    yield "vision_model.patch_embed.proj.weight", (WIDTH, 3 * 14 * 14)
    for block in range(BLOCKS):
        prefix = f"vision_model.blocks.{block}"
        yield from _with_bias(f"{prefix}.norm1", (WIDTH,))
        yield from _with_bias(f"{prefix}.norm2", (WIDTH,))
        yield from _with_bias(f"{prefix}.attn.qkv", (3 * WIDTH, WIDTH))
        yield from _with_bias(f"{prefix}.attn.proj", (WIDTH, WIDTH))
        yield from _with_bias(f"{prefix}.mlp.fc1", (4 * WIDTH, WIDTH))
        yield from _with_bias(f"{prefix}.mlp.fc2", (WIDTH, 4 * WIDTH))
    yield from _with_bias("vision_model.ln", (WIDTH,))
    # Four patches side by side, then two such squares after each other.
    for part, inputs in (("spatial", 4 * WIDTH), ("temporal", 8 * WIDTH)):
        prefix = f"model.resampler_model.{part}_linear"
        yield from _with_bias(f"{prefix}.0", (4 * WIDTH, inputs))
        yield from _with_bias(f"{prefix}.2", (4 * WIDTH, 4 * WIDTH))
        yield from _with_bias(f"{prefix}.3", (4 * WIDTH,))
    yield from _with_bias("model.resampler_model.mlp", (HIDDEN, 4 * WIDTH))
    yield "model.resampler_model.after_norm.weight", (HIDDEN,)


def _mlp(prefix: str, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name in ("gate_proj", "up_proj"):
        yield f"{prefix}.{name}.weight", (inner, HIDDEN)
    yield f"{prefix}.down_proj.weight", (HIDDEN, inner)


def _with_bias(prefix: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.weight", shape
    yield f"{prefix}.bias", shape[:1]


def as_transformers_saves(tensors: Tensors) -> Tensors:
    return {f"model.{n}" if n.startswith("vision_model.") else n: t for n, t in tensors.items()}


def elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def write(folder: Path, tensors: Tensors, config: dict[str, Any]) -> Path:
    """A checkpoint of holes: headers, and files as long as they say that occupy nothing."""
    folder.mkdir()
    entries, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + elements(shape) * {"BF16": 2, "F32": 4}[dtype]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def converted_config() -> dict[str, Any]:
    """transformers' own config of the model, which is its default, in full."""
    from transformers import Ernie4_5_VLMoeConfig

    config = Ernie4_5_VLMoeConfig(
        dtype="bfloat16", architectures=["Ernie4_5_VLMoeForConditionalGeneration"]
    )
    return json.loads(config.to_json_string(use_diff=False))


@pytest.fixture(params=["released", "converted"])
def form(request: pytest.FixtureRequest) -> tuple[Tensors, dict[str, Any]]:
    if request.param == "released":
        return released(), RELEASED
    return as_transformers_saves(released()), converted_config()


def dry_run(folder: Path, **options: Any) -> QuantizationReport:
    return erniequant.quantize(folder, folder.with_name("q"), bits=2, dry_run=True, **options)


def test_every_tensor_is_accounted_for_once(
    form: tuple[Tensors, dict[str, Any]], tmp_path: Path
) -> None:
    tensors, config = form
    folder = write(tmp_path / "28b", tensors, config)
    started = time.perf_counter()
    report = dry_run(folder)
    # Half a second; a module for every layer with its experts would take minutes.
    assert time.perf_counter() - started < 20
    assert not (folder.with_name("q")).exists()
    plan = report.plan
    assert sorted(plan.quantized + plan.copied) == sorted(tensors)
    quantized = {name for name in tensors if ".mlp.experts." in name}
    assert sorted(plan.quantized) == sorted(quantized)
    of_vision = {n for n in quantized if int(n.split(".experts.")[1].split(".")[0]) >= EXPERTS}
    assert len(quantized) - len(of_vision) == len(of_vision) == 3 * EXPERTS * 27
    weights = {
        "text": sum(elements(tensors[name][1]) for name in quantized - of_vision),
        "vision": sum(elements(tensors[name][1]) for name in of_vision),
        "all": sum(elements(shape) for _, shape in tensors.values()),
    }
    assert {name: round(n / 1e9, 2) for name, n in weights.items()} == {
        "text": 20.38, "vision": 6.79, "all": 29.40
    }  # fmt: skip
    assert plan.expert_weights == weights["text"] + weights["vision"]
    assert plan.total_weights == weights["all"]
    stored = {name: elements(s) * (4 if dtype == "F32" else 2) for name, (dtype, s) in
              tensors.items()}  # fmt: skip
    assert plan.source_bytes == sum(stored.values())
    assert plan.copied_bytes == sum(stored[name] for name in plan.copied)
    # Two bits and a scale of 16 bits for every output of 512 to 2560 inputs; signs are few.
    scales = sum(shape[0] for name, (_, shape) in tensors.items() if name in quantized)
    expected = 2 + 16 * scales / plan.expert_weights
    assert 0 < plan.expert_bits_per_weight - expected < 1e-3 and expected < 2.02
    packed = {tensor.name for tensor in plan.packed}
    for layer in range(1, LAYERS):
        for group in ("text_moe", "vision_moe"):
            assert f"model.layers.{layer}.mlp.{group}.experts.down_proj_packed" in packed
    assert len(packed) == 27 * 2 * 7


def test_the_plan_lists_every_group_of_tensors(
    form: tuple[Tensors, dict[str, Any]], tmp_path: Path
) -> None:
    tensors, config = form
    report = dry_run(write(tmp_path / "28b", tensors, config))
    plan, text = report.plan, report.plan_text
    assert sum(group.count for group in plan.groups) == len(tensors)
    assert all(group.line() in text for group in plan.groups)
    tower = "vision_model" if config is RELEASED else "model.vision_model"
    for line in (
        "quantise   1728 x [1536, 2560] BF16  model.layers.{1..27}.mlp.experts.{0..63}.up_proj",
        "quantise   1728 x [2560, 512] BF16  model.layers.{1..27}.mlp.experts.{64..127}.down_proj",
        "copy         27 x [2560, 64] F32  model.layers.{1..27}.mlp.gate.weight_1",
        "copy         27 x [2, 64] F32  model.layers.{1..27}.mlp.moe_statics.e_score_correction_bi",
        f"copy         32 x [3840] BF16  {tower}.blocks.{{0..31}}.attn.qkv.bias",
        "copy          1 x [5120, 10240] BF16  model.resampler_model.temporal_linear.0.weight",
        "64 experts of vision_moe, inner size 512",
    ):
        assert line in text, line


Edit = Callable[[Tensors], Any]
PREFIX = "model.layers.7.mlp"


def reshaped(name: str, *shape: int) -> Edit:
    return lambda tensors: tensors.update({name: (tensors[name][0], shape)})


def removed(name: str) -> Edit:
    return lambda tensors: tensors.pop(name)


def added(name: str, *shape: int) -> Edit:
    return lambda tensors: tensors.update({name: ("BF16", shape)})


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        (name, removed(name), "is missing")
        for name in (
            "vision_model.blocks.31.mlp.fc2.weight",
            "vision_model.ln.bias",
            "model.resampler_model.spatial_linear.3.bias",
            f"{PREFIX}.gate.weight_1",
            f"{PREFIX}.experts.127.down_proj.weight",
            f"{PREFIX}.shared_experts.up_proj.weight",
            "model.layers.0.mlp.gate_proj.weight",
            "model.norm.weight",
        )
    ]
    + [
        (name, reshaped(name, *shape), "has shape")
        for name, shape in (
            ("vision_model.blocks.0.attn.qkv.weight", (1280, 3840)),
            ("vision_model.patch_embed.proj.weight", (1280, 3, 14, 14)),
            ("model.resampler_model.temporal_linear.0.weight", (5120, 5120)),
            (f"{PREFIX}.gate.weight", (64, 2560)),
            (f"{PREFIX}.moe_statics.e_score_correction_bias", (1, 64)),
            (f"{PREFIX}.experts.64.up_proj.weight", (1536, 2560)),
            (f"{PREFIX}.experts.63.up_proj.weight", (512, 2560)),
        )
    ]
    + [
        (name, added(name, *shape), "is not part of")
        for name, shape in (
            ("vision_model.blocks.32.norm1.weight", (1280,)),
            ("model.resampler_model.mlp.scale", (1,)),
            (f"{PREFIX}.gate.weight_2", (2560, 64)),
            (f"{PREFIX}.experts.128.up_proj.weight", (512, 2560)),
            ("model.layers.0.mlp.experts.0.up_proj.weight", (1536, 2560)),
            ("model.layers.28.input_layernorm.weight", (2560,)),
            ("model.audio_model.proj.weight", (2560, 64)),
        )
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    name: str, edit: Edit, message: str, tmp_path: Path
) -> None:
    tensors = released()
    edit(tensors)
    with pytest.raises(ErnieQuantError, match=message) as caught:
        dry_run(write(tmp_path / "28b", tensors, RELEASED))
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_without_correction_bias_is_whole(tmp_path: Path) -> None:
    tensors = {n: t for n, t in released().items() if "moe_statics" not in n}
    plan = dry_run(write(tmp_path / "28b", tensors, RELEASED)).plan
    assert sorted(plan.quantized + plan.copied) == sorted(tensors)
