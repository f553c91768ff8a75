"""A micro ERNIE 4.5 MoE with a tokenizer, made anew in a second."""

from pathlib import Path
from typing import Any

import torch

CHARACTERS = {"<unk>": 0, "</s>": 1} | {chr(30 + i): i for i in range(2, 96)}
"""A vocabulary of printable characters."""


def write_micro_ernie(folder: Path, **changes: Any) -> Path:
    """A bf16 checkpoint with Baidu's per-expert tensor names.

    Hidden 96 is not a power of two (largest rotation block 32), the first layer is dense, routers
    are float32 as in published models, their bias is not zero, and the embedding is tied.

    changes: changes to the config.
    """
    from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM

    torch.manual_seed(7)
    settings: dict[str, Any] = dict(
        vocab_size=128, hidden_size=96, intermediate_size=160, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        moe_num_experts=8, moe_k=2, moe_intermediate_size=64, moe_num_shared_experts=2,
        moe_layer_start_index=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = Ernie4_5_MoeForCausalLM(Ernie4_5_MoeConfig(**settings | changes)).to(torch.bfloat16)
    for layer in model.model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.float()
    for name, parameter in model.named_parameters():
        if name.endswith("e_score_correction_bias"):
            parameter.data.normal_(0, 0.02)
        elif parameter.dim() > 1:
            parameter.data.normal_(0, 0.1)
    model.save_pretrained(folder)
    return folder


def add_tokenizer(folder: Path) -> Path:
    """Give a checkpoint a tokenizer of one token per character."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(CHARACTERS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder
