"""The experts of a layer in Baidu's WINT2 as one operator of torch: kernels on CUDA and on the CPU,
plain torch elsewhere and for what they do not take.

`erniequant::moe_experts_wint2` is opaque to `torch.compile` and, where kernels of a GPU run, can be
captured in a CUDA graph once it has run with the same sizes. It has no gradient.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch

from erniequant.codes.ccq.decode import decode_wint2
from erniequant.packing.products import experts_forward
from erniequant.runtime.ops import takes
from erniequant_kernels.matrices import Wint2Matrices

PARTS = ("quant_weight", "weight_scale", "super_scales", "code_scale", "code_zp")
"""The stored tensors of a projection, in the order in which the operator takes them."""


def _in_plain_torch(
    x: torch.Tensor, expert_index: torch.Tensor, routing: torch.Tensor,
    gate_up: Sequence[torch.Tensor], down: Sequence[torch.Tensor], k_order: str,
) -> torch.Tensor:  # fmt: skip
    """Weighted sum of ``down(silu(gate(x)) * up(x))`` over the chosen experts of each token.

    Args:
        x: ``[T, H]`` of any float type; T may be 0.
        expert_index: integer ``[T, k]``; an index outside ``[0, E)`` contributes nothing.
        routing: float ``[T, k]``.
        gate_up, down: the `PARTS` of all experts, contiguous: uint8 ``[E, K / 4, N]`` and
            ``[E, K / 128, N]``, bfloat16 ``[E, N]``, float32 ``[E, N]`` twice.
        k_order: ``plain`` or ``mma64``, see `erniequant.codes.ccq.order`.

    Returns:
        ``[T, H]`` in the dtype of ``x``, contiguous.
    """
    projections = {"gate_up_proj": gate_up, "down_proj": down}

    def weight(projection: str, expert: int) -> torch.Tensor:
        parts = (part[expert] for part in projections[projection])
        return decode_wint2(*parts, k_order=k_order).T.to(x.dtype)

    return experts_forward(x, expert_index, routing, len(gate_up[0]), weight, "silu")


moe_experts_wint2 = torch.library.custom_op("erniequant::moe_experts_wint2", mutates_args=())(
    _in_plain_torch
)


@moe_experts_wint2.register_fake
def _(x: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@moe_experts_wint2.register_kernel("cuda")
def _on_cuda(
    x: torch.Tensor, expert_index: torch.Tensor, routing: torch.Tensor,
    gate_up: Sequence[torch.Tensor], down: Sequence[torch.Tensor], k_order: str,
) -> torch.Tensor:  # fmt: skip
    run = run_wint2_kernels if takes(x.device, x.dtype) else _in_plain_torch
    return run(x, expert_index, routing, gate_up, down, k_order)


@moe_experts_wint2.register_kernel("cpu")
def _on_cpu(
    x: torch.Tensor, expert_index: torch.Tensor, routing: torch.Tensor,
    gate_up: Sequence[torch.Tensor], down: Sequence[torch.Tensor], k_order: str,
) -> torch.Tensor:  # fmt: skip
    if not takes(x.device, x.dtype):
        return _in_plain_torch(x, expert_index, routing, gate_up, down, k_order)
    from erniequant_kernels.cpu.wint2_moe import moe_experts_wint2_cpu

    first, second = (wint2_matrices(parts, k_order) for parts in (gate_up, down))
    return moe_experts_wint2_cpu(x, expert_index, routing, first, second)


def run_wint2_kernels(
    x: torch.Tensor, expert_index: torch.Tensor, routing: torch.Tensor,
    gate_up: Sequence[torch.Tensor], down: Sequence[torch.Tensor], k_order: str,
    card: torch.device | None = None,
) -> torch.Tensor:  # fmt: skip
    """`moe_experts_wint2` by Triton kernels.

    ``card`` is the device whose tuning to use where tensors have no memory.
    """
    from erniequant_kernels.wint2_moe import moe_experts_wint2
    from erniequant_kernels.wint2_tuning import wint2_tuning_for

    first, second = (wint2_matrices(parts, k_order) for parts in (gate_up, down))
    # Triton launches on the current device, which in a model over several is often another one.
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        return moe_experts_wint2(
            x.contiguous(), expert_index, routing, first, second,
            wint2_tuning_for(card or x.device),
        )  # fmt: skip


def wint2_matrices(parts: Sequence[torch.Tensor], k_order: str) -> Wint2Matrices:
    """A projection of all experts from its `PARTS`."""
    return Wint2Matrices.of(dict(zip(PARTS, parts, strict=True)), k_order)
