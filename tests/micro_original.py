"""Vision-language checkpoints as Baidu publishes them: its config.json, its tensor names, a
sentencepiece model, and code of its own that nothing may run."""

import io
import json
from pathlib import Path
from typing import Any

import torch

RELEASED: dict[str, Any] = {
    "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
    "auto_map": {"AutoConfig": "configuration_ernie_45t_vl.Ernie4_5_VLMoEConfig"},
    "model_type": "ernie4_5_moe_vl", "torch_dtype": "bfloat16", "use_cache": True,
    "vocab_size": 103424, "hidden_size": 2560, "intermediate_size": 12288,
    "num_hidden_layers": 28, "num_attention_heads": 20, "num_key_value_heads": 4,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "use_bias": False,
    "tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "moe_num_experts": [64, 64], "moe_intermediate_size": [1536, 512], "moe_k": 6,
    "moe_layer_start_index": [1, 1], "moe_layer_end_index": [29, 28], "moe_layer_interval": 1,
    "moe_num_shared_experts": 2, "moe_use_aux_free": True, "rope_theta": 500000,
    "rope_3d": True, "freq_allocation": 20, "im_patch_id": 100295, "pixel_hidden_size": 1280,
    "spatial_conv_size": 2, "temporal_conv_size": 2,
    "vision_config": {
        "attn_implementation": "eager", "depth": 32, "embed_dim": 1280, "hidden_size": 1280,
        "hidden_act": "quick_gelu", "mlp_ratio": 4, "num_heads": 16, "in_channels": 3,
        "in_chans": 3, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
        "model_type": "DFNRope_vision_transformer",
    },
}  # fmt: skip
"""config.json of ERNIE-4.5-VL-28B-A3B."""

SPECIAL = ("<|begin_of_sentence|>", "<|end_of_sentence|>", "<mask:1>", "<|IMAGE_PLACEHOLDER|>",
           "<|IMAGE_START|>", "<|IMAGE_END|>", "<|VIDEO_START|>", "<|VIDEO_END|>")  # fmt: skip
# Always whole, although normal pieces could be merged across them.
USER_DEFINED = (*SPECIAL, "<think>", "ther", *"0123456789")
CHAT_TEMPLATE = (
    "<|begin_of_sentence|>{% for m in messages %}{{ m.role }}: {% if m.content is string %}"
    "{{ m.content }}{% else %}{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}"
    "{% else %}<|IMAGE_START|><|image@placeholder|><|IMAGE_END|>{% endif %}{% endfor %}{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}"
)
EVIL = "from pathlib import Path\nPath(__file__).with_name('EXECUTED').touch()\n"
PATCH = 4
# Of the micro model in Baidu's terms; the same in transformers' terms is in `write_original`.
MICRO: dict[str, Any] = RELEASED | {
    "vocab_size": 512, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "moe_num_experts": [4, 4], "moe_intermediate_size": [64, 32], "moe_k": 2,
    "moe_layer_end_index": [4, 3], "moe_num_shared_experts": 1, "rope_theta": 10000,
    "freq_allocation": 4, "im_patch_id": 6, "image_start_token_id": 7, "image_end_token_id": 8,
    "video_token_id": 11, "video_start_token_id": 9, "video_end_token_id": 10,
    "vision_config": RELEASED["vision_config"] | {
        "depth": 2, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 1.5, "num_heads": 2,
        "patch_size": PATCH, "spatial_patch_size": PATCH,
    },
}  # fmt: skip


