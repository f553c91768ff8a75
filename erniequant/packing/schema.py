"""Names, shapes, dtypes and metadata of the on-disk format; docs/format.md specifies it.

A quantised checkpoint is described by the `quantization_config` of its config.json. Parsing is
strict: this version refuses anything that it cannot decode exactly, and names the layer. The MLP of
a dense model is stored as one expert.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from erniequant.codes import ConvolutionalCode, get_code
from erniequant.errors import ErnieQuantError
from erniequant.packing.layer_keys import GUARD, is_dense_key, is_layer_key

FORMAT_VERSION = 1
DENSE_FORMAT_VERSION = 2
"""Adds the MLPs of dense models; checkpoints without them stay at `FORMAT_VERSION`."""

QUANT_METHOD = "erniequant"
PROJECTIONS = ("gate_up_proj", "down_proj")
SUFFIXES = ("packed", "scale", "signs")

TILES = (32, 64, 128, 256)
MAX_ROTATION_BLOCK = 128
SIGN_BITS = 32

TensorInfo = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a tensor."""


@dataclass(frozen=True)
class MatrixSpec:
    """The coding of all matrices of one projection of one layer."""

    code: str
    register_length: int
    tile: int
    rotation_block: int

    def conv(self) -> ConvolutionalCode:
        """The code itself. Raises ErnieQuantError if this version does not have it."""
        return get_code(self.code, self.register_length)

    def check(self, outputs: int, inputs: int, where: str) -> None:
        """Refuse a spec that does not fit ``outputs`` x ``inputs``; ``where`` names the matrix."""
        if outputs % self.tile:
            raise ErnieQuantError(f"{where}: tile {self.tile} does not divide {outputs} outputs")
        if inputs % self.rotation_block:
            raise ErnieQuantError(
                f"{where}: rotation_block {self.rotation_block} does not divide {inputs} inputs"
            )


@dataclass(frozen=True)
class LayerSpec:
    """The two projections of the experts of one layer."""

    gate_up_proj: MatrixSpec
    down_proj: MatrixSpec

    def projection(self, name: str) -> MatrixSpec:
        """The spec of one of `PROJECTIONS`."""
        return self.gate_up_proj if name == "gate_up_proj" else self.down_proj


@dataclass(frozen=True)
class QuantizationMetadata:
    """Contents of `quantization_config`.

    ``layers`` is keyed by the layer index as text, for vision-language models followed by
    ``.text_moe`` or ``.vision_moe``, for dense models by ``.mlp``; other layers are stored as in
    the original checkpoint. ``producer``: name and version of the program that wrote it.
    """

    layers: Mapping[str, LayerSpec]
    producer: str = ""

    @property
    def format_version(self) -> int:
        """The first version that can describe these layers."""
        return DENSE_FORMAT_VERSION if any(map(is_dense_key, self.layers)) else FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; `from_dict` reads it back."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": self.format_version,
            "producer": _producer_mapping(self.producer),
            "layers": {key: asdict(layer) for key, layer in self.layers.items()},
        }

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "QuantizationMetadata":
        """Parse a `quantization_config`.

        Raises:
            ErnieQuantError: another method or version, or an entry this version cannot decode.
        """
        method = settings.get("quant_method")
        if method != QUANT_METHOD:
            raise ErnieQuantError(
                f"quantization_config has quant_method {method!r}, expected {QUANT_METHOD!r}"
            )
        version = settings.get("format_version")
        readable = (FORMAT_VERSION, DENSE_FORMAT_VERSION)
        if version not in readable or isinstance(version, bool):
            raise ErnieQuantError(
                f"quantization_config has format_version {version!r}, this erniequant reads "
                f"{' and '.join(map(str, readable))}; use the erniequant version that wrote it or "
                "a newer one"
            )
        layers = settings.get("layers")
        if not isinstance(layers, Mapping) or not layers:
            raise ErnieQuantError("quantization_config has no layers; the config.json is damaged")
        parsed = {str(key): _parse_layer(str(key), value) for key, value in layers.items()}
        metadata = cls(parsed, _producer_text(settings.get("producer", "")))
        if version < metadata.format_version:
            key = next(filter(is_dense_key, parsed))
            raise ErnieQuantError(
                f"quantization_config has format_version {version}, but layer {key} needs "
                f"{metadata.format_version}; the config.json is damaged"
            )
        return metadata


def _producer_mapping(producer: str) -> dict[str, str]:
    """vLLM asks the mapping for a name; versions up to 0.1.0 wrote the text itself."""
    name, _, version = producer.partition(" ")
    return {"name": name, "version": version} if version else {"name": name}


def _producer_text(producer: Any) -> str:
    if isinstance(producer, Mapping):
        return " ".join(str(producer[key]) for key in ("name", "version") if key in producer)
    return str(producer)


