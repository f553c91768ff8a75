"""Write a trained state dict as a sharded checkpoint named as Baidu names ERNIE 4.5 on disk.

python calib_data/build/export_model.py [--cache DIR]      (finishes the latest checkpoint)
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from fetch_texts import DATA, DEFAULT_CACHE
from outliers import with_outliers
from safetensors.torch import save_file
from torch import Tensor

LAYERS, EXPERTS, INNER = 4, 16, 256
SHARD_BYTES = 12_000_000
# Chosen on the left-over text in CACHE/dev, which is neither trained on nor held out.
FINAL_SHARE, LOGIT_SCALE = 0.85, 0.825
GENERATION = {"do_sample": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def config_dict(vocabulary: int) -> dict[str, Any]:
    """config.json, with the keys of the released checkpoints."""
    return {
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "model_type": "ernie4_5_moe",
        "vocab_size": vocabulary,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "use_bias": False,
        "tie_word_embeddings": True,
        "moe_num_experts": EXPERTS,
        "moe_k": 4,
        "moe_intermediate_size": INNER,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": LAYERS - 1,
        "moe_layer_interval": 1,
        "moe_use_aux_free": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }


def finish(final: Mapping[str, Tensor], middle: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Average with the middle of the run, and cooler logits: both undo part of the overfitting."""
    state = {n: FINAL_SHARE * t + (1 - FINAL_SHARE) * middle[n].float() for n, t in final.items()}
    state["model.norm.weight"] = LOGIT_SCALE * state["model.norm.weight"]
    return state


def disk_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fused in-memory tensors -> one per expert and projection; router and bias stay fp32."""
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if name == "lm_head.weight" or "rotary_emb" in name:
            continue  # tied, or recomputed
        if name.endswith("mlp.gate.weight"):
            tensors[name] = value.float()
        elif name.endswith("e_score_correction_bias"):
            tensors[name.replace("mlp.gate.moe_statics", "mlp.moe_statics")] = value.float()
        elif name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(value.bfloat16()):
                prefix = name.removesuffix("gate_up_proj") + str(expert)
                tensors[f"{prefix}.gate_proj.weight"] = both[:INNER]
                tensors[f"{prefix}.up_proj.weight"] = both[INNER:]
        elif name.endswith("experts.down_proj"):
            for expert, one in enumerate(value.bfloat16()):
                prefix = name.removesuffix("down_proj") + str(expert)
                tensors[f"{prefix}.down_proj.weight"] = one
        else:
            tensors[name] = value.bfloat16()
    return {name: t.detach().contiguous() for name, t in tensors.items()}


def export(state: Mapping[str, Tensor], vocabulary: int, out: Path) -> None:
    """Write config, generation config, shards and index beside the tokenizer files in `out`.

    The weights get their outlier channels here; see `outliers.py`.
    """
    write_shards(disk_tensors(with_outliers(state)), out)
    write_json(out / "config.json", config_dict(vocabulary))
    write_json(out / "generation_config.json", GENERATION)


def write_shards(tensors: Mapping[str, Tensor], out: Path, limit: int = SHARD_BYTES) -> None:
    """Shards of at most `limit` bytes, in the order of the tensors, and their index."""
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        if used + tensor.nbytes > limit and shards[-1]:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, out / file, metadata={"format": "pt"})
        (out / file).chmod(0o644)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(t.nbytes for shard in shards for t in shard.values())
    index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(out / "model.safetensors.index.json", index)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--out", type=Path, default=DATA / "tiny_model")
    args = parser.parse_args()
    saved = torch.load(args.cache / "checkpoint.pt", weights_only=True, mmap=True)
    middle = torch.load(args.cache / "middle.pt", weights_only=True, mmap=True)
    state = finish(saved["model"], middle)
    export(state, state["model.embed_tokens.weight"].shape[0], args.out)
    print(f"exported step {saved['progress']['step']}")


if __name__ == "__main__":
    main()
