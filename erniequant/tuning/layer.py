"""Train what is not packed in one layer, so that the layer of the quantised model gives the
outputs of the original's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from erniequant.calibration.rows import Rows
from erniequant.data.inputs import ModelInput
from erniequant.models.architecture import Architecture
from erniequant.tuning.config import Training
from erniequant.tuning.decoder_layer import DecoderLayer, FixedExpert, ScaleFactors
from erniequant.tuning.training import Outcome, Window, train


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """A layer whose experts are packed, with its inputs and the outputs that it should give.

    Attributes:
        module: its stock module, from `Architecture.load_layer`; its parameters are replaced.
        experts: by number within the layer, each with its numbers of outputs.
        windows: rows of the calibration windows in the tables, and the windows.
        inputs: hidden states that go into the layer of the quantised model, float32 ``[T, H]``.
        targets: hidden states that leave the layer of the original, float32 ``[T, H]``.
    """

    model: Architecture
    module: Any
    experts: Mapping[int, FixedExpert]
    windows: Sequence[Window]
    inputs: Rows
    targets: Rows
    device: torch.device


@dataclass(frozen=True, eq=False)
class TunedLayer:
    """The result of training a layer: its parameters by name within the layer and the factors of
    its experts, float32, both empty where the layer keeps its own; and the relative error of its
    outputs."""

    parameters: Mapping[str, torch.Tensor]
    factors: Mapping[int, ScaleFactors]
    outcome: Outcome


def tune_layer(problem: LayerProblem, config: Training, threads: int) -> TunedLayer:
    """Train a layer; one that does not improve on held-out windows keeps its parameters."""
    trained = trainable(problem.module)
    factors = scale_factors(problem.experts, problem.model, problem.device)
    layer = DecoderLayer(problem.model, problem.module, problem.experts, factors)

    def loss(rows: slice, window: ModelInput) -> torch.Tensor:
        hidden = problem.inputs.tensor[rows][None].to(problem.device)
        target = problem.targets.tensor[rows].to(problem.device)
        error = (layer(hidden, window)[0].float() - target).square().mean(-1)
        return (error / target.square().mean(-1).clamp_min(1e-30)).mean()

    leaves = [*trained.values(), *leaves_of(factors)]
    outcome = train(leaves, problem.windows, loss, config, problem.device, threads)
    if not outcome.epochs:
        return TunedLayer({}, {}, outcome)
    return TunedLayer(
        {name: parameter.detach() for name, parameter in trained.items()},
        {n: ScaleFactors(f.gate_up.detach(), f.down.detach()) for n, f in factors.items()},
        outcome,
    )


def trainable(module: nn.Module, endings: tuple[str, ...] = ("",)) -> dict[str, torch.Tensor]:
    """Replace the parameters of a layer whose names have one of ``endings`` by float32 ones with a
    gradient; those that have none are left: the bias of a router only selects."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in list(module.named_parameters()):
        path, _, last = name.rpartition(".")
        if name.endswith(endings) and not name.endswith("e_score_correction_bias"):
            found[name] = nn.Parameter(parameter.detach().float().clone())
            setattr(module.get_submodule(path), last, found[name])
    return found


def leaves_of(factors: Mapping[int, ScaleFactors]) -> list[torch.Tensor]:
    """The tensors of all experts' factors, in the order of experts."""
    return [leaf for both in factors.values() for leaf in (both.gate_up, both.down)]


def scale_factors(
    experts: Mapping[int, FixedExpert], model: Architecture, device: torch.device
) -> dict[int, ScaleFactors]:
    """Factors of one, with a gradient."""
    hidden = model.sizes.hidden

    def ones(size: int) -> torch.Tensor:
        return torch.ones(size, device=device, requires_grad=True)

    return {
        number: ScaleFactors(ones(2 * model.sizes.group_of(number).inner), ones(hidden))
        for number in experts
    }
