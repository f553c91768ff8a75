"""The embedded vision-language model has the released layout, sees images, and uses its experts."""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    Ernie4_5_VLMoeForConditionalGeneration,
)
from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import (
    Ernie4_5_VLMoeImageProcessorPil,
)

import erniequant_data

FOLDER = erniequant_data.tiny_vl_model_dir()
BUILD = FOLDER.parents[1] / "build"
FACTS: dict[str, Any] = erniequant_data.manifest()["vl_model"]
CONFIG: dict[str, Any] = json.loads((FOLDER / "config.json").read_text("utf-8"))
TEXT: dict[str, Any] = CONFIG["text_config"]
EXPERTS: int = TEXT["moe_num_experts"]
HIDDEN: int = TEXT["hidden_size"]
SPARSE = [n for n, kind in enumerate(TEXT["mlp_layer_types"]) if kind == "sparse"]
SAMPLE = 8  # held-out records that the tests score


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are multiplied faster by one thread, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tensors() -> dict[str, tuple[list[int], str]]:
    """Shape and dtype of every tensor on disk."""
    found = {}
    for shard in sorted(FOLDER.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - the handle is no mapping
                part = file.get_slice(name)
                found[name] = (part.get_shape(), part.get_dtype())
    return found


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> Any:
    loaded, info = AutoModelForImageTextToText.from_pretrained(
        FOLDER, dtype="auto", experts_implementation="eager", output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return loaded


@pytest.fixture(scope="module")
def evaluation() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BUILD))
        return importlib.import_module("evaluate_vl")


@pytest.fixture(scope="module")
def scored(model: Any, tokenizer: Any, evaluation: ModuleType) -> dict[str, Any]:
    """Losses of a sample of held-out captions with the right and with a wrong image; loads."""
    path = erniequant_data.heldout_images()
    records = evaluation.read_records(path)
    pairs = list(zip(records, evaluation.strangers(records), strict=True))
    pairs = pairs[:: len(pairs) // SAMPLE][:SAMPLE]
    texts = [record["text"] for record, _ in pairs]
    right, wrong = (
        [evaluation.opened(path.parent, record) for record in part]
        for part in zip(*pairs, strict=True)
    )
    with evaluation.Loads(model) as loads:
        losses = evaluation.caption_losses(model, tokenizer, right, texts)
    return {
        "right": losses,
        "wrong": evaluation.caption_losses(model, tokenizer, wrong, texts),
        "loads": loads.counts,
    }


def test_expert_tensors_have_the_released_names(tensors: dict[str, Any]) -> None:
    """Text experts first, then those for images; routers lie transposed, biases in one tensor."""
    for layer in SPARSE:
        prefix = f"model.layers.{layer}.mlp"
        for expert in range(2 * EXPERTS):
            inner = TEXT["moe_intermediate_size"][expert >= EXPERTS]
            for name, shape in (
                ("gate_proj", [inner, HIDDEN]),
                ("up_proj", [inner, HIDDEN]),
                ("down_proj", [HIDDEN, inner]),
            ):
                assert tensors[f"{prefix}.experts.{expert}.{name}.weight"] == (shape, "BF16")
        assert tensors[f"{prefix}.gate.weight"] == ([HIDDEN, EXPERTS], "F32")
        assert tensors[f"{prefix}.gate.weight_1"] == ([HIDDEN, EXPERTS], "F32")
        bias = tensors[f"{prefix}.moe_statics.e_score_correction_bias"]
        assert bias == ([2, EXPERTS], "F32")
        assert f"{prefix}.shared_experts.gate_proj.weight" in tensors
    assert "model.layers.0.mlp.gate_proj.weight" in tensors, "the first layer is dense"


def test_other_tensors_have_the_released_names(tensors: dict[str, Any]) -> None:
    for name in (
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.resampler_model.spatial_linear.0.weight",
        "model.resampler_model.temporal_linear.3.bias",
        "model.resampler_model.mlp.weight",
        "model.resampler_model.after_norm.weight",
        "vision_model.patch_embed.proj.weight",
        "vision_model.blocks.1.attn.qkv.bias",
        "vision_model.blocks.1.mlp.fc2.weight",
        "vision_model.blocks.0.norm1.weight",
        "vision_model.ln.weight",
    ):
        assert tensors[name][1] == "BF16"
    assert "lm_head.weight" not in tensors, "tied"
    fp32 = [name for name, (_, dtype) in tensors.items() if dtype != "BF16"]
    assert len(fp32) == 3 * len(SPARSE)
    assert all(re.search(r"mlp\.gate\.weight|e_score_correction_bias", name) for name in fp32)


def test_sizes_suit_the_codes() -> None:
    assert HIDDEN % 64 == 0 and all(n % 64 == 0 for n in TEXT["moe_intermediate_size"])
    assert len(set(TEXT["moe_intermediate_size"])) == 2, "the two sets differ as in the release"
    assert TEXT["vocab_size"] % 32 == 0


def test_it_is_sharded_and_small(tensors: dict[str, Any]) -> None:
    index = json.loads((FOLDER / "model.safetensors.index.json").read_text("utf-8"))
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] <= 8_000_000
    assert sum(p.stat().st_size for p in FOLDER.rglob("*") if p.is_file()) <= 8_400_000


