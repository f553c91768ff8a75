"""Training a layer as a step of a run: from the tables of the run to tensors of the result."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from erniequant.calibration.rows import Rows
from erniequant.checkpoint.reader import Checkpoint
from erniequant.encoding.matrix import MatrixQuantizer
from erniequant.formats.base import OutputFormat
from erniequant.models.architecture import Architecture
from erniequant.packing.schema import PROJECTIONS
from erniequant.quantization.expert_job import PackedExpert
from erniequant.quantization.hidden_states import HiddenStates
from erniequant.quantization.tuned_tensors import Tuned
from erniequant.tuning.config import Training
from erniequant.tuning.decoder_layer import FixedExpert, ScaleFactors
from erniequant.tuning.layer import LayerProblem, tune_layer
from erniequant.tuning.training import SMALLEST_SIZE, Outcome


@dataclass(frozen=True, eq=False)
class PackedLayer:
    """The experts of a layer by their numbers, with the coders of gate and up and of down of
    each."""

    experts: Mapping[int, PackedExpert]
    quantizers: Mapping[int, tuple[MatrixQuantizer, MatrixQuantizer]]

    def fixed(self, device: torch.device) -> dict[int, FixedExpert]:
        """The experts as functions, decoded."""
        return {n: FixedExpert.of(*self._weights(n, device)) for n in self.experts}

    def decoding(self, device: torch.device) -> dict[int, FixedExpert]:
        """The same, each decoded whenever it is needed."""

        def expert(number: int) -> FixedExpert:
            def weights() -> tuple[torch.Tensor, torch.Tensor]:
                with torch.no_grad():
                    gate_up, down = self._weights(number, device)
                    return gate_up.bfloat16(), down.bfloat16()

            return FixedExpert(weights)

        return {n: expert(n) for n in self.experts}

    def _weights(self, number: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        packed, (gate_up, down) = self.experts[number], self.quantizers[number]
        return (
            gate_up.decode(packed.gate_up.parts).to(device),
            down.decode(packed.down.parts).to(device),
        )


def train_layer(
    checkpoint: Checkpoint,
    model: Architecture,
    output: OutputFormat,
    index: int,
    layer: PackedLayer,
    streams: HiddenStates,
    entering: Rows,
    device: torch.device,
    config: Training,
    threads: int,
) -> Tuned:
    """Train a layer whose experts are packed; ``entering`` are the hidden states that went into it
    in the quantised model."""
    module = model.load_layer(checkpoint, index, device)
    problem = LayerProblem(
        model, module, layer.fixed(device), streams.fresh, entering, streams.original, device
    )
    tuned = tune_layer(problem, config, threads)
    trained = on_disk(checkpoint, model, index, tuned.parameters)
    scales = dict(expert_scales(output, index, layer, tuned.factors))
    return Tuned(trained, scales, facts_of(checkpoint, tuned.outcome, trained))


def facts_of(
    checkpoint: Checkpoint, outcome: Outcome, trained: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """What the report says of a stage: its loss on held-out windows before and after, the epochs
    that were kept, and how far each tensor moved, relative to its length."""
    facts = {"before": outcome.before, "after": outcome.after, "epochs": outcome.epochs}
    moved = {name: _moved(checkpoint, name, tensor) for name, tensor in trained.items()}
    return facts | {"moved": moved}


def on_disk(
    checkpoint: Checkpoint, model: Architecture, index: int, parameters: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Trained parameters of a layer as the source would hold them."""
    found = {}
    for name, parameter in parameters.items():
        disk = model.disk_name(index, name)
        dtype = checkpoint.header(disk).dtype
        found[disk] = model.to_disk(name, parameter.detach().cpu().to(dtype))
    return found


def expert_scales(
    output: OutputFormat, index: int, layer: PackedLayer, factors: Mapping[int, ScaleFactors]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that hold the output scales of the experts, multiplied by their factors."""
    rows: dict[str, list[torch.Tensor]] = {}
    for number in sorted(factors):
        packed, factor = layer.experts[number], factors[number]
        matrices = (packed.gate_up, packed.down)
        both = (factor.gate_up, factor.down)
        for name, matrix, quantizer, scale in zip(
            PROJECTIONS, matrices, layer.quantizers[number], both, strict=True
        ):
            places = output.places(index, number, name)
            for suffix, part in quantizer.rescaled(matrix.parts, scale.detach().cpu()).items():
                place = places[suffix]
                if place.row is None:
                    yield place.tensor, part
                else:
                    rows.setdefault(place.tensor, []).append(part)
    # Experts of a group are in the order of their rows.
    for name, parts in rows.items():
        yield name, torch.stack(parts)


def _moved(checkpoint: Checkpoint, name: str, tensor: torch.Tensor) -> float:
    before = checkpoint.tensor(name).float()
    # Relative to nothing, a router of zeros would have moved without end.
    length = before.norm().clamp_min(SMALLEST_SIZE * math.sqrt(before.numel()))
    return float((tensor.float() - before).norm() / length)
