"""Give the routed experts outlier channels, as large models have them, without changing the model.

A model trained for an hour has weights so even that rounding them to two bits hardly shows. Large
models are different: a few channels carry weights many times larger than the rest, paired with
smaller activations. Here one channel in 64 gets that form by moving a power of two from one tensor
into the next, which changes no output: normalisation weight against the columns it feeds, and
up_proj rows against the down_proj column they feed (per expert). MANIFEST.json gives the rounding
figures with and without it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

FACTOR = 8.0
BLOCK = 64
SEED = 64


def with_outliers(state: Mapping[str, Tensor], factor: float = FACTOR) -> dict[str, Tensor]:
    """Fused in-memory state dict -> an equivalent one; `factor` must be a power of two."""
    generator = torch.Generator().manual_seed(SEED)
    result = {name: tensor.clone() for name, tensor in state.items()}
    for name in state:
        if not name.endswith("mlp.experts.gate_up_proj"):
            continue
        mlp = name.removesuffix("experts.gate_up_proj")
        layer = mlp.removesuffix("mlp.")
        both, down = result[name], result[f"{mlp}experts.down_proj"]
        experts, inner, hidden = down.shape[0], down.shape[2], both.shape[2]
        columns = _one_per_block(hidden, generator)
        result[f"{layer}post_attention_layernorm.weight"][columns] /= factor
        both[:, :, columns] *= factor
        result[f"{mlp}gate.weight"][:, columns] *= factor
        for part in ("gate_proj", "up_proj"):
            result[f"{mlp}shared_experts.{part}.weight"][:, columns] *= factor
        for expert in range(experts):
            rows = _one_per_block(inner, generator)
            both[expert, inner + rows] /= factor
            down[expert][:, rows] *= factor
    return result


def _one_per_block(size: int, generator: torch.Generator) -> Tensor:
    blocks = size // BLOCK
    inside = torch.randint(BLOCK, (blocks,), generator=generator)
    return torch.arange(blocks) * BLOCK + inside
