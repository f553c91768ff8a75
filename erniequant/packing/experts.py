"""The packed experts that a checkpoint holds, as its headers and config.json describe them."""

from dataclasses import dataclass
from typing import Any

from erniequant.packing.layer_keys import slot_of
from erniequant.packing.schema import QUANT_METHOD, LayerSpec, QuantizationMetadata


@dataclass(frozen=True)
class QuantizedExperts:
    """The experts of a layer: sizes, codes, and the prefix of their tensors, ending in a dot.

    The MLP of a dense model is one expert. In the original checkpoint, ``matrix_pattern`` names a
    matrix within its layer, as the family of the model says, and ``first`` is the number of the
    first of these experts.
    """

    key: str
    prefix: str
    experts: int
    hidden: int
    inner: int
    spec: LayerSpec
    matrix_pattern: str
    first: int = 0

    def name(self, projection: str, suffix: str) -> str:
        """Name of one stored tensor."""
        return f"{self.prefix}{projection}_{suffix}"

    def original_name(self, expert: int, matrix: str) -> str:
        """Name of a matrix ("gate_proj", "up_proj", "down_proj") in the original checkpoint."""
        layer = self.prefix.removesuffix(f"{slot_of(self.key).module}.")
        return layer + self.matrix_pattern.format(expert=self.first + expert, matrix=matrix)


@dataclass(frozen=True)
class HeaderCheck:
    """The contents that a checkpoint declares, and everything that contradicts them (one line
    each)."""

    metadata: QuantizationMetadata
    layers: tuple[QuantizedExperts, ...]
    problems: tuple[str, ...]


def is_quantized(config: dict[str, Any]) -> bool:
    """True if a config.json describes a checkpoint of this format, of any version."""
    settings = config.get("quantization_config")
    return isinstance(settings, dict) and settings.get("quant_method") == QUANT_METHOD
