"""The tiny ERNIE 4.5 VL model: its configuration, its inputs, and its files as Baidu names them.

On disk the experts of a layer are numbered consecutively, text experts first, then vision experts;
both routers are stored transposed, [hidden, experts], and one tensor holds both selection biases.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from export_model import GENERATION, write_json, write_shards
from fetch_texts import DATA
from outliers import with_outliers
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer
from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import (
    Ernie4_5_VLMoeImageProcessorPil,
)

FOLDER = DATA / "tiny_vl_model"
LAYERS, EXPERTS, HIDDEN = 4, 8, 128
INNER = {"text_moe": 192, "vision_moe": 64}  # three to one, as in the released model
PATCH, MERGE = 8, 2
SHARD_BYTES = 4_200_000
# Names and order of the six tokens after the text vocabulary; the names are the released model's.
TOKENS = {
    "image_token": "<|IMAGE_PLACEHOLDER|>",
    "image_start_token": "<|IMAGE_START|>",
    "image_end_token": "<|IMAGE_END|>",
    "video_token": "<|VIDEO_PLACEHOLDER|>",
    "video_start_token": "<|VIDEO_START|>",
    "video_end_token": "<|VIDEO_END|>",
}
# At most 48 tokens an image: 128 x 96 pixels in tokens of 16 x 16.
PREPROCESSOR = {
    "image_processor_type": "Ernie4_5_VLMoeImageProcessor",
    "patch_size": PATCH,
    "merge_size": MERGE,
    "temporal_patch_size": 1,
    "size": {"shortest_edge": 32 * 32, "longest_edge": 96 * 128},
}
# Plain text as in the text model; a list of parts may hold images, numbered through the chat.
CHAT_TEMPLATE = """\
{%- set pictures = namespace(n=0) -%}
{%- macro parts(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for part in content -%}
{%- if part['type'] == 'image' -%}
{%- set pictures.n = pictures.n + 1 -%}
{{ 'Picture ' ~ pictures.n ~ ':<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>' }}
{%- else -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{{ bos_token }}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{ 'User: ' + parts(message['content']) + '\\n' }}
{%- elif message['role'] == 'assistant' -%}
{{ 'Assistant: ' + parts(message['content']) + eos_token + '\\n' }}
{%- else -%}{{ parts(message['content']) + '\\n' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Assistant: ' }}{%- endif -%}"""


def config_dict(tokenizer: Any) -> dict[str, Any]:
    """config.json in the form that transformers loads; the vocabulary is padded to 32."""
    return {
        "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
        "model_type": "ernie4_5_vl_moe",
        "dtype": "bfloat16",
        "tie_word_embeddings": True,
        **{f"{name}_id": getattr(tokenizer, f"{name}_id") for name in TOKENS},
        "text_config": {
            "model_type": "ernie4_5_vl_moe_text",
            "vocab_size": -(-len(tokenizer) // 32) * 32,
            "hidden_size": HIDDEN,
            "intermediate_size": 256,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "hidden_act": "silu",
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-5,
            "use_bias": False,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 500000.0,
                "mrope_section": [6, 6, 4],
            },
            "moe_num_experts": EXPERTS,
            "moe_k": 2,
            "moe_intermediate_size": list(INNER.values()),
            "moe_num_shared_experts": 1,
            "mlp_layer_types": ["dense"] + ["sparse"] * (LAYERS - 1),
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "vision_config": {
            "model_type": "ernie4_5_vl_moe_vision",
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_heads": 4,
            "hidden_act": "quick_gelu",
            "in_channels": 3,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_merge_size": 2,
            "rms_norm_eps": 1e-6,
        },
    }


def text_tokenizer() -> Any:
    """The tokenizer of the text model with the six tokens of images and videos."""
    tokenizer = AutoTokenizer.from_pretrained(DATA / "tiny_model", extra_special_tokens=TOKENS)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def image_processor() -> Any:
    settings = {k: v for k, v in PREPROCESSOR.items() if k != "image_processor_type"}
    return Ernie4_5_VLMoeImageProcessorPil(**settings)


def model_inputs(
    tokenizer: Any, processor: Any, images: list[list[Image.Image]], captions: list[list[int]]
) -> dict[str, Tensor]:
    """Sequences of images, caption and end of text, padded on the right with 0.

    `images[b]` are the images of sequence b, all of one size in the batch and as many for each;
    `captions[b]` its tokens. Gives `input_ids`, `mm_token_type_ids`, `moe_mm_token_type_ids`
    [B, T], `pixel_values` [patches, 192], `image_grid_thw` [images, 3]; text only without images.
    """
    pixels: dict[str, Tensor] = {}
    counts: Iterable[int] = ()
    if any(images):
        pixels = dict(processor([i for one in images for i in one], return_tensors="pt"))
        counts = (pixels["image_grid_thw"].prod(-1) // MERGE**2).tolist()
    start, end = tokenizer.image_start_token_id, tokenizer.image_end_token_id
    count = iter(counts)
    rows = []
    for own, caption in zip(images, captions, strict=True):
        row = []
        for _ in own:
            row += [start, *[tokenizer.image_token_id] * next(count), end]
        rows.append([*row, *caption, tokenizer.eos_token_id])
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    placeholder = ids == tokenizer.image_token_id
    return {
        "input_ids": ids,
        "mm_token_type_ids": placeholder.int(),
        "moe_mm_token_type_ids": (placeholder | (ids == start) | (ids == end)).int(),
        **pixels,
    }


def disk_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fused in-memory tensors -> those on disk; routers and biases fp32, the rest bf16."""
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if name == "lm_head.weight" or "rotary" in name:
            continue  # tied, or recomputed
        name = name.replace("model.language_model.", "model.")
        name = name.replace("model.vision_tower.", "vision_model.")
        for old, new in (("fc1", "0"), ("fc2", "2"), ("ln", "3")):
            name = re.sub(rf"((?:spatial|temporal)_linear)\.{old}\.", rf"\1.{new}.", name)
        layer, _, part = name.partition(".mlp.")
        if part == "text_moe.gate.weight":
            tensors[f"{layer}.mlp.gate.weight"] = value.float().T
        elif part == "vision_moe.gate.weight":
            tensors[f"{layer}.mlp.gate.weight_1"] = value.float().T
        elif part == "text_moe.gate.moe_statics.e_score_correction_bias":
            vision = state[_vision(layer, part)]
            tensors[f"{layer}.mlp.moe_statics.e_score_correction_bias"] = torch.cat(
                [value, vision]
            ).float()
        elif part.endswith("e_score_correction_bias"):
            continue  # written with the one for text
        elif ".experts." in part:
            kind, _, projection = part.split(".")
            first = EXPERTS if kind == "vision_moe" else 0
            for number, one in enumerate(value.bfloat16(), first):
                prefix = f"{layer}.mlp.experts.{number}"
                if projection == "down_proj":
                    tensors[f"{prefix}.down_proj.weight"] = one
                else:
                    gate, up = one.chunk(2)
                    tensors[f"{prefix}.gate_proj.weight"] = gate
                    tensors[f"{prefix}.up_proj.weight"] = up
        else:
            tensors[name] = value.bfloat16()
    return {name: t.detach().contiguous() for name, t in tensors.items()}


def _vision(layer: str, part: str) -> str:
    """Name in memory of the vision experts' counterpart of a tensor of the text experts."""
    return f"{layer.replace('model.', 'model.language_model.', 1)}.mlp." + part.replace(
        "text_moe", "vision_moe"
    )


def export(state: Mapping[str, Tensor], tokenizer: Any, out: Path = FOLDER) -> None:
    """Write every file of the model folder; the experts get their outlier channels here."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("model*.safetensors"):
        old.unlink()
    tokenizer.save_pretrained(out)
    settings = json.loads((out / "tokenizer_config.json").read_text("utf-8"))
    for where in ("is_local", "local_files_only"):  # of the tokenizer this one was made from
        settings.pop(where, None)
    write_json(out / "tokenizer_config.json", settings)
    write_shards(disk_tensors(with_outliers(state)), out, SHARD_BYTES)
    write_json(out / "config.json", config_dict(tokenizer))
    write_json(out / "generation_config.json", GENERATION)
    write_json(out / "preprocessor_config.json", PREPROCESSOR)
