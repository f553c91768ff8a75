"""Our own layout as a result of `erniequant.quantize`; docs/format.md says what its tensors are."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

from erniequant.checkpoint.layout import OutputTensor, PlannedShard, plan_shards
from erniequant.checkpoint.reader import Checkpoint
from erniequant.checkpoint.shards import ShardFiles
from erniequant.encoding.matrix import MatrixQuantizer, Rotation, TrellisQuantizer
from erniequant.formats.base import OutputFormat, TensorSlot
from erniequant.formats.native.search import encoder_of
from erniequant.formats.native.specs import Specs, packed_prefix
from erniequant.formats.plan import Plan
from erniequant.models.architecture import ExpertGroup
from erniequant.models.registry import require_family, with_stock_class
from erniequant.packing.layer_keys import guard_name
from erniequant.packing.rotation import pack_signs, random_signs
from erniequant.packing.schema import PROJECTIONS, QuantizationMetadata, guard_tensor
from erniequant.version import PRODUCER


class NativeOutput(OutputFormat):
    """Experts of a layer in one tensor for each projection and part; everything else is a copy."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, specs: Specs):
        self._checkpoint, self._sizes, self._plan = checkpoint, plan.model, plan
        self._specs = specs
        self._shapes = {tensor.name: tensor.shape for tensor in plan.packed}

    def shards(self, max_bytes: int) -> tuple[PlannedShard, ...]:
        """Copied tensors come first, then layer after layer."""
        copied = (OutputTensor.copy_of(self._checkpoint.header(n)) for n in self._plan.copied)
        return plan_shards([*copied, *self._plan.packed], max_bytes)

    def kept(self) -> frozenset[str]:
        return frozenset(self._plan.copied)

    def write_kept(self, shards: ShardFiles, but: Collection[str] = ()) -> None:
        for name in self._plan.copied:
            if name not in but and not shards.finished(shards.shard_of(name)):
                shards.copy(name, self._checkpoint)

    def stored(self, trained: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict(trained)

    def tensors_of(self, layer: int) -> frozenset[str]:
        prefixes = tuple(packed_prefix(group.layer_key(layer)) for group in self._sizes.groups)
        return frozenset(name for name in self._shapes if name.startswith(prefixes))

    def quantizers(self, layer: int, group: ExpertGroup) -> dict[str, MatrixQuantizer]:
        return dict(self._trellises(layer, group))

    def write_shared(self, layer: int, group: ExpertGroup, shards: ShardFiles) -> None:
        """The guard, and the signs of both rotations."""
        key = group.layer_key(layer)
        prefix = packed_prefix(key)
        shards.write(prefix + guard_name(key), guard_tensor())
        for name, quantizer in self._trellises(layer, group):
            parts = 2 if name == "gate_up_proj" else 1
            signs = pack_signs(quantizer.rotation.signs)
            shards.write(f"{prefix}{name}_signs", signs.expand(1, parts, -1))

    def places(self, layer: int, expert: int, projection: str) -> dict[str, TensorSlot]:
        group = self._sizes.group_of(expert)
        prefix = packed_prefix(group.layer_key(layer)) + projection
        return {
            suffix: TensorSlot(
                f"{prefix}_{suffix}",
                expert - group.first,
                self._shapes[f"{prefix}_{suffix}"][1:],
                dtype,
            )
            for suffix, dtype in (("packed", torch.int32), ("scale", torch.int16))
        }

    def config(self) -> dict[str, Any]:
        layers = {
            group.layer_key(index): self._specs[group.name]
            for index in self._sizes.moe_layers
            for group in self._sizes.groups
        }
        config = self._checkpoint.config
        translated = require_family(config).in_terms_of_transformers(config)
        settings = dict(with_stock_class(translated))
        settings["quantization_config"] = QuantizationMetadata(layers, PRODUCER).to_dict()
        return settings

    def _trellises(self, layer: int, group: ExpertGroup) -> Iterator[tuple[str, TrellisQuantizer]]:
        spec, group_index = self._specs[group.name], self._sizes.groups.index(group)
        inputs = {"gate_up_proj": self._sizes.hidden, "down_proj": group.inner}
        for projection, name in enumerate(PROJECTIONS):
            seed = (
                (self._plan.options.seed * 1_000_003 + layer) * 2 + projection + group_index * 2**40
            )
            signs = random_signs(inputs[name], torch.Generator().manual_seed(seed))
            matrix = spec.projection(name)
            yield (
                name,
                TrellisQuantizer(
                    matrix,
                    Rotation(signs, matrix.rotation_block),
                    encoder_of(self._plan.options.search),
                ),
            )
