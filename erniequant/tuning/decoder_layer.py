"""A decoder layer as a function with a gradient: the stock module, and experts whose weights are
fixed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear, silu

from erniequant.data.inputs import ModelInput
from erniequant.models.architecture import Architecture, MoeInput


@dataclass(frozen=True, eq=False)
class FixedExpert:
    """An expert whose weights do not change.

    ``weights`` gives gate over up ``[2I, H]`` and down ``[H, I]``, bfloat16, decoding them if it
    must.
    """

    weights: Callable[[], tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    def of(cls, gate_up: torch.Tensor, down: torch.Tensor) -> "FixedExpert":
        """An expert with these weights in memory, rounded to bfloat16."""
        both = gate_up.bfloat16(), down.bfloat16()
        return cls(lambda: both)


@dataclass(frozen=True, eq=False)
class ScaleFactors:
    """Factors on the output scales of an expert, float32: ``[2I]`` of gate and up, ``[H]`` of
    down."""

    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True, eq=False)
class DecoderLayer:
    """One layer.

    Attributes:
        module: stock, without the matrices that are quantised (`Architecture.load_layer`).
        experts: by number within the layer; none in a layer that is not quantised.
        factors: of the same experts; an expert without has its own scales.
    """

    model: Architecture
    module: Any
    experts: Mapping[int, FixedExpert]
    factors: Mapping[int, ScaleFactors]

    def __call__(self, hidden: torch.Tensor, window: ModelInput) -> torch.Tensor:
        """Hidden states float32 ``[1, T, H]`` of one window after the layer."""
        attended = self.model.attend(self.module, hidden, window.positions)
        if not self.experts:
            return self.model.dense_mlp(self.module, attended)
        moved, given = self.model.route(self.module, attended, window.vision)
        return moved + self._run_experts(given)[None]

    def _run_experts(self, given: MoeInput) -> torch.Tensor:
        """What the experts add, float32 ``[T, H]``."""
        total = torch.zeros_like(given.x)
        for number, expert in self.experts.items():
            rows, slot = torch.where(given.expert == number)
            if rows.numel():
                output = _run_expert(given.x[rows], expert, self.factors.get(number))
                weighted = output.float() * given.weight[rows, slot, None]
                total = total.index_add(0, rows, weighted.to(total.dtype))
        return total


def _run_expert(x: torch.Tensor, expert: FixedExpert, factors: ScaleFactors | None) -> torch.Tensor:
    gate_up, down = expert.weights()
    inner = _product(x, gate_up)
    if factors is not None:
        inner = inner * factors.gate_up
    gate, up = inner.chunk(2, dim=-1)
    output = _product(silu(gate) * up, down)
    return output if factors is None else output * factors.down


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x W^T``, in float32 unless autocast says otherwise."""
    fast = torch.is_autocast_enabled(x.device.type)
    return linear(x, weight if fast else weight.float())
