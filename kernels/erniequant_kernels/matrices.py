"""What every product with packed weights is given, on any device."""

from collections.abc import Hashable, Mapping
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
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Packed words, scales and signs."""
        return self.packed, self.scale, self.signs

    @property
    def sizes(self) -> tuple[Hashable, ...]:
        """All but the tensors, quick to hash."""
        code = self.code
        return (
            self.packed.shape, code.name, code.register_length, self.tile, self.rotation_block
        )  # fmt: skip

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


@dataclass(frozen=True)
class Wint2Matrices:
    """One projection of all experts, as `erniequant.ccq.decode_wint2` takes it, contiguous:
    ``quant_weight`` uint8 ``[E, K / 4, N]`` and so on."""

    quant_weight: torch.Tensor
    weight_scale: torch.Tensor
    super_scales: torch.Tensor
    code_scale: torch.Tensor
    code_zp: torch.Tensor
    k_order: str

    @classmethod
    def of(cls, parts: Mapping[str, torch.Tensor], k_order: str) -> "Wint2Matrices":
        """From the parts by their names."""
        return cls(
            parts["quant_weight"], parts["weight_scale"], parts["super_scales"],
            parts["code_scale"], parts["code_zp"], k_order,
        )  # fmt: skip

    @property
    def sizes(self) -> tuple[Hashable, ...]:
        """All but the tensors, quick to hash."""
        return self.quant_weight.shape, self.k_order

    @property
    def experts(self) -> int:
        """Number of experts."""
        return self.quant_weight.shape[0]

    @property
    def outputs(self) -> int:
        """N."""
        return self.quant_weight.shape[2]

    @property
    def inputs(self) -> int:
        """K."""
        return 4 * self.quant_weight.shape[1]

    def to(self, device: str) -> "Wint2Matrices":
        """The same on another device."""
        first, second, third, fourth, fifth = (part.to(device) for part in self.parts)
        return Wint2Matrices(first, second, third, fourth, fifth, self.k_order)

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        """The tensors in the order in which `erniequant.ccq.decode_wint2` takes them."""
        return (
            self.quant_weight, self.weight_scale, self.super_scales, self.code_scale, self.code_zp
        )  # fmt: skip
