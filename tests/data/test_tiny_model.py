"""The embedded model is a trained ERNIE 4.5 MoE in the released layout, and worth quantising."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, Ernie4_5_MoeForCausalLM

import erniequant_data

FOLDER = erniequant_data.tiny_model_dir()
FACTS: dict[str, Any] = erniequant_data.manifest()["model"]
CONFIG: dict[str, Any] = json.loads((FOLDER / "config.json").read_text("utf-8"))
SPARSE = range(CONFIG["moe_layer_start_index"], CONFIG["moe_layer_end_index"] + 1)


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
    loaded, info = AutoModelForCausalLM.from_pretrained(
        FOLDER, dtype="auto", experts_implementation="eager", output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return loaded


@pytest.fixture(scope="module")
def scored(model: Any, tokenizer: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """-ln p of a sample of the held-out tokens; per sparse layer slots [windows, experts]."""
    experts = CONFIG["moe_num_experts"]
    loads: list[list[torch.Tensor]] = [[] for _ in SPARSE]
    handles = []
    for load, layer in zip(loads, SPARSE, strict=True):

        def count(module: Any, inputs: Any, output: Any, load: Any = load) -> None:
            load.append(torch.bincount(output[2].flatten(), minlength=experts))

        handles.append(model.model.layers[layer].mlp.gate.register_forward_hook(count))
    ids = torch.tensor(tokenizer(erniequant_data.heldout_text(), verbose=False)["input_ids"])
    losses = []
    with torch.no_grad():
        for window in ids.split(FACTS["heldout"]["context"])[:: FACTS["heldout"]["sample_every"]]:
            logits = model(input_ids=window[None]).logits[0, :-1].float()
            losses.append(logits.logsumexp(-1) - logits.gather(1, window[1:, None])[:, 0])
    for handle in handles:
        handle.remove()
    return torch.cat(losses).double(), [torch.stack(load) for load in loads]


def test_expert_tensors_have_the_released_names(tensors: dict[str, Any]) -> None:
    hidden, inner = CONFIG["hidden_size"], CONFIG["moe_intermediate_size"]
    for layer in SPARSE:
        prefix = f"model.layers.{layer}.mlp"
        for expert in range(CONFIG["moe_num_experts"]):
            for name, shape in (
                ("gate_proj", [inner, hidden]),
                ("up_proj", [inner, hidden]),
                ("down_proj", [hidden, inner]),
            ):
                assert tensors[f"{prefix}.experts.{expert}.{name}.weight"] == (shape, "BF16")
        assert tensors[f"{prefix}.gate.weight"] == ([CONFIG["moe_num_experts"], hidden], "F32")
        assert tensors[f"{prefix}.moe_statics.e_score_correction_bias"] == (
            [1, CONFIG["moe_num_experts"]],
            "F32",
        )
        assert f"{prefix}.shared_experts.gate_proj.weight" in tensors
    assert "model.layers.0.mlp.gate_proj.weight" in tensors, "the first layer is dense"


def test_only_router_and_bias_are_fp32(tensors: dict[str, Any]) -> None:
    fp32 = [name for name, (_, dtype) in tensors.items() if dtype != "BF16"]
    assert len(fp32) == 2 * len(SPARSE)
    assert all(re.search(r"mlp\.gate\.weight|e_score_correction_bias", name) for name in fp32)


def test_shape_is_a_small_copy_of_the_family() -> None:
    assert CONFIG["moe_num_experts"] >= 16 and CONFIG["moe_k"] >= 4
    assert CONFIG["moe_num_shared_experts"] >= 1 and CONFIG["moe_layer_start_index"] == 1
    assert CONFIG["moe_intermediate_size"] == 256
    assert CONFIG["hidden_size"] % 64 == 0 and CONFIG["moe_intermediate_size"] % 64 == 0


def test_it_is_sharded_and_small(tensors: dict[str, Any]) -> None:
    index = json.loads((FOLDER / "model.safetensors.index.json").read_text("utf-8"))
    assert len(set(index["weight_map"].values())) >= 2
    assert set(index["weight_map"]) == set(tensors)
    assert sum(p.stat().st_size for p in FOLDER.rglob("*") if p.is_file()) <= 24_000_000


def test_stock_transformers_loads_it(model: Any) -> None:
    assert type(model) is Ernie4_5_MoeForCausalLM
    assert model.dtype == torch.bfloat16
    for layer in SPARSE:
        gate = model.model.layers[layer].mlp.gate
        assert gate.weight.dtype == torch.float32
        assert float(gate.moe_statics.e_score_correction_bias.detach().abs().min()) > 0


def test_load_is_uneven_and_no_expert_is_dead(
    scored: tuple[torch.Tensor, list[torch.Tensor]],
) -> None:
    """Within one kind of text some experts see several times the tokens of others."""
    for load in scored[1]:
        spread = load.amax(1) / load.amin(1).clamp(min=1)
        assert float(spread.median()) > 2.5
        assert int(load.sum(0).min()) > 0


def test_heldout_perplexity_is_the_recorded_one(
    scored: tuple[torch.Tensor, list[torch.Tensor]],
) -> None:
    perplexity = math.exp(float(scored[0].mean()))
    assert perplexity == pytest.approx(FACTS["heldout"]["sample_perplexity"], rel=0.01)
    assert perplexity <= 0.75 * FACTS["ngram"]["perplexity"], "no better than a table of counts"
    assert FACTS["heldout"]["perplexity"] <= 0.75 * FACTS["ngram"]["perplexity"]


def test_recorded_rounding_damage_shows() -> None:
    """The model must tell good quantisers from bad ones: plain rounding has to hurt."""
    assert FACTS["rtn"]["2"]["ratio"] >= 1.5
    assert FACTS["rtn"]["4"]["z"] >= 3


@pytest.mark.parametrize(
    "text",
    [
        "",
        " leading and  double spaces ",
        "a\n\n\tb\r\n",
        "学而时习之，不亦说乎？",
        "𠀀龘é🙂",
        "<0x41>",
    ],
)
def test_tokenizer_gives_the_text_back(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_are_the_familys(tokenizer: Any) -> None:
    assert len(tokenizer) == CONFIG["vocab_size"]
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<unk>", 0)
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<s>", 1)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("</s>", 2)
    assert tokenizer.cls_token == "<|begin_of_sentence|>"
    assert tokenizer.sep_token == "<|end_of_sentence|>"
    assert tokenizer.mask_token == "<mask:1>"


def test_chat_template_names_the_speakers(tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "你好"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<s>User: 你好\nAssistant: "
