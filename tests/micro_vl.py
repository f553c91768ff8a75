"""A micro ERNIE 4.5 vision-language MoE with a tokenizer, images and records; made in a second."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from testing.micro_model import CHARACTERS

IMAGE, IMAGE_START, IMAGE_END = 96, 97, 98
TOKEN_IDS = {
    "image_token_id": IMAGE, "image_start_token_id": IMAGE_START, "image_end_token_id": IMAGE_END,
    "video_token_id": 99, "video_start_token_id": 100, "video_end_token_id": 101,
}  # fmt: skip
SPECIAL = {
    "image_token": "<|IMAGE_PLACEHOLDER|>", "image_start_token": "<|IMAGE_START|>",
    "image_end_token": "<|IMAGE_END|>", "video_token": "<|VIDEO_PLACEHOLDER|>",
    "video_start_token": "<|VIDEO_START|>", "video_end_token": "<|VIDEO_END|>",
}  # fmt: skip
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% else %}"
    "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>{% endif %}{% endfor %}{% endif %};"
    "{% endfor %}{% if add_generation_prompt %}bot: {% endif %}"
)
PATCH, MERGE = 4, 2


def write_micro_vl(folder: Path, seed: int = 7) -> Path:
    """A bf16 checkpoint with Baidu's tensor names, saved as transformers does.

    Hidden 96 is no power of two, the sets of experts differ in size and the inner size of vision
    is the smallest that has a tile, routers are float32 and their biases not zero, the first layer
    is dense, the embedding is tied, and the vision tower has two blocks of two heads.
    """
    from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration

    torch.manual_seed(seed)
    text = {
        "vocab_size": 128, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "moe_k": 2, "moe_num_experts": 4,
        "moe_intermediate_size": [64, 32], "moe_num_shared_experts": 1,
        "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": None,
        "eos_token_id": 1,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 4, 4],
        },
    }  # fmt: skip
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48,
              "patch_size": PATCH, "spatial_merge_size": MERGE}  # fmt: skip
    config = Ernie4_5_VLMoeConfig(text_config=text, vision_config=vision, **TOKEN_IDS)
    model = Ernie4_5_VLMoeForConditionalGeneration(config).to(torch.bfloat16)
    for name, module in model.named_modules():
        if name.endswith("moe.gate"):
            module.float()
    for name, parameter in model.named_parameters():
        if name.endswith("e_score_correction_bias"):
            parameter.data.normal_(0, 0.02)
        elif parameter.dim() > 1:
            parameter.data.normal_(0, 0.1)
    model.save_pretrained(folder)
    settings = {"patch_size": PATCH, "merge_size": MERGE, "min_pixels": 64, "max_pixels": 4096}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return _add_tokenizer(folder)


def as_baidu_releases_it(folder: Path, to: Path) -> Path:
    """The same checkpoint with the config of the released models, and without the `model.` that
    transformers writes before the vision tower."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, to)
    tensors = load_file(folder / "model.safetensors")
    renamed = {
        name.removeprefix("model.") if ".vision_model." in name else name: tensor
        for name, tensor in tensors.items()
    }
    assert renamed.keys() != tensors.keys()
    save_file(renamed, to / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "moe_k",
            "moe_intermediate_size", "moe_num_shared_experts", "pad_token_id", "eos_token_id",
            "rms_norm_eps", "tie_word_embeddings", "use_bias")  # fmt: skip
    original = {
        "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
        "model_type": "ernie4_5_moe_vl",
        "torch_dtype": "bfloat16",
        **{name: text[name] for name in kept},
        "moe_num_experts": [text["moe_num_experts"]] * 2,
        "moe_layer_start_index": [1, 1],
        # Beyond the last layer, as in the released config.
        "moe_layer_end_index": [4, 3],
        "moe_layer_interval": 1,
        "rope_theta": text["rope_parameters"]["rope_theta"],
        "freq_allocation": text["rope_parameters"]["mrope_section"][2],
        "spatial_conv_size": MERGE,
        "temporal_conv_size": 2,
        "im_patch_id": IMAGE,
        **{name: i for name, i in TOKEN_IDS.items() if name != "image_token_id"},
        "vision_config": {
            "depth": vision["depth"], "embed_dim": vision["hidden_size"],
            "hidden_act": "quick_gelu", "hidden_size": vision["hidden_size"], "in_channels": 3,
            "mlp_ratio": 1.5,
            "model_type": "DFNRope_vision_transformer", "num_heads": vision["num_heads"],
            "patch_size": PATCH, "spatial_merge_size": MERGE,
        },
    }  # fmt: skip
    (to / "config.json").write_text(json.dumps(original))
    return to


def _add_tokenizer(folder: Path) -> Path:
    """One token per character, and the special ones of images."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(CHARACTERS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(list(SPECIAL.values()))
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>",
        chat_template=CHAT_TEMPLATE, extra_special_tokens=SPECIAL,
    )  # fmt: skip
    made.save_pretrained(folder)
    return folder


def write_image(path: Path, width: int, height: int, seed: int = 0) -> Path:
    """An image of noise."""
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)
    return path


def write_records(folder: Path, count: int = 24) -> Path:
    """A JSONL file: in turns one image, two images, an image within the text, and text alone.

    Images are wide, tall and square, so that rows and columns mixed up show.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shapes = ((16, 16), (32, 16), (16, 40))
    generator = torch.Generator().manual_seed(11)
    records: list[dict[str, Any]] = []
    for number in range(count):
        letters = torch.randint(32, 125, (20,), generator=generator).tolist()
        text = "".join(map(chr, letters)).replace("<", "(")
        names = [f"{number}-{i}.png" for i in range(2)]
        for i, name in enumerate(names):
            write_image(folder / name, *shapes[(number + i) % 3], seed=number + 100 * i)
        kinds: list[dict[str, Any]] = [
            {"image": names[0], "text": text},
            {"images": names, "text": text},
            {"image": names[0], "text": f"{text[:7]}<image>{text[7:]}"},
            {"text": text * 8},
        ]
        records.append(kinds[number % 4])
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
