"""What every product with packed weights is given, on any device."""

from dataclasses import dataclass

import torch

from erniequant.codes.spec import ConvolutionalCode


@dataclass(frozen=True)
class PackedMatrices:
    """One projection of all experts, as stored (docs/format.md).

    Attributes:
        packed: int32 ``[E, N / tile, K * words]``, contiguous.
        scale: int16 ``[E, N, 1]``.
        signs: int32 ``[ceil(K / 32)]``.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    signs: torch.Tensor
    code: ConvolutionalCode
    tile: int
    rotation_block: int

    @property
    def experts(self) -> int:
        """Number of experts."""
        return self.packed.shape[0]

    @property
    def outputs(self) -> int:
        """N."""
        return self.packed.shape[1] * self.tile

    @property
    def inputs(self) -> int:
        """K."""
        return self.packed.shape[2] // self.code.words_per_sequence(self.tile)