def _parse_layer(key: str, value: Any) -> LayerSpec:
    where = f"quantization_config layer {key}"
    if not is_layer_key(key):
        raise ErnieQuantError(f"{where}: not a layer index")
    if not isinstance(value, Mapping) or set(value) != set(PROJECTIONS):
        given = ", ".join(map(str, value)) if isinstance(value, Mapping) else repr(value)
        raise ErnieQuantError(f"{where}: expected {' and '.join(PROJECTIONS)}, found {given}")
    return LayerSpec(*(_parse_matrix(f"{where} {name}", value[name]) for name in PROJECTIONS))


def _parse_matrix(where: str, value: Any) -> MatrixSpec:
    fields = list(MatrixSpec.__dataclass_fields__)
    if not isinstance(value, Mapping) or set(value) != set(fields):
        # An entry that this version does not know may change what the words mean.
        given = ", ".join(map(str, value)) if isinstance(value, Mapping) else repr(value)
        raise ErnieQuantError(f"{where}: expected {', '.join(fields)}, found {given}")
    if not isinstance(value["code"], str):
        raise ErnieQuantError(f"{where}: code {value['code']!r} is not a name")
    for name in fields[1:]:
        if not isinstance(value[name], int) or isinstance(value[name], bool):
            raise ErnieQuantError(f"{where}: {name} {value[name]!r} is not an integer")
    spec = MatrixSpec(**value)
    if spec.tile not in TILES:
        tiles = ", ".join(map(str, TILES))
        raise ErnieQuantError(f"{where}: tile {spec.tile} is not one of {tiles}")
    block = spec.rotation_block
    if not 1 <= block <= MAX_ROTATION_BLOCK or block & (block - 1):
        raise ErnieQuantError(
            f"{where}: rotation_block {block} is not a power of two up to {MAX_ROTATION_BLOCK}"
        )
    try:
        spec.conv()
    except ErnieQuantError as error:
        raise ErnieQuantError(f"{where}: {error}") from error
    return spec


def param_info(
    experts: int, outputs: int, inputs: int, spec: MatrixSpec, *, parts: int = 1
) -> dict[str, TensorInfo]:
    """Shapes and dtypes of the tensors of one projection, by suffix.

    parts: how many stock matrices are stacked in it, 2 for gate_up_proj; the signs are repeated
    that often so that loaders which cut fused tensors in two find them in both halves.

    ``packed`` int32 ``[E, N / tile, K * words]``, ``scale`` int16 ``[E, N, 1]`` (bfloat16 bit
    patterns), ``signs`` int32 ``[1, parts, ceil(K / 32)]``, shared by all experts.
    """
    words = spec.conv().words_per_sequence(spec.tile)
    return {
        "packed": ((experts, outputs // spec.tile, inputs * words), torch.int32),
        "scale": ((experts, outputs, 1), torch.int16),
        "signs": ((1, parts, -(-inputs // SIGN_BITS)), torch.int32),
    }


def matrix_shapes(hidden: int, inner: int) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of each projection."""
    return {"gate_up_proj": (2 * inner, hidden), "down_proj": (hidden, inner)}


def layer_params(
    experts: int,
    hidden: int,
    inner: int,
    layer: LayerSpec,
    where: str = "experts",
    *,
    guard: str = GUARD,
) -> dict[str, TensorInfo]:
    """Shapes and dtypes of all tensors of a layer's experts, by name after the prefix.

    The guard is among them, under the name that `guard_name` gives. An MLP is one expert.

    Raises:
        ErnieQuantError: a tile or block does not fit the sizes; ``where`` names the layer.
    """
    params: dict[str, TensorInfo] = {guard: ((1,), torch.bfloat16)}
    for name, (outputs, inputs) in matrix_shapes(hidden, inner).items():
        spec, parts = layer.projection(name), 2 if name == "gate_up_proj" else 1
        # No sequence may cross from gate to up: each half is a whole number of tiles.
        spec.check(outputs // parts, inputs, f"{where} {name}")
        info = param_info(experts, outputs, inputs, spec, parts=parts)
        params |= {f"{name}_{suffix}": value for suffix, value in info.items()}
    return params


def tile_size(outputs: int, what: str) -> int:
    """The largest power of two from 32 to 256 that divides ``outputs``.

    Raises:
        ErnieQuantError: there is none; ``what`` names the size.
    """
    tile = min(outputs & -outputs, TILES[-1])
    if tile < TILES[0]:
        raise ErnieQuantError(
            f"{what}, {outputs}, is not a multiple of {TILES[0]}; try a smaller --max-tp"
        )
    return tile


def guard_tensor() -> torch.Tensor:
    """The guard as it is written: bfloat16 ``[1]``, zero."""
    return torch.zeros(1, dtype=torch.bfloat16)
