"""Say what a checkpoint holds, from headers alone: tensors, codes, sizes, bits per weight,
origin."""

from collections.abc import Mapping
from pathlib import Path

from erniequant.checkpoint.reader import Checkpoint, open_checkpoint
from erniequant.formats.folder_checks import folder_notes, provenance
from erniequant.formats.results import GUARD_CODE, ModelSummary, TensorSummary
from erniequant.models.header_check import is_dense, kept_names, sound_if_quantized
from erniequant.packing.experts import QuantizedExperts
from erniequant.packing.layer_keys import layer_key_of
from erniequant.packing.schema import PROJECTIONS, SUFFIXES


def inspect_native(source: str | Path) -> ModelSummary:
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
        code = GUARD_CODE
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
