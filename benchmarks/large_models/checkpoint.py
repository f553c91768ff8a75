"""Checkpoints with the names and shapes of the large models, and few layers.

Weights that are read are random; the rest of the files are holes, which take no disk.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from erniequant.checkpoint.files import write_json
from erniequant.checkpoint.layout import OutputTensor, index_of, plan_shards
from erniequant.models.architecture import EXPERT_MATRICES
from erniequant.models.registry import architecture_of
from testing.micro_model import add_tokenizer

SHAPES: dict[str, dict[str, Any]] = {
    "21b": dict(
        hidden_size=2560, intermediate_size=12288, num_attention_heads=20, num_key_value_heads=4,
        moe_num_experts=64, moe_k=6, moe_intermediate_size=1536, moe_num_shared_experts=2,
    ),
    "300b": dict(
        hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8,
        moe_num_experts=64, moe_k=8, moe_intermediate_size=3584, moe_num_shared_experts=0,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """Size of a checkpoint: a name of `SHAPES`, the number of MoE layers, the experts in each, and
    the tokens it knows."""

    shape: str
    layers: int
    experts: int
    vocabulary: int = 103424


def settings_of(size: Size) -> dict[str, Any]:
    """config.json of the checkpoint."""
    shape = SHAPES[size.shape] | {"moe_num_experts": size.experts}
    shape["moe_k"] = min(shape["moe_k"], max(size.experts // 2, 1))
    return {
        "model_type": "ernie4_5_moe", "architectures": ["Ernie4_5_MoeForCausalLM"],
        "dtype": "bfloat16", "vocab_size": size.vocabulary, "num_hidden_layers": size.layers + 1,
        "moe_layer_start_index": 1, "tie_word_embeddings": True, **shape,
    }  # fmt: skip


def write_source(folder: Path, size: Size) -> None:
    """The checkpoint, with a tokenizer of one token per character."""
    folder.mkdir(parents=True)
    settings = settings_of(size)
    model = architecture_of(settings)
    sizes = model.sizes
    shapes = dict(model.required())
    for layer in sizes.moe_layers:
        for expert in range(sizes.experts):
            for matrix in EXPERT_MATRICES:
                turned = (sizes.groups[0].inner, sizes.hidden)
                shape = turned[::-1] if matrix == "down_proj" else turned
                shapes[model.expert_matrix_name(layer, expert, matrix)] = shape
    tensors = [
        OutputTensor.of(
            name, shape, torch.float32 if "mlp.gate." in name or "moe_statics" in name
            else torch.bfloat16,
        )
        for name, shape in shapes.items()
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    shards = plan_shards(tensors, 5_000_000_000)
    for shard in shards:
        with (folder / shard.file).open("wb") as file:
            file.truncate(shard.n_bytes)
            file.write(shard.header)
            for tensor in shard.tensors:
                file.seek(shard.offsets[tensor.name])
                file.write(_weights(tensor, generator))
    if len(shards) > 1:
        write_json(folder / "model.safetensors.index.json", index_of(shards))
    add_tokenizer(folder)
    write_json(folder / "config.json", settings)


def _weights(tensor: OutputTensor, generator: torch.Generator) -> bytes:
    if tensor.name.endswith("norm.weight"):
        values = torch.ones(tensor.shape)
    elif tensor.name.endswith("bias"):
        values = torch.zeros(tensor.shape)
    elif tensor.name == "model.embed_tokens.weight":
        # Only the first tokens occur; the rest of the table stays a hole.
        values = torch.randn(128, tensor.shape[1], generator=generator)
    else:
        # Channels of uneven size; every matrix gives outputs as large as its inputs.
        values = torch.randn(tensor.shape, generator=generator)
        uneven = torch.rand(tensor.shape[1], generator=generator) + 0.5
        values *= uneven * tensor.shape[1] ** -0.5
    dtype = torch.float32 if tensor.stored_dtype == "F32" else torch.bfloat16
    return values.to(dtype).view(torch.uint8).numpy().tobytes()
