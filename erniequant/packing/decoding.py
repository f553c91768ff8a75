"""From stored tensors to weights: labels, times the channel scale, rotated back."""

from collections.abc import Callable, Iterator

import torch

from erniequant.checkpoint.reader import Checkpoint
from erniequant.codes.reference import decode as decode_labels
from erniequant.packing.experts import QuantizedExperts
from erniequant.packing.rotation import unpack_signs, unrotate
from erniequant.packing.schema import PROJECTIONS, MatrixSpec


def decode_scale(pattern: torch.Tensor) -> torch.Tensor:
    """Stored scales to numbers: int16 bfloat16 patterns ``[...]`` to float32 ``[...]``."""
    return pattern.view(torch.bfloat16).float()


def encode_scale(scale: torch.Tensor) -> torch.Tensor:
    """Scales as they are stored: rounded to bfloat16, its bit pattern as int16."""
    return scale.to(torch.bfloat16).view(torch.int16)


def decode_weight(
    packed: torch.Tensor, scale: torch.Tensor, signs: torch.Tensor, spec: MatrixSpec
) -> torch.Tensor:
    """Weights of one or more experts in the orientation of ``nn.Linear``.

    Args:
        packed: int32 ``[..., N / tile, K * words]``.
        scale: int16 ``[..., N, 1]``.
        signs: int32 ``[ceil(K / 32)]``, one row of the stored tensor.

    Returns:
        float32 ``[..., N, K]``.
    """
    code = spec.conv()
    inputs = packed.shape[-1] // code.words_per_sequence(spec.tile)
    rotated = decode_labels(packed, code, spec.tile) * decode_scale(scale)
    return unrotate(rotated, unpack_signs(signs, inputs), spec.rotation_block)


Decode = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, MatrixSpec], torch.Tensor]
"""`decode_weight`, or a faster way to the same bits."""


def expert_matrices(
    source: Checkpoint, layer: QuantizedExperts, decode: Decode = decode_weight
) -> Iterator[tuple[str, torch.Tensor]]:
    """Decoded matrices of a layer, float32 ``[N, K]``, under the original checkpoint's names; one
    expert is in memory at a time."""
    for projection in PROJECTIONS:
        signs = source.tensor(layer.name(projection, "signs"))[0, 0]
        spec = layer.spec.projection(projection)
        for expert in range(layer.experts):
            packed, scale = (
                source.rows(layer.name(projection, suffix), expert, expert + 1)[0]
                for suffix in ("packed", "scale")
            )
            weight = decode(packed, scale, signs, spec)
            if projection == "gate_up_proj":
                gate, up = weight.chunk(2)
                yield layer.original_name(expert, "gate_proj"), gate
                yield layer.original_name(expert, "up_proj"), up
            else:
                yield layer.original_name(expert, "down_proj"), weight
