"""The experts of a layer on packed weights: which kernels run, in which order, in which memory.

Every launch has a shape that follows from the sizes of its arguments, and nothing waits for the
device, so the whole can be captured in a CUDA graph. Weights are never decoded to memory.
"""

from dataclasses import dataclass

import torch

from erniequant_kernels import decode
from erniequant_kernels.combine import combine
from erniequant_kernels.fused_gemm import FusedGemmConfig, fused_gemm
from erniequant_kernels.launch import empty, kept_on_device, repeated
from erniequant_kernels.matrices import PackedMatrices
from erniequant_kernels.packed_gemm import PackedGemmConfig, packed_gemm
from erniequant_kernels.prepare import prepare
from erniequant_kernels.rotation import swiglu_rotate
from erniequant_kernels.routing import RowTiles, most_row_tiles
from erniequant_kernels.tuning import GemmConfig, Tuning


@dataclass(frozen=True)
class MatrixPlan:
    """How one projection is computed.

    Attributes:
        config: of the product, packed for few tokens and fused for many.
        partial: shape ``[splits, A, N]`` and dtype of the products.
        rotated: shape ``[rows, K]`` of the rotated inputs, bfloat16.
    """

    config: GemmConfig
    partial: tuple[tuple[int, int, int], torch.dtype]
    rotated: tuple[int, int]

    @property
    def scaled(self) -> bool:
        """Whether the products carry their scales: packed ones are summands until they are read."""
        return isinstance(self.config, FusedGemmConfig)


@dataclass(frozen=True)
class Plan:
    """How a batch is computed; `workspace_bytes` is all the memory it takes beside its output."""

    block_m: int
    row_tiles: int
    gate_up: MatrixPlan
    down: MatrixPlan
    assignments: int
    experts: int

    @property
    def workspace_bytes(self) -> int:
        """Bytes allocated beside arguments and result, were nothing freed in between."""
        total = 4 * (self.assignments + 3 * self.row_tiles + self.experts + 1)
        for matrix in (self.gate_up, self.down):
            shape, dtype = matrix.partial
            total += torch.Size(shape).numel() * dtype.itemsize
            total += 2 * torch.Size(matrix.rotated).numel()
        return total


def plan(
    tokens: int, top_k: int, gate_up: PackedMatrices, down: PackedMatrices, tuning: Tuning
) -> Plan:
    """Choose kernels and tile sizes for a batch of ``tokens``."""
    experts, assignments = gate_up.experts, tokens * top_k
    row = tuning.row(assignments / experts)

    def matrix_plan(matrix: PackedMatrices, rows: int) -> MatrixPlan:
        inputs, outputs = matrix.inputs, matrix.outputs
        config = tuning.config(row, matrix.code, outputs, inputs, experts, top_k)
        if isinstance(config, PackedGemmConfig):
            partial = ((config.splits, assignments, outputs), torch.float32)
        else:
            partial = ((1, assignments, outputs), torch.bfloat16)
        return MatrixPlan(config, partial, (rows, inputs))

    block_m = tuning.rows[row].block_m
    return Plan(
        block_m, most_row_tiles(assignments, experts, block_m),
        matrix_plan(gate_up, tokens), matrix_plan(down, assignments), assignments, experts,
    )  # fmt: skip


@kept_on_device
def constants_on(device: torch.device) -> torch.Tensor:
    """What a layer loads; built with the model, or at the latest when a layer first runs."""
    return decode.constants(device)


def multiply(
    x: torch.Tensor, matrix: PackedMatrices, config: GemmConfig, tiles: RowTiles, top_k: int,
    out: torch.Tensor, *, last: bool = False,
) -> None:  # fmt: skip
    """Products of all assignments, by the kernel that the config is for.

    Args:
        x: rotated inputs, bfloat16 ``[rows, K]``, contiguous; assignment ``a`` reads row
            ``a // top_k``.
        tiles: row tiles of ``config.block_m``.
        out: ``[splits, A, N]``, contiguous: float32 summands for a packed product; for a fused one
            of any float type, one split that carries its scales.
        last: of a fused product: as in `fused_gemm`.
    """
    packed, constants, code = matrix.packed, constants_on(x.device), matrix.code
    if isinstance(config, PackedGemmConfig):
        packed_gemm(x, packed, constants, code, matrix.tile, tiles, top_k, out, config)
    else:
        fused_gemm(
            x, packed, matrix.scale, constants, code, matrix.tile, tiles, top_k, out[0], config,
            last=last,
        )  # fmt: skip


def moe_experts(
    x: torch.Tensor, expert_index: torch.Tensor, routing: torch.Tensor, gate_up: PackedMatrices,
    down: PackedMatrices, tuning: Tuning,
) -> torch.Tensor:  # fmt: skip
    """Weighted sum of ``down(silu(gate(x)) * up(x))`` over the chosen experts of each token.

    Rotated activations are bfloat16, sums float32 (rounded to bfloat16 between the projections
    where the load calls for fused products).

    Args:
        x: ``[T, H]`` of any float type, contiguous.
        expert_index: integer ``[T, k]``; an index outside ``[0, E)`` contributes nothing.
        routing: float ``[T, k]``.

    Returns:
        ``[T, H]`` in the dtype of ``x``. The same bits for the same arguments, whatever the order
        in which programs run.
    """
    out = torch.empty_like(x)
    tokens, top_k = expert_index.shape
    if tokens == 0 or top_k == 0:
        return out.zero_()
    expert_index, routing = expert_index.contiguous(), routing.contiguous()

    def compute() -> None:
        how = plan(tokens, top_k, gate_up, down, tuning)
        hidden = empty(how.gate_up.rotated, torch.bfloat16, x.device)
        tiles = prepare(
            expert_index, gate_up.experts, how.block_m, x, gate_up.signs, gate_up.rotation_block,
            hidden,
        )  # fmt: skip
        partial = empty(*how.gate_up.partial, x.device)
        multiply(hidden, gate_up, how.gate_up.config, tiles, top_k, partial)
        inner = empty(how.down.rotated, torch.bfloat16, x.device)
        swiglu_rotate(
            partial, gate_up.scale, expert_index, down.signs, down.rotation_block, inner,
            scaled=how.gate_up.scaled,
        )  # fmt: skip
        partial = empty(*how.down.partial, x.device)
        multiply(inner, down, how.down.config, tiles, 1, partial)
        combine(partial, down.scale, expert_index, routing, out, scaled=how.down.scaled)

    repeated(
        ("moe", expert_index.shape, x.shape, gate_up.sizes, down.sizes, tuning),
        [x, expert_index, routing, *gate_up.tensors, *down.tensors, out],
        compute,
    )
    return out
