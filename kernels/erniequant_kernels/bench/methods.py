"""Ways to compute a layer's experts: ours, and the best of bfloat16 that can be had.

Each is prepared for a batch, which gives the function to time; the preparation is not timed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from erniequant.packing.products import WeightOf
from erniequant_kernels.bench.problem import (
    BFLOAT16_BITS,
    Batch,
    DenseExperts,
    Shape,
    decoded,
    dense_experts,
    random_matrices,
)
from erniequant_kernels.combine import combine
from erniequant_kernels.dense_gemm import DenseGemmConfig, dense_gemm
from erniequant_kernels.moe import moe_experts
from erniequant_kernels.rotation import swiglu_rotate
from erniequant_kernels.routing import row_tiles
from erniequant_kernels.tuning import Tuning, tuning_for

Run = Callable[[], torch.Tensor]

TRITON_CONFIGS = (
    DenseGemmConfig(16, 64, 128, 4, 4, 528),
    DenseGemmConfig(16, 128, 64, 4, 4, 528),
    DenseGemmConfig(64, 128, 64, 4, 3, 264),
    DenseGemmConfig(64, 256, 64, 8, 3, 264),
    DenseGemmConfig(128, 128, 64, 8, 3, 264),
)
"""The best of these counts as the Triton baseline."""


@dataclass(frozen=True)
class Method:
    """One way to compute the layer.

    Attributes:
        bits: per stored weight; 16 for bfloat16.
        prepare: sets the method up for a batch.
        weight: decoded weights, as `experts_forward` asks for them.
        capturable: whether it may run in a CUDA graph.
    """

    name: str
    bits: int
    prepare: Callable[[Batch], Run]
    weight: WeightOf
    capturable: bool = True


def packed(shape: Shape, bits: int, device: torch.device, tuning: Tuning | None = None) -> Method:
    """This package, as the operator of the runtime calls it; by default with the table of the
    device."""
    gate_up, down = random_matrices(shape, bits, shape.experts, device)
    matrices = {"gate_up_proj": gate_up, "down_proj": down}
    tuning = tuning or tuning_for(device)

    def prepare(batch: Batch) -> Run:
        return lambda: moe_experts(
            batch.x, batch.expert_index, batch.routing, gate_up, down, tuning
        )

    def weight(projection: str, expert: int) -> torch.Tensor:
        return decoded(shape, matrices[projection], expert)

    return Method(f"erniequant {bits} bits", bits, prepare, weight)


def triton_bf16(config: DenseGemmConfig, experts: DenseExperts) -> Method:
    """Our own kernels on bfloat16 weights: the same row tiles and combination, nothing decoded."""

    def prepare(batch: Batch) -> Run:
        device = batch.x.device
        count, double, _ = experts.gate_up.shape
        hidden = batch.x.shape[1]
        tokens, top_k = batch.expert_index.shape
        no_scale = torch.zeros(count, 1, dtype=torch.int16, device=device)
        no_signs = torch.zeros(double, dtype=torch.int32, device=device)

        def run() -> torch.Tensor:
            tiles = row_tiles(batch.expert_index, count, config.block_m)
            rows = tokens * top_k
            partial = torch.empty(1, rows, double, dtype=torch.bfloat16, device=device)
            dense_gemm(batch.x, experts.gate_up, tiles, top_k, partial[0], config)
            inner = torch.empty(rows, double // 2, dtype=torch.bfloat16, device=device)
            swiglu_rotate(
                partial, no_scale, batch.expert_index, no_signs, 1, inner, scaled=True
            )  # fmt: skip
            partial = torch.empty(1, rows, hidden, dtype=torch.bfloat16, device=device)
            dense_gemm(inner, experts.down, tiles, 1, partial[0], config)
            out = torch.empty_like(batch.x)
            combine(
                partial, no_scale, batch.expert_index, batch.routing, out, scaled=True
            )  # fmt: skip
            return out

        return run

    name = f"bf16 Triton {config.block_m}x{config.block_n}x{config.block_k}"
    return Method(name, BFLOAT16_BITS, prepare, experts.weight)


def torch_grouped(experts: DenseExperts) -> Method:
    """torch's grouped product, with the sorting that it takes."""
    gate_up, down = (w.transpose(1, 2) for w in (experts.gate_up, experts.down))
    count = len(experts.down)

    def multiply(batch: Batch) -> torch.Tensor:
        top_k = batch.expert_index.shape[1]
        chosen, order = batch.expert_index.flatten().sort(stable=True)
        expert = torch.arange(count, device=chosen.device)
        ends = torch.searchsorted(chosen, expert, right=True).to(torch.int32)
        token = order // top_k
        gate, up = functional.grouped_mm(batch.x[token], gate_up, offs=ends).chunk(2, dim=-1)
        y = functional.grouped_mm(functional.silu(gate) * up, down, offs=ends)
        y = y * batch.routing.flatten()[order, None]
        slots = torch.empty_like(y)
        slots[order] = y
        return slots.view(-1, top_k, y.shape[-1]).sum(1)

    def prepare(batch: Batch) -> Run:
        return partial(multiply, batch)

    return Method("bf16 torch grouped_mm", BFLOAT16_BITS, prepare, experts.weight)


def transformers_experts(implementation: str, experts: DenseExperts) -> Method:
    """The experts module of transformers under one of its implementations."""

    def prepare(batch: Batch) -> Run:
        from transformers import Ernie4_5_MoeConfig
        from transformers.models.ernie4_5_moe import modeling_ernie4_5_moe as modeling

        count, double, hidden = experts.gate_up.shape
        config: Any = Ernie4_5_MoeConfig(
            hidden_size=hidden, moe_intermediate_size=double // 2, moe_num_experts=count
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            module: Any = modeling.Ernie4_5_MoeExperts(config)
        module.gate_up_proj = torch.nn.Parameter(experts.gate_up, requires_grad=False)
        module.down_proj = torch.nn.Parameter(experts.down, requires_grad=False)
        run: Run = lambda: module(batch.x, batch.expert_index, batch.routing)  # noqa: E731
        return run

    name = f"bf16 transformers {implementation}"
    # The eager loop asks the device which experts were hit.
    return Method(name, BFLOAT16_BITS, prepare, experts.weight, implementation != "eager")


def baselines(experts: DenseExperts) -> list[Method]:
    """Every bfloat16 method."""
    return [
        torch_grouped(experts),
        *(transformers_experts(name, experts) for name in ("grouped_mm", "batched_mm", "eager")),
        *(triton_bf16(config, experts) for config in TRITON_CONFIGS),
    ]


def methods(shape: Shape, bits: Sequence[int], device: torch.device) -> list[Method]:
    """Ours at each width, and every bfloat16 method on the decoded weights of the first."""
    ours = [packed(shape, width, device) for width in bits]
    return ours + baselines(dense_experts(shape, ours[0].weight, device))
