"""Decoding weights as fast as the device can, to the same bits everywhere."""

import torch

from erniequant.packing.decoding import decode_weight
from erniequant.packing.schema import MatrixSpec


def decode_fast(
    packed: torch.Tensor, scale: torch.Tensor, signs: torch.Tensor, spec: MatrixSpec
) -> torch.Tensor:
    """`decode_weight` of one matrix, by compiled code on the CPU and in plain torch elsewhere."""
    if packed.device.type != "cpu":
        return decode_weight(packed, scale, signs, spec)
    from erniequant_kernels.cpu.expand import decode_weight_cpu

    return decode_weight_cpu(packed, scale, signs, spec.conv(), spec.tile, spec.rotation_block)
