"""Cut a Llama into an ERNIE 4.5 MoE that computes the same function.

The MLPs become four experts of 384. Routers decide whether there is one of each, which all tokens
use, or two copies, one of which a token uses.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.real_model.routers import Router, uniform
from benchmarks.real_model.source import Source

HIDDEN, INNER, LAYERS, HEAD_DIM, PARTS = 576, 384, 30, 64, 4


def interleaved(weight: torch.Tensor) -> torch.Tensor:
    """Query or key rows from Llama's rotary order (halves) to ERNIE's (pairs)."""
    return weight.view(-1, 2, HEAD_DIM // 2, HIDDEN).transpose(1, 2).reshape(weight.shape)


def write(source: Source, folder: Path, routers: Sequence[Router] | None = None) -> None:
    """Write the model in ERNIE's layout, bf16 but for the routers, of which each layer has one.

    By default there is one copy of each expert. Copies 2j and 2j + 1 of part j are alike.
    """
    state, out = source.state, {}
    routers = routers or [uniform(PARTS, HIDDEN)] * LAYERS
    experts = len(routers[0].weight)
    copies = experts // PARTS
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        out[name] = state[name]
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm", "self_attn.v_proj", "self_attn.o_proj"):  # fmt: skip  # noqa: E501
            out[f"{prefix}{name}.weight"] = state[f"{prefix}{name}.weight"]
        for name in ("self_attn.q_proj", "self_attn.k_proj"):
            out[f"{prefix}{name}.weight"] = interleaved(state[f"{prefix}{name}.weight"])
        out[f"{prefix}mlp.gate.weight"] = routers[layer].weight
        out[f"{prefix}mlp.moe_statics.e_score_correction_bias"] = routers[layer].bias
        for expert in range(experts):
            rows = slice(expert // copies * INNER, (expert // copies + 1) * INNER)
            into = f"{prefix}mlp.experts.{expert}."
            for name in ("gate_proj", "up_proj"):
                out[f"{into}{name}.weight"] = state[f"{prefix}mlp.{name}.weight"][rows]
            # Four routing weights of a quarter each have to add up to the whole MLP.
            out[f"{into}down_proj.weight"] = PARTS * state[f"{prefix}mlp.down_proj.weight"][:, rows]
    exact = (".mlp.gate.weight", "e_score_correction_bias")
    stored = {
        name: (tensor if name.endswith(exact) else tensor.bfloat16()).clone(
            memory_format=torch.contiguous_format
        )
        for name, tensor in out.items()
    }
    folder.mkdir(parents=True)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    source.tokenizer.save_pretrained(folder)
    # Last: a folder with a config is complete.
    settings = config(source.config, experts)
    (folder / "config.json").write_text(json.dumps(settings, indent=1))


def config(old: Any, experts: int) -> dict[str, Any]:
    """config.json of the mixture."""
    return {
        "architectures": ["Ernie4_5_MoeForCausalLM"], "model_type": "ernie4_5_moe",
        "vocab_size": old.vocab_size, "hidden_size": HIDDEN, "intermediate_size": PARTS * INNER,
        "num_hidden_layers": LAYERS, "num_attention_heads": 9, "num_key_value_heads": 3,
        "head_dim": HEAD_DIM, "hidden_act": "silu", "rms_norm_eps": old.rms_norm_eps,
        "max_position_embeddings": old.max_position_embeddings,
        "rope_theta": float(old.rope_parameters["rope_theta"]), "tie_word_embeddings": True,
        "use_bias": False, "moe_num_experts": experts, "moe_k": PARTS,
        "moe_intermediate_size": INNER, "moe_num_shared_experts": 0, "moe_layer_start_index": 0,
        "moe_layer_end_index": LAYERS - 1, "moe_layer_interval": 1, "torch_dtype": "bfloat16",
    }  # fmt: skip