def train_sentencepiece(**changes: Any) -> bytes:
    """A sentencepiece model like that of ERNIE 4.5, trained on a few lines in a moment.

    Single digits, two words and the special tokens are user-defined; bytes stand for characters
    that it does not know.
    """
    from sentencepiece import SentencePieceTrainer

    lines = [
        "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
        "def area(width, height):\n    return width * height  # 12 and 345",
        "敏捷的棕色狐狸跳过了懒狗，懒狗并不在意。天下大势，分久必合，合久必分。",
        "In 1984 there were 2,718 of them; by 2001 only 42 --- or so they said ...",
        "The thing about these things is that there is nothing to them.",
    ] * 20
    out = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out,
        **{
            "model_type": "bpe", "vocab_size": 500, "byte_fallback": True,
            "add_dummy_prefix": False, "remove_extra_whitespaces": False,
            "normalization_rule_name": "identity", "character_coverage": 1.0,
            "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1, "minloglevel": 2,
            "user_defined_symbols": list(USER_DEFINED), **changes,
        },
    )  # fmt: skip
    return out.getvalue()


def write_original_tokenizer(folder: Path, **changes: Any) -> Path:
    """Tokenizer and processor files of an original checkpoint, with code.

    changes: of tokenizer_config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(train_sentencepiece())
    settings = {
        "tokenizer_class": "Ernie4_5_VLTokenizer",
        "auto_map": {"AutoTokenizer": ["processing_ernie4_5_vl.Ernie4_5_VLTokenizer", None]},
        "chat_template": CHAT_TEMPLATE, "cls_token": "<|begin_of_sentence|>",
        "mask_token": {"content": "<mask:1>", "special": True}, "pad_token": "<unk>",
        "additional_special_tokens": None, "model_max_length": 2048,
    }  # fmt: skip
    processor = {
        "auto_map": {"AutoImageProcessor": "processing_ernie4_5_vl.Ernie4_5_VLImageProcessor"},
        "image_processor_type": "Ernie4_5_VLImageProcessor",
        "processor_class": "Ernie4_5_VLProcessor", "patch_size": PATCH, "merge_size": 2,
        "min_pixels": 64, "max_pixels": 4096,
    }  # fmt: skip
    for name, content in (
        ("tokenizer_config.json", settings | changes),
        ("special_tokens_map.json", {"cls_token": "<|begin_of_sentence|>"}),
        ("added_tokens.json", {"<|VIDEO_PLACEHOLDER|>": 500}),
        ("preprocessor_config.json", processor),
        ("config.json", MICRO),
    ):
        (folder / name).write_text(json.dumps(content))
    for name in ("processing_ernie4_5_vl", "configuration_ernie_45t_vl"):
        (folder / f"{name}.py").write_text(EVIL)
    return folder


def write_original(folder: Path, converted: Path) -> Path:
    """A bf16 checkpoint in both forms: as published, and as transformers saves it, without
    tokenizer."""
    from safetensors.torch import load_file, save_file
    from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration

    torch.manual_seed(9)
    text = {
        "vocab_size": 512, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "moe_k": 2, "moe_num_experts": 4,
        "moe_intermediate_size": [64, 32], "moe_num_shared_experts": 1,
        "max_position_embeddings": 256, "mlp_layer_types": ["dense", "sparse", "sparse"],
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 4, 4],
        },
    }  # fmt: skip
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48,
              "patch_size": PATCH, "spatial_merge_size": 2}  # fmt: skip
    ids = {
        "image_token_id": 6, "image_start_token_id": 7, "image_end_token_id": 8,
        "video_token_id": 11, "video_start_token_id": 9, "video_end_token_id": 10,
    }  # fmt: skip
    config = Ernie4_5_VLMoeConfig(text_config=text, vision_config=vision, **ids)
    model = Ernie4_5_VLMoeForConditionalGeneration(config).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("e_score_correction_bias"):
            parameter.data.normal_(0, 0.02)
        elif parameter.dim() > 1:
            parameter.data.normal_(0, 0.1)
    model.save_pretrained(converted)
    write_original_tokenizer(folder)
    tensors = load_file(converted / "model.safetensors")
    published = {
        name.removeprefix("model.") if ".vision_model." in name else name: tensor
        for name, tensor in tensors.items()
    }
    save_file(published, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
