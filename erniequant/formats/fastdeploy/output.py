"""The layout of FastDeploy as a result of `erniequant.quantize`: every expert's matrix has keys of
its own, in WINT2 or wint4, and everything else becomes wint8 or is converted.

docs/fastdeploy.md says what the keys are.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from erniequant.checkpoint.layout import OutputTensor, PlannedShard
from erniequant.checkpoint.overlay import Overlay
from erniequant.checkpoint.reader import Checkpoint
from erniequant.checkpoint.shards import ShardFiles
from erniequant.codes.ccq.decode import decode_wint2
from erniequant.encoding.matrix import MatrixQuantizer, QuantizedMatrix
from erniequant.errors import ErnieQuantError
from erniequant.formats.base import OutputFormat, TensorSlot
from erniequant.formats.fastdeploy.ccq.encode import encode_matrix, relative_error
from erniequant.formats.fastdeploy.config import DEFAULT_K_ORDER, choose_k_order, fastdeploy_config
from erniequant.formats.fastdeploy.names import (
    WINT2_SUFFIXES,
    Matrix,
    Part,
    parts_of,
    rank_keys,
)
from erniequant.formats.fastdeploy.packers import WINT4
from erniequant.formats.fastdeploy.sizes import (
    NO_WINT4,
    FastDeployModel,
    fastdeploy_model,
    text_moe_of,
)
from erniequant.formats.fastdeploy.wint4 import quantize_wint4
from erniequant.formats.fastdeploy.writer import planned_shards, source_names, tensors_of
from erniequant.formats.plan import Plan, PlanWording, QuantizeOptions, make_plan
from erniequant.models.architecture import Architecture, ExpertGroup

WINT4_SHARE = 4 / 51
"""Default share of 4-bit layers among those with experts: as in Baidu's 300B, where these are
layers 3 to 6 of 3 to 53."""

# FastDeploy's projections by their names in the rest of the library.
_LEAVE_OUT = "; leave out --format"
_PROJECTIONS = {"gate_up_proj": "up_gate_proj", "down_proj": "down_proj"}


@dataclass(frozen=True)
class Wint2Quantizer:
    """WINT2, with the code books and scales of `erniequant.ccq`."""

    inputs: int
    k_order: str

    def quantize(
        self, weight: torch.Tensor, hessian: torch.Tensor, importance: torch.Tensor
    ) -> QuantizedMatrix:
        """See `MatrixQuantizer`; outputs share nothing, so ``importance`` changes nothing."""
        encoded = encode_matrix(weight, hessian, k_order=self.k_order)
        return QuantizedMatrix(
            encoded.tensors(), encoded.effective, encoded.error, encoded.damping, encoded.fallback
        )

    def decode(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See `MatrixQuantizer`."""
        stored = (parts[suffix] for suffix in WINT2_SUFFIXES)
        return decode_wint2(*stored, k_order=self.k_order).T.contiguous()

    def rescaled(
        self, parts: Mapping[str, torch.Tensor], factors: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """See `MatrixQuantizer`."""
        return {"super_scales": _times(parts["super_scales"], factors)}


@dataclass(frozen=True)
class Wint4Quantizer:
    """wint4 with error feedback."""

    inputs: int

    def quantize(
        self, weight: torch.Tensor, hessian: torch.Tensor, importance: torch.Tensor
    ) -> QuantizedMatrix:
        """See `MatrixQuantizer`; outputs share nothing, so ``importance`` changes nothing."""
        parts = quantize_wint4(weight, hessian).tensors()
        effective = self.decode(parts)
        return QuantizedMatrix(
            parts, effective, relative_error(weight, effective, hessian), 0.0, None
        )

    def decode(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See `MatrixQuantizer`."""
        return WINT4.dequantize(parts["quant_weight"], parts["weight_scale"]).T.contiguous()

    def rescaled(
        self, parts: Mapping[str, torch.Tensor], factors: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """See `MatrixQuantizer`."""
        return {"weight_scale": _times(parts["weight_scale"], factors)}


def _times(scale: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Scales ``[N]`` times factors, in their own dtype."""
    return (scale.float() * factors).to(scale.dtype)


class FastDeployOutput(OutputFormat):
    """A checkpoint for one rank; `export` cuts it for more."""

    def __init__(
        self, checkpoint: Checkpoint, model: Architecture, w4_end_layer: int, k_order: str
    ):
        """Raises ErnieQuantError for a model that FastDeploy cannot serve so."""
        self._architecture = text_moe_of(model, _LEAVE_OUT)
        self._checkpoint, self._k_order = checkpoint, k_order
        self._model = fastdeploy_model(self._architecture, w4_end_layer)
        self._kept: list[Part] = []
        self._experts: dict[tuple[int, int, str], Matrix] = {}
        for part in parts_of(self._model):
            if isinstance(part, Matrix) and part.expert is not None:
                self._experts[part.expert] = part
            else:
                self._kept.append(part)

    @property
    def model(self) -> FastDeployModel:
        """Sizes as FastDeploy sees them."""
        return self._model

    def shards(self, max_bytes: int) -> tuple[PlannedShard, ...]:
        return planned_shards(self._model, self._k_order, max_bytes)

    def kept(self) -> frozenset[str]:
        return frozenset(key for part in self._kept for key in part.key_names())

    def write_kept(self, shards: ShardFiles, but: Collection[str] = ()) -> None:
        for part in self._kept:
            keys = [
                key
                for key in part.key_names()
                if key not in but and not shards.finished(shards.shard_of(key))
            ]
            if keys:
                (tensors,) = tensors_of(part, self._checkpoint, _no_experts, 1)
                for key in keys:
                    shards.write(key, tensors[key])

    def stored(self, trained: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        source = Overlay(self._checkpoint, trained)
        found: dict[str, torch.Tensor] = {}
        for part in self._kept:
            if trained.keys() & set(source_names(part, source)):
                (tensors,) = tensors_of(part, source, _no_experts, 1)
                found |= tensors
        return found

    def tensors_of(self, layer: int) -> frozenset[str]:
        return frozenset(
            key
            for (index, _, _), part in self._experts.items()
            if index == layer
            for key in part.key_names()
        )

    def quantizers(self, layer: int, group: ExpertGroup) -> dict[str, MatrixQuantizer]:
        by_projection: dict[str, MatrixQuantizer] = {}
        for ours, theirs in _PROJECTIONS.items():
            part = self._experts[layer, group.first, theirs]
            by_projection[ours] = (
                Wint4Quantizer(part.inputs)
                if part.format == "wint4"
                else Wint2Quantizer(part.inputs, self._k_order)
            )
        return by_projection

    def write_shared(self, layer: int, group: ExpertGroup, shards: ShardFiles) -> None:
        """Experts share nothing."""

    def places(self, layer: int, expert: int, projection: str) -> dict[str, TensorSlot]:
        part = self._experts[layer, expert, _PROJECTIONS[projection]]
        return {
            suffix: TensorSlot(f"{part.prefix}.{suffix}", None, shape, dtype)
            for suffix, (shape, dtype) in part.keys(1).items()
        }

    def config(self) -> dict[str, Any]:
        return fastdeploy_config(
            self._checkpoint.config, self._architecture, self._model, self._k_order
        )

    def packed(self) -> tuple[OutputTensor, ...]:
        """The tensors of all experts."""
        kept = self.kept()
        return tuple(
            OutputTensor.of(key, *info)
            for key, info in rank_keys(self._model).items()
            if key not in kept
        )

    def settings(self) -> dict[str, Any]:
        """The codes as JSON."""
        layers = self._model.moe_layers
        wint4 = [i for i in layers if self._model.expert_format(i) == "wint4"]
        return {
            "format": "fastdeploy-wint2",
            "k_order": self._k_order,
            "wint4_layers": wint4,
            "wint2_layers": [i for i in layers if i not in wint4],
        }


def fastdeploy_output(
    checkpoint: Checkpoint, model: Architecture, options: QuantizeOptions
) -> tuple[FastDeployOutput, Plan]:
    """The layout of a result for FastDeploy, and the plan for it.

    Raises:
        ErnieQuantError: a tensor of the source is missing or unknown, or FastDeploy cannot serve
            the model so.
    """
    text_moe_of(model, _LEAVE_OUT)
    made: list[FastDeployOutput] = []

    def contents(
        copied: tuple[str, ...],
    ) -> tuple[tuple[OutputTensor, ...], int, Mapping[str, Any], PlanWording]:
        output = _layout(checkpoint, model, options)
        made.append(output)
        kept = output.kept()
        others = [OutputTensor.of(k, *i) for k, i in rank_keys(output.model).items() if k in kept]
        settings = output.settings()
        codes = tuple(f"{name}: {value}" for name, value in settings.items())
        wording = PlanWording(
            codes, "convert", "to wint8 and as FastDeploy has them", "are left out"
        )
        return output.packed(), sum(tensor.n_bytes for tensor in others), settings, wording

    # Its own ranks are cut from the result, which the native codes have no part in.
    plan = make_plan(checkpoint, model, replace(options, max_tp=1), contents)
    return made[0], plan


def _layout(
    checkpoint: Checkpoint, model: Architecture, options: QuantizeOptions
) -> FastDeployOutput:
    moe_layers, wanted = model.sizes.moe_layers, options.own.get("w4_layers")
    count = round(len(moe_layers) * WINT4_SHARE) if wanted is None else wanted
    if not 0 <= count <= len(moe_layers):
        raise ErnieQuantError(f"w4-layers {count} of {len(moe_layers)} layers with experts")
    end = moe_layers[count - 1] if count else NO_WINT4
    k_order = choose_k_order(None, options.own.get("k_order")) or DEFAULT_K_ORDER
    return FastDeployOutput(checkpoint, model, end, k_order)


def _no_experts(layer: int, expert: int, projection: str) -> dict[str, torch.Tensor]:
    raise AssertionError("experts are written as they are quantised")
