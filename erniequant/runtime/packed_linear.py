"""The product with one packed matrix as one operator of torch, for models whose layers are called
one by one: kernels on CUDA and on the CPU, plain torch elsewhere and for what they do not take.

`erniequant::packed_linear` is opaque to `torch.compile` and can be captured in a CUDA graph
once it has run with the same sizes.
"""

from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch.nn import functional

from erniequant.errors import ErnieQuantError
from erniequant.packing.decoding import decode_weight
from erniequant.runtime.decoding import decode_fast
from erniequant.runtime.ops import matrix_text, parse_matrix, takes
from erniequant_kernels.matrices import PackedMatrices

__all__ = ["matrix_text", "packed_linear", "packed_linear_backward", "run_linear_kernels"]


def _in_plain_torch(
    x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, signs: torch.Tensor, spec: str
) -> torch.Tensor:
    """``x @ W.T`` on packed weights.

    Args:
        x: ``[..., K]`` of any float type; may be empty.
        packed, scale: of one matrix as stored (docs/format.md): int32 ``[1, N / tile, K * words]``
            and int16 ``[1, N, 1]``, contiguous.
        signs: the stored signs, int32 ``[1, parts, ceil(K / 32)]``, or one row of them.
        spec: from `matrix_text`.

    Returns:
        ``[..., N]`` in the dtype of ``x``, contiguous.

    Raises:
        ErnieQuantError: there are several matrices, or ``x`` has another number of channels.
    """
    matrix = _matrix(x, packed, scale, signs, spec)
    weight = decode_weight(packed[0], scale[0], _row(signs), parse_matrix(spec)).to(x.dtype)
    return functional.linear(_rows(x), weight).view(*x.shape[:-1], matrix.outputs)


packed_linear = torch.library.custom_op("erniequant::packed_linear", mutates_args=())(
    _in_plain_torch
)


@packed_linear.register_fake
def _(
    x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, signs: torch.Tensor, spec: str
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], _matrix(x, packed, scale, signs, spec).outputs))


@packed_linear.register_kernel("cuda")
def _on_cuda(
    x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, signs: torch.Tensor, spec: str
) -> torch.Tensor:
    if not takes(x.device, x.dtype):
        return _in_plain_torch(x, packed, scale, signs, spec)
    return run_linear_kernels(x, packed, scale, signs, spec)


@packed_linear.register_kernel("cpu")
def _on_cpu(
    x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, signs: torch.Tensor, spec: str
) -> torch.Tensor:
    if not takes(x.device, x.dtype):
        return _in_plain_torch(x, packed, scale, signs, spec)
    from erniequant_kernels.cpu.linear import packed_linear_cpu

    matrix = _matrix(x, packed, scale, signs, spec)
    return packed_linear_cpu(_rows(x), matrix).view(*x.shape[:-1], matrix.outputs)


def run_linear_kernels(
    x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, signs: torch.Tensor, spec: str
) -> torch.Tensor:
    """`packed_linear` by Triton kernels."""
    from erniequant_kernels.linear import packed_linear
    from erniequant_kernels.tuning import tuning_for

    matrix, rows = _matrix(x, packed, scale, signs, spec), _rows(x).contiguous()
    # Triton launches on the current device, which in a model over several is often another one.
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        out = packed_linear(rows, matrix, tuning_for(x.device))
    return out.view(*x.shape[:-1], matrix.outputs)


@torch.library.custom_op("erniequant::packed_linear_backward", mutates_args=())
def packed_linear_backward(
    grad: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, signs: torch.Tensor, spec: str
) -> torch.Tensor:
    """The gradient of `packed_linear` for ``x``, in plain torch everywhere: ``[..., K]``,
    contiguous.

    grad: ``[..., N]``, of the output; the rest as in `packed_linear`.
    """
    weight = decode_fast(packed[0], scale[0], _row(signs), parse_matrix(spec)).to(grad.dtype)
    return (_rows(grad) @ weight).view(*grad.shape[:-1], weight.shape[1])


@packed_linear_backward.register_fake
def _(
    grad: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, signs: torch.Tensor, spec: str
) -> torch.Tensor:
    inputs = PackedMatrices(packed, scale, signs, *_coding(spec)).inputs
    return grad.new_empty((*grad.shape[:-1], inputs))


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, *tensors, ctx.spec = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return packed_linear_backward(grad, *ctx.saved_tensors, ctx.spec), None, None, None, None


packed_linear.register_autograd(_gradient, setup_context=_keep_inputs)


def _matrix(
    x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, signs: torch.Tensor, spec: str
) -> PackedMatrices:
    matrix = PackedMatrices(packed, scale, signs, *_coding(spec))
    if matrix.experts != 1:
        raise ErnieQuantError(f"packed_linear takes one matrix, not {matrix.experts}")
    if x.shape[-1] != matrix.inputs:
        raise ErnieQuantError(
            f"packed_linear: the matrix has {matrix.inputs} inputs, x has {x.shape[-1]} channels"
        )
    return matrix


@cache
def _coding(spec: str) -> tuple[Any, ...]:
    """Code, tile and rotation block."""
    matrix = parse_matrix(spec)
    return matrix.conv(), matrix.tile, matrix.rotation_block


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


def _row(signs: torch.Tensor) -> torch.Tensor:
    return signs.reshape(-1, signs.shape[-1])[0]
