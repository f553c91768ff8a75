"""The experts of a layer on packed weights: which kernels run, in which order, in which memory.

Every launch has a shape that follows from the sizes of its arguments, and nothing waits for the
device, so the whole can be captured in a CUDA graph.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch

from erniequant_kernels import decode
from erniequant_kernels.combine import combine
from erniequant_kernels.dense_gemm import dense_gemm
from erniequant_kernels.expand import expand
from erniequant_kernels.matrices import PackedMatrices
from erniequant_kernels.packed_gemm import PackedGemmConfig, packed_gemm
from erniequant_kernels.prepare import prepare
from erniequant_kernels.rotation import swiglu_rotate
from erniequant_kernels.routing import RowTiles, most_row_tiles
from erniequant_kernels.tuning import Tuning


@dataclass(frozen=True)
class MatrixPlan:
    """How one projection is computed.

    Attributes:
        config: of the packed product, or None: decode some experts, multiply, and so on.
        partial: shape and dtype of the unscaled products.
        rotated: shape of the rotated inputs, bfloat16.
        expanded: shape of decoded experts, bfloat16 ``[2, experts at a time, N, K]``; empty for the
            packed product.
    """

    config: PackedGemmConfig | None
    partial: tuple[tuple[int, int, int], torch.dtype]
    rotated: tuple[int, int]
    expanded: tuple[int, int, int, int]


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
            total += 2 * torch.Size(matrix.expanded).numel()
        return total


def plan(
    tokens: int, top_k: int, gate_up: PackedMatrices, down: PackedMatrices, tuning: Tuning
) -> Plan:
    """Choose kernels and tile sizes for a batch of ``tokens``."""
    experts, assignments = gate_up.experts, tokens * top_k
    row = tuning.packed_row(assignments / experts, {gate_up.code.bits, down.code.bits})

    def matrix_plan(matrix: PackedMatrices, rows: int) -> MatrixPlan:
        inputs, outputs = matrix.inputs, matrix.outputs
        if row is None:
            chunk = min(experts, tuning.experts_at_once(outputs, inputs))
            partial = ((1, assignments, outputs), torch.bfloat16)
            return MatrixPlan(None, partial, (rows, inputs), (2, chunk, outputs, inputs))
        config = tuning.packed_config(row, matrix.code, outputs, inputs, assignments, experts)
        partial = ((config.splits, assignments, outputs), torch.float32)
        return MatrixPlan(config, partial, (rows, inputs), (0, 0, 0, 0))

    block_m = tuning.dense.block_m if row is None else row.block_m
    return Plan(
        block_m, most_row_tiles(assignments, experts, block_m),
        matrix_plan(gate_up, tokens), matrix_plan(down, assignments), assignments, experts,
    )  # fmt: skip


@cache
def _constants(device: torch.device) -> torch.Tensor:
    return decode.constants(device)


def _multiply(
    x: torch.Tensor, matrix: PackedMatrices, how: MatrixPlan, tiles: RowTiles, top_k: int,
    tuning: Tuning,
) -> torch.Tensor:  # fmt: skip
    """Unscaled products of all assignments: ``[splits, A, N]``."""
    shape, dtype = how.partial
    out = torch.empty(shape, dtype=dtype, device=x.device)
    constants = _constants(x.device)
    if how.config is not None:
        packed_gemm(
            x, matrix.packed, constants, matrix.code, matrix.tile, tiles, top_k, out, how.config
        )
        return out
    expanded = torch.empty(how.expanded, dtype=torch.bfloat16, device=x.device)
    overlap = _Overlap(x.device)
    for turn, first in enumerate(range(0, matrix.experts, how.expanded[1])):
        some = matrix.packed[first : first + how.expanded[1]]
        labels = expanded[turn % 2, : some.shape[0]]
        with overlap.decoding(turn):
            expand(some, constants, matrix.code, matrix.tile, labels)
        overlap.wait_for_labels()
        dense_gemm(x, labels, tiles, top_k, out[0], tuning.dense, first_expert=first)
        overlap.multiplied()
    return out


class _Overlap:
    """Decode the next experts while the last ones are multiplied: one needs the logic units and
    memory, the other the matrix units. Two halves of the workspace take turns.

    On a GPU the decoding has a stream of its own, forked from the current one and joined before
    every product, also when captured in a graph; elsewhere all is in order anyway.
    """

    def __init__(self, device: torch.device):
        self.main = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self.products: list[torch.cuda.Event] = []
        self.labels: torch.cuda.Event | None = None
        if self.main is not None:
            self.side = _side_stream(device)
            self.side.wait_stream(self.main)

    @contextmanager
    def decoding(self, turn: int) -> Iterator[None]:
        """Launch on the side stream, once the half that turn ``turn`` writes has been read."""
        if self.main is None:
            yield
            return
        if turn >= 2:
            self.side.wait_event(self.products[turn - 2])
        with torch.cuda.stream(self.side):
            yield
            self.labels = self.side.record_event()

    def wait_for_labels(self) -> None:
        """What is launched now runs after the decoding so far."""
        if self.main is not None and self.labels is not None:
            self.main.wait_event(self.labels)

    def multiplied(self) -> None:
        """The product that was just launched is the last to read its half."""
        if self.main is not None:
            self.products.append(self.main.record_event())


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def moe_experts(
    x: torch.Tensor, expert_index: torch.Tensor, routing: torch.Tensor, gate_up: PackedMatrices,
    down: PackedMatrices, tuning: Tuning,
) -> torch.Tensor:  # fmt: skip
    """Weighted sum of ``down(silu(gate(x)) * up(x))`` over the chosen experts of each token.

    Rotated activations are bfloat16, sums float32 (bfloat16 between the projections where experts
    are decoded once).

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
    how = plan(tokens, top_k, gate_up, down, tuning)

    def rotated(matrix: MatrixPlan) -> torch.Tensor:
        return torch.empty(matrix.rotated, dtype=torch.bfloat16, device=x.device)

    hidden = rotated(how.gate_up)
    tiles = prepare(
        expert_index, gate_up.experts, how.block_m, x, gate_up.signs, gate_up.rotation_block,
        hidden,
    )  # fmt: skip
    partial = _multiply(hidden, gate_up, how.gate_up, tiles, top_k, tuning)
    inner = rotated(how.down)
    swiglu_rotate(partial, gate_up.scale, expert_index, down.signs, down.rotation_block, inner)
    partial = _multiply(inner, down, how.down, tiles, 1, tuning)
    combine(partial, down.scale, expert_index, routing, out)
    return out