def test_stock_transformers_loads_it(model: Any) -> None:
    assert type(model) is Ernie4_5_VLMoeForConditionalGeneration
    assert model.dtype == torch.bfloat16
    for layer in SPARSE:
        mlp = model.model.language_model.layers[layer].mlp
        for gate in (mlp.text_moe.gate, mlp.vision_moe.gate):
            assert gate.weight.dtype == torch.float32
            bias = gate.moe_statics.e_score_correction_bias.detach()
            assert float(bias.abs().max()) > 0


def test_the_right_image_beats_a_wrong_one(scored: dict[str, Any]) -> None:
    assert float(scored["right"].mean()) < 0.5 * float(scored["wrong"].mean())
    facts = FACTS["captions"]
    assert float(scored["right"].mean()) == pytest.approx(facts["loss_right_image"], rel=0.3)
    assert facts["loss_right_image"] < 0.5 * facts["loss_wrong_image"]
    assert facts["loss_right_image"] < 0.5 * facts["loss_no_image"]


def test_no_vision_expert_is_dead(scored: dict[str, Any]) -> None:
    assert all(int(count.min()) > 0 for count in scored["loads"]["vision_moe"])


def test_recorded_loads_reach_every_expert_of_both_sets() -> None:
    for figures in FACTS["expert_load"].values():
        assert all(len(tokens) == EXPERTS and min(tokens) > 0 for tokens in figures["tokens"])


def test_text_alone_is_modelled(model: Any, tokenizer: Any, evaluation: ModuleType) -> None:
    """Every twelfth held-out window; no text expert is dead, and no vision expert sees text."""
    context = FACTS["text"]["context"]
    ids = torch.tensor(tokenizer(erniequant_data.heldout_text(), verbose=False)["input_ids"])
    windows = torch.cat(ids.split(context)[:-1][::12])
    with evaluation.Loads(model) as loads:
        perplexity = math.exp(float(evaluation.token_losses(model, windows, context).mean()))
    assert perplexity == pytest.approx(FACTS["text"]["perplexity"], rel=0.15)
    assert all(int(count.min()) > 0 for count in loads.counts["text_moe"])
    assert not any(int(count.sum()) for count in loads.counts["vision_moe"])


def test_recorded_rounding_damage_shows() -> None:
    rtn = FACTS["rtn"]
    assert rtn["text"]["2"]["text"]["z"] > 3 and rtn["text"]["2"]["captions"]["z"] > 3
    assert rtn["vision"]["2"]["text"]["loss"] == 0, "text sees no vision expert"
    assert rtn["vision"]["2"]["captions"]["z"] > 3
    assert FACTS["loss_without_vision_experts"] > 0.02
    assert FACTS["outlier_channels"]["largest_change_of_a_loss"] == 0


def test_special_tokens_are_the_familys(tokenizer: Any) -> None:
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    for name, token in (
        ("image_token", "<|IMAGE_PLACEHOLDER|>"),
        ("image_start_token", "<|IMAGE_START|>"),
        ("image_end_token", "<|IMAGE_END|>"),
        ("video_token", "<|VIDEO_PLACEHOLDER|>"),
        ("video_start_token", "<|VIDEO_START|>"),
        ("video_end_token", "<|VIDEO_END|>"),
    ):
        assert getattr(tokenizer, name) == token
        assert getattr(tokenizer, f"{name}_id") == CONFIG[f"{name}_id"] < TEXT["vocab_size"]
        assert tokenizer(f"a{token}")["input_ids"][-1] == CONFIG[f"{name}_id"]
    small = AutoTokenizer.from_pretrained(erniequant_data.tiny_model_dir())
    text = erniequant_data.heldout_text()[:5000]
    assert tokenizer(text)["input_ids"] == small(text)["input_ids"]


def test_chat_template_places_images(tokenizer: Any) -> None:
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "这是什么？"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And this?"}]},
    ]
    image = "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        f"<s>User: Picture 1:{image}这是什么？\nAssistant: A cat.</s>\n"
        f"User: Picture 2:{image}And this?\nAssistant: "
    )
    plain = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "你好"}]
    assert tokenizer.apply_chat_template(plain, tokenize=False) == "<s>Be short.\nUser: 你好\n"


def test_its_processor_shrinks_every_shipped_image(evaluation: ModuleType) -> None:
    processor = Ernie4_5_VLMoeImageProcessorPil.from_pretrained(FOLDER)
    for path in (erniequant_data.calibration_images(), erniequant_data.heldout_images()):
        for record in evaluation.read_records(path):
            pixels = processor(evaluation.opened(path.parent, record), return_tensors="pt")
            patch = CONFIG["vision_config"]["patch_size"]
            assert pixels["pixel_values"].shape[1] == 3 * patch**2
            tokens = pixels["image_grid_thw"].prod(-1) // processor.merge_size**2
            assert int(tokens.min()) >= 20 and int(tokens.max()) <= 48
