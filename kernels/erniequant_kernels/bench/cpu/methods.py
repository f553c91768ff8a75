"""Ways to compute a layer's experts on the CPU: packed, and by torch on decoded weights.

Each holds more experts than the caches do. `turned` sends a batch to the next ones in turn, so no
call finds its weights in a cache.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch

from erniequant.packing.products import WeightOf, experts_forward
from erniequant_kernels.bench.problem import (
    BFLOAT16_BITS,
    Batch,
    Shape,
    decoded,
    decoded_wint2,
    fits_wint2,
    random_matrices,
    random_wint2,
    wint2_expert_bytes,
)
from erniequant_kernels.cpu.moe import moe_experts_cpu
from erniequant_kernels.cpu.wint2_moe import moe_experts_wint2_cpu
from erniequant_kernels.matrices import PackedMatrices

HELD_BYTES = 256 * 2**20
"""Weights that a method holds, at least: more than any cache."""

CHECKED_EXPERTS = 3
"""Experts that are decoded to check results; tokens are sent only to them for that."""

CPU = torch.device("cpu")


@dataclass(frozen=True)
class CpuMethod:
    """One way to compute the layer.

    Attributes:
        bits: per weight; 16 and 32 for decoded ones.
        experts: how many it holds; indices of a batch are below.
        expert_bytes: bytes of an expert's weights and scales.
        run: the layer's outputs ``[T, H]`` for a batch.
        weight: decoded float32 weights of one of the first `CHECKED_EXPERTS` experts.
    """

    name: str
    bits: int
    experts: int
    expert_bytes: float
    run: Callable[[Batch], torch.Tensor]
    weight: WeightOf

    def expected(self, batch: Batch) -> torch.Tensor:
        """The layer in float32, for indices below `CHECKED_EXPERTS`."""
        return experts_forward(
            batch.x.float(), batch.expert_index, batch.routing, self.experts, self.weight, "silu"
        )


def turned(batch: Batch, first: int, experts: int) -> Batch:
    """The batch with its experts renumbered from ``first`` on, without gaps, modulo ``experts``."""
    _, rank = batch.expert_index.unique(return_inverse=True)
    return replace(batch, expert_index=(first + rank) % experts)


def held(shape: Shape, expert_bytes: float) -> int:
    """Experts that take `HELD_BYTES`, and no fewer than a layer has."""
    return max(shape.experts, math.ceil(HELD_BYTES / expert_bytes))


def packed(shape: Shape, bits: int) -> CpuMethod:
    """Native codes, as the operator of the runtime multiplies them."""
    expert_bytes = shape.weights_per_expert * bits / 8 + 2 * (2 * shape.inner + shape.hidden)
    experts = held(shape, expert_bytes)
    gate_up, down = random_matrices(shape, bits, experts, CPU)
    matrices: dict[str, PackedMatrices] = {"gate_up_proj": gate_up, "down_proj": down}

    @cache
    def weight(projection: str, expert: int) -> torch.Tensor:
        return decoded(shape, matrices[projection], expert)

    def run(batch: Batch) -> torch.Tensor:
        return moe_experts_cpu(batch.x, batch.expert_index, batch.routing, gate_up, down)

    return CpuMethod(f"erniequant {bits} bits", bits, experts, expert_bytes, run, weight)


def wint2(shape: Shape) -> CpuMethod:
    """Baidu's WINT2, in the order of inputs that FastDeploy serves."""
    expert_bytes = wint2_expert_bytes(shape)
    experts = held(shape, expert_bytes)
    gate_up, down = random_wint2(shape, experts, CPU)
    matrices = {"gate_up_proj": gate_up, "down_proj": down}

    @cache
    def weight(projection: str, expert: int) -> torch.Tensor:
        return decoded_wint2(matrices[projection], expert)

    def run(batch: Batch) -> torch.Tensor:
        return moe_experts_wint2_cpu(batch.x, batch.expert_index, batch.routing, gate_up, down)

    return CpuMethod("WINT2", 2, experts, expert_bytes, run, weight)


def dense(shape: Shape, dtype: torch.dtype, weight: WeightOf) -> CpuMethod:
    """Torch's product with decoded weights, expert by expert, as transformers multiplies.

    Copies of the first `CHECKED_EXPERTS` experts take `HELD_BYTES`. Where these are fewer than a
    layer has, they stand for all of its experts, one after the other.
    """
    bits = 8 * dtype.itemsize
    expert_bytes = shape.weights_per_expert * bits / 8
    copies = math.ceil(HELD_BYTES / expert_bytes)
    copies += -copies % CHECKED_EXPERTS
    weights = {
        projection: torch.stack(
            [weight(projection, i % CHECKED_EXPERTS).to(dtype) for i in range(copies)]
        )
        for projection in ("gate_up_proj", "down_proj")
    }
    experts = copies * math.ceil(shape.experts / copies)

    def run(batch: Batch) -> torch.Tensor:
        return experts_forward(
            batch.x.to(dtype), batch.expert_index, batch.routing, experts,
            lambda projection, expert: weights[projection][expert % copies], "silu",
        )  # fmt: skip

    name = "bf16" if bits == BFLOAT16_BITS else "fp32"
    return CpuMethod(f"{name} torch linear", bits, experts, expert_bytes, run, weight)


def methods(shape: Shape, codes: list[str]) -> list[CpuMethod]:
    """Every packed method that ``codes`` names, bits or ``wint2``, and then torch's in bfloat16 and
    float32 on the decoded weights of the first.

    WINT2 is left out where its groups do not fit the inner size.
    """
    ours = [
        wint2(shape) if code == "wint2" else packed(shape, int(code))
        for code in codes if code != "wint2" or fits_wint2(shape)
    ]  # fmt: skip
    if not ours:
        return []
    return ours + [dense(shape, t, ours[0].weight) for t in (torch.bfloat16, torch.float32)]
