"""The calibration text on its way through the layers, in two models at once.

One stream of hidden states runs through the quantised layers, so that every layer is calibrated on
its actual inputs; the other runs through the original layers and says what the outputs should have
been. Only one layer's non-expert weights are in memory.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from erniequant.calibration.texts import CalibrationWindows
from erniequant.checkpoint.reader import Checkpoint
from erniequant.models import ernie45_text as text_moe
from erniequant.models.ernie45_text import MoeInput, TextMoe
from erniequant.quantization.layer import ExpertOutcome, LayerInput

Item = TypeVar("Item")
Result = TypeVar("Result")


class Streams:
    """Hidden states of all windows in the quantised and in the original model, float32 ``[T, H]``
    each; without windows, of no tokens."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: Any,
        windows: CalibrationWindows | None,
        device: torch.device,
        threads: int,
    ) -> None:
        self._checkpoint, self._config = checkpoint, config
        self._device, self._threads = device, threads
        ids = windows.windows if windows else ()
        self._lengths = [len(window) for window in ids]
        self._quantized = torch.zeros(0, config.hidden_size)
        if windows:
            table = checkpoint.tensor("model.embed_tokens.weight")
            self._quantized = torch.cat([table[window].float() for window in ids])
        self._original = self._quantized.clone()

    def through_dense_layer(self, index: int) -> None:
        """Advance both streams through a layer without experts."""
        if not self._lengths:
            return
        layer = text_moe.load_layer(self._checkpoint, self._config, index, self._device)

        def step(text: torch.Tensor) -> tuple[torch.Tensor, None]:
            return text_moe.dense_mlp(layer, self._attend(layer, text)), None

        self._advance(self._quantized, step)
        self._advance(self._original, step)

    def into_experts(self, index: int) -> LayerInput:
        """Advance both streams through a layer up to its experts, whose outputs `add` adds."""
        if not self._lengths:
            return _no_tokens(TextMoe.from_config(self._config))
        layer = text_moe.load_layer(self._checkpoint, self._config, index, self._device)

        def step(text: torch.Tensor) -> tuple[torch.Tensor, MoeInput]:
            return text_moe.route(layer, self._attend(layer, text))

        quantized = _join(self._advance(self._quantized, step))
        original = _join(self._advance(self._original, step))
        return LayerInput(quantized, original, self._original - self._quantized)

    def add(self, outcome: ExpertOutcome) -> None:
        """Add an expert's outputs; in the order of experts, so that sums do not depend on
        threads."""
        outcome.quantized.add_to(self._quantized)
        outcome.original.add_to(self._original)

    def _attend(self, layer: Any, text: torch.Tensor) -> torch.Tensor:
        positions = text_moe.position_embeddings(self._config, text.shape[1], self._device)
        return text_moe.attend(layer, text, positions)

    def _advance(
        self, states: torch.Tensor, step: Callable[[torch.Tensor], tuple[torch.Tensor, Result]]
    ) -> list[Result]:
        """Replace every window of ``states`` by what a step ``[1, n, H]`` makes of it.

        In place, window by window: all windows twice would be gigabytes. Returns what else the
        steps gave.
        """

        def one(window: torch.Tensor) -> Result:
            moved, result = step(window[None].to(self._device))
            window.copy_(moved[0])
            return result

        return self._map(one, list(states.split(self._lengths)))

    def _map(self, function: Callable[[Item], Result], items: list[Item]) -> list[Result]:
        if self._device.type != "cpu":
            return [function(item) for item in items]

        def one(item: Item) -> Result:
            # Both settings belong to a thread.
            torch.set_num_threads(1)
            with torch.no_grad():
                return function(item)

        with ThreadPoolExecutor(self._threads) as pool:
            return list(pool.map(one, items))


def _join(parts: list[MoeInput]) -> MoeInput:
    return MoeInput(
        torch.cat([p.x for p in parts]).float().cpu(),
        torch.cat([p.expert for p in parts]).cpu(),
        torch.cat([p.weight for p in parts]).float().cpu(),
    )


def _no_tokens(model: TextMoe) -> LayerInput:
    empty, states = torch.zeros(0, model.top_k), torch.zeros(0, model.hidden)
    nothing = MoeInput(states, empty.long(), empty)
    return LayerInput(nothing, nothing, states)
