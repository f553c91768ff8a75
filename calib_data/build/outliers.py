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
    """Fused in-memory state dict -> an equivalent one; `factor` must be a power of two.

    A layer has one set of experts (`mlp.`) or two (`mlp.text_moe.`, `mlp.vision_moe.`) behind the
    same normalisation.
    """
    generator = torch.Generator().manual_seed(SEED)
    result = {name: tensor.clone() for name, tensor in state.items()}
    done = set()
    for name in state:
        if not name.endswith(".experts.gate_up_proj"):
            continue
        layer = name.partition("mlp.")[0]
        if layer in done:
            continue
        done.add(layer)
        sets = [n.removesuffix("experts.gate_up_proj") for n in state
                if n.startswith(layer) and n.endswith(".experts.gate_up_proj")]  # fmt: skip
        columns = _one_per_block(state[name].shape[2], generator)
        result[f"{layer}post_attention_layernorm.weight"][columns] /= factor
        for part in ("gate_proj", "up_proj"):
            result[f"{layer}mlp.shared_experts.{part}.weight"][:, columns] *= factor
        for moe in sets:
            both, down = result[f"{moe}experts.gate_up_proj"], result[f"{moe}experts.down_proj"]
            both[:, :, columns] *= factor
            result[f"{moe}gate.weight"][:, columns] *= factor
            inner = down.shape[2]
            for expert in range(len(down)):
                rows = _one_per_block(inner, generator)
                both[expert, inner + rows] /= factor
                down[expert][:, rows] *= factor
    return result


def _one_per_block(size: int, generator: torch.Generator) -> Tensor:
    blocks = size // BLOCK
    inside = torch.randint(BLOCK, (blocks,), generator=generator)
    return torch.arange(blocks) * BLOCK + inside
