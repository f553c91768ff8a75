"""Say what a checkpoint holds, from headers alone: tensors, codes, sizes, bits per weight,
origin."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from erniequant.checkpoint.adapters import adapter_problem
from erniequant.checkpoint.folder import REPORT_FILE
from erniequant.checkpoint.reader import Checkpoint, open_checkpoint, read_json
from erniequant.packing.header_check import (
    QuantizedExperts,
    is_dense,
    kept_names,
    sound_if_quantized,
)
from erniequant.packing.schema import PROJECTIONS, SUFFIXES, layer_key_of

_GUARD_CODE = "guard"
# Entries of the report that say where the weights come from; the rest is about their quality.
_PROVENANCE = ("bits", "effort", "seed", "calibration", "seconds", "degraded")


@dataclass(frozen=True)
class TensorSummary:
    """One stored tensor.

    ``code`` names code and register length of a quantised one ("cc2/12"), is "guard" for a guard,
    and None for a tensor that was kept as it is.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    n_bytes: int
    shard: str
    code: str | None

    @property
    def quantized(self) -> bool:
        """Whether it holds part of quantised weights."""
        return self.code not in (None, _GUARD_CODE)


@dataclass(frozen=True)
class ModelSummary:
    """A checkpoint at a glance. Bits per weight count every stored byte, scales and signs included.

    ``codes`` counts layers by description of their code; ``expert_weights`` are routed experts,
    in a dense model the MLPs, whether quantised or not. ``notes`` tell of what else in the folder
    keeps it from being loaded as it is.
    """

    folder: str
    model_type: str
    format_version: int | None
    producer: str | None
    quantized_layers: tuple[str, ...]
    codes: dict[str, int]
    expert_weights: int
    expert_bytes: int
    total_weights: int
    total_bytes: int
    provenance: dict[str, Any]
    tensors: tuple[TensorSummary, ...]
    notes: tuple[str, ...] = ()

    @property
    def expert_bits_per_weight(self) -> float:
        """Stored bits of routed experts by their number of weights; 0 without experts."""
        return 8 * self.expert_bytes / self.expert_weights if self.expert_weights else 0.0

    @property
    def total_bits_per_weight(self) -> float:
        """Stored bits of everything by the number of weights of the original."""
        return 8 * self.total_bytes / self.total_weights if self.total_weights else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        found = asdict(self)
        for entry, tensor in zip(found["tensors"], self.tensors, strict=True):
            entry["quantized"] = tensor.quantized
        found["bits_per_weight"] = {
            "experts": self.expert_bits_per_weight,
            "total": self.total_bits_per_weight,
        }
        found["gigabytes"] = self.total_bytes / 1e9
        return found


def inspect(source: str | Path) -> ModelSummary:
    """Summary of a quantised or plain checkpoint, given by folder or Hugging Face id.

    Raises:
        ErnieQuantError: it cannot be read, or contradicts its own quantization_config.
    """
    checkpoint = open_checkpoint(source)
    check = sound_if_quantized(checkpoint)
    layers = check.layers if check else ()
    by_key = {layer.key: layer for layer in layers}
    names = sorted(checkpoint.names(), key=_natural)
    tensors = tuple(_summary(checkpoint, name, by_key) for name in names)
    decoded = sum(3 * la.experts * la.hidden * la.inner for la in layers)
    kept_weights = {
        name: checkpoint.headers[name].elements for name in kept_names(checkpoint, layers)
    }
    dense = is_dense(checkpoint.config)
    expert_names = {name for name in names if layer_key_of(name, dense) is not None}
    codes: dict[str, int] = {}
    for layer in layers:
        for projection in PROJECTIONS:
            key = f"{projection}: {describe_code(layer, projection)}"
            codes[key] = codes.get(key, 0) + 1
    return ModelSummary(
        folder=str(checkpoint.folder),
        model_type=str(checkpoint.config.get("model_type")),
        format_version=checkpoint.config["quantization_config"]["format_version"]
        if check
        else None,
        producer=check.metadata.producer if check else None,
        quantized_layers=tuple(by_key),
        codes=codes,
        expert_weights=decoded + sum(n for name, n in kept_weights.items() if name in expert_names),
        expert_bytes=sum(checkpoint.headers[name].n_bytes for name in expert_names),
        total_weights=decoded + sum(kept_weights.values()),
        total_bytes=checkpoint.total_bytes,
        provenance=provenance(checkpoint.folder),
        tensors=tensors,
        notes=folder_notes(checkpoint.folder),
    )


def describe_code(layer: QuantizedExperts, projection: str) -> str:
    """Code of a projection in a few words: ``cc2, register 12, tile 256, rotation 128``."""
    spec = layer.spec.projection(projection)
    return (
        f"{spec.code}, register {spec.register_length}, tile {spec.tile}, "
        f"rotation {spec.rotation_block}"
    )


def _summary(
    checkpoint: Checkpoint, name: str, layers: Mapping[str, QuantizedExperts]
) -> TensorSummary:
    header = checkpoint.headers[name]
    layer = layers.get(layer_key_of(name, is_dense(checkpoint.config)) or "")
    code = None
    if layer is not None:
        code = _GUARD_CODE
        for projection in PROJECTIONS:
            if name in {layer.name(projection, suffix) for suffix in SUFFIXES}:
                spec = layer.spec.projection(projection)
                code = f"{spec.code}/{spec.register_length}"
    return TensorSummary(
        name, header.shape, header.stored_dtype, header.n_bytes, header.shard, code
    )


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    return [
        (int(part), "") if part.isascii() and part.isdigit() else (0, part)
        for part in name.split(".")
    ]


def folder_notes(folder: Path) -> tuple[str, ...]:
    """A line for everything beside the weights that `erniequant.load` refuses."""
    problem = adapter_problem(folder)
    return () if problem is None else (problem,)


def provenance(folder: Path) -> dict[str, Any]:
    """What the report beside the weights says of where they come from; empty without one."""
    path = folder / REPORT_FILE
    if not path.is_file():
        return {}
    report = read_json(path)
    return {name: report[name] for name in _PROVENANCE if name in report}
