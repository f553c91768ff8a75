"""Ways to compute a layer's experts: ours, and the best of bfloat16 that can be had.

Each is a function of experts and batch that returns the function to time; its own preparation is
not timed. ``capturable`` says whether it may run in a CUDA graph.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from erniequant.packing.decoding import encode_scale
from erniequant_kernels.bench.problem import Batch, Experts
from erniequant_kernels.combine import combine
from erniequant_kernels.dense_gemm import DenseGemmConfig, dense_gemm
from erniequant_kernels.moe import moe_experts
from erniequant_kernels.rotation import swiglu_rotate
from erniequant_kernels.routing import row_tiles
from erniequant_kernels.tuning import tuning_for

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
    """A name for tables, and the function that sets the method up."""

    name: str
    prepare: Callable[[Experts, Batch], Run]
    capturable: bool = True


def packed(bits: int) -> Method:
    """This package, as the operator of the runtime calls it."""

    def prepare(experts: Experts, batch: Batch) -> Run:
        tuning = tuning_for(batch.x.device)
        return lambda: moe_experts(
            batch.x, batch.expert_index, batch.routing, experts.gate_up, experts.down, tuning
        )

    return Method(f"erniequant {bits} bits", prepare)


def triton_bf16(config: DenseGemmConfig) -> Method:
    """Our own kernels on bfloat16 weights: the same row tiles and combination, nothing decoded."""

    def prepare(experts: Experts, batch: Batch) -> Run:
        device = batch.x.device
        count, double, _ = experts.gate_up_bf16.shape
        hidden = batch.x.shape[1]
        tokens, top_k = batch.expert_index.shape
        gate_scale, down_scale = (
            encode_scale(torch.ones(count, outputs, device=device)) for outputs in (double, hidden)
        )
        no_signs = torch.zeros(double, dtype=torch.int32, device=device)

        def run() -> torch.Tensor:
            tiles = row_tiles(batch.expert_index, count, config.block_m)
            rows = tokens * top_k
            partial = torch.empty(1, rows, double, dtype=torch.bfloat16, device=device)
            dense_gemm(batch.x, experts.gate_up_bf16, tiles, top_k, partial[0], config)
            inner = torch.empty(rows, double // 2, dtype=torch.bfloat16, device=device)
            swiglu_rotate(partial, gate_scale, batch.expert_index, no_signs, 1, inner)
            partial = torch.empty(1, rows, hidden, dtype=torch.bfloat16, device=device)
            dense_gemm(inner, experts.down_bf16, tiles, 1, partial[0], config)
            out = torch.empty_like(batch.x)
            combine(partial, down_scale, batch.expert_index, batch.routing, out)
            return out

        return run

    return Method(f"bf16 Triton {config.block_m}x{config.block_n}x{config.block_k}", prepare)


def _torch_grouped(experts: Experts, batch: Batch) -> Run:
    count = experts.gate_up_bf16.shape[0]
    top_k = batch.expert_index.shape[1]
    gate_up, down = (w.transpose(1, 2) for w in (experts.gate_up_bf16, experts.down_bf16))

    def run() -> torch.Tensor:
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

    return run


def transformers_experts(implementation: str) -> Method:
    """The experts module of transformers under one of its implementations."""

    def prepare(experts: Experts, batch: Batch) -> Run:
        from transformers import Ernie4_5_MoeConfig
        from transformers.models.ernie4_5_moe import modeling_ernie4_5_moe as modeling

        count, double, hidden = experts.gate_up_bf16.shape
        config: Any = Ernie4_5_MoeConfig(
            hidden_size=hidden, moe_intermediate_size=double // 2, moe_num_experts=count
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            module: Any = modeling.Ernie4_5_MoeExperts(config)
        module.gate_up_proj = torch.nn.Parameter(experts.gate_up_bf16, requires_grad=False)
        module.down_proj = torch.nn.Parameter(experts.down_bf16, requires_grad=False)
        run: Run = lambda: module(batch.x, batch.expert_index, batch.routing)  # noqa: E731
        return run

    # The eager loop asks the device which experts were hit.
    return Method(f"bf16 transformers {implementation}", prepare, implementation != "eager")


def baselines() -> list[Method]:
    """Every bfloat16 method."""
    return [
        Method("bf16 torch grouped_mm", _torch_grouped),
        *(transformers_experts(name) for name in ("grouped_mm", "batched_mm", "eager")),
        *map(triton_bf16, TRITON_CONFIGS),
    ]
