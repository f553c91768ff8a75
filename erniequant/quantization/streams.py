"""The calibration text on its way through the layers, in two models at once.

One stream of hidden states runs through the quantised layers, so that every layer is calibrated on
its actual inputs; the other runs through the original layers and says what the outputs should have
been. Only one layer's non-expert weights are in memory, and of tables on disk only a window.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from erniequant.calibration.hessian import finite_rows
from erniequant.calibration.rows import RowPool, Rows
from erniequant.calibration.texts import CalibrationWindows
from erniequant.checkpoint.reader import Checkpoint
from erniequant.models.architecture import Architecture, MoeInput
from erniequant.quantization.layer import Contribution, LayerInput

EMBEDDING_ROWS = 4096
"""Rows of the embedding read at once."""


class Streams:
    """Hidden states of all windows in the quantised and in the original model, float32 ``[T, H]``
    each; without windows, of no tokens."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture,
        windows: CalibrationWindows | None,
        device: torch.device,
        threads: int,
        pool: RowPool,
    ) -> None:
        self._checkpoint, self._architecture = checkpoint, architecture
        self._device, self._threads, self._pool = device, threads, pool
        self._windows = windows.windows if windows else ()
        self.tokens = sum(len(window) for window in self._windows)
        hidden = architecture.sizes.hidden
        self._quantized = pool.empty(self.tokens, hidden)
        self._original = pool.empty(self.tokens, hidden)
        ends = torch.tensor([len(window) for window in self._windows]).cumsum(0).tolist()
        self._places = [
            slice(end - len(window), end) for end, window in zip(ends, self._windows, strict=True)
        ]

    @property
    def tables(self) -> tuple[Rows, Rows]:
        """Both hidden states, to be saved or restored."""
        return self._quantized, self._original

    def embed(self) -> None:
        """Begin: both streams hold the embeddings of the text."""
        if not self.tokens:
            return
        ids = torch.cat(self._windows)
        name = "model.embed_tokens.weight"
        # A few rows at a time: the whole table of the largest model has 1.7 GB.
        for start in range(0, self._architecture.sizes.vocabulary, EMBEDDING_ROWS):
            stop = min(start + EMBEDDING_ROWS, self._architecture.sizes.vocabulary)
            rows = torch.where((ids >= start) & (ids < stop))[0]
            if rows.numel():
                table = self._checkpoint.rows(name, start, stop)
                for part in rows.split(EMBEDDING_ROWS):
                    found = table[ids[part] - start].float()
                    self._quantized.tensor[part] = found
                    self._original.tensor[part] = found
                    self._quantized.release()
                    self._original.release()

    def through_dense_layer(self, index: int) -> None:
        """Advance both streams through a layer that is not quantised."""
        if not self.tokens:
            return
        model = self._architecture
        layer = model.load_layer(self._checkpoint, index, self._device)

        def step(states: Rows, place: slice) -> None:
            text = states.tensor[place][None].to(self._device)
            states.tensor[place] = model.dense_mlp(layer, model.attend(layer, text))[0].cpu()
            states.release()

        self._advance(self._quantized, step)
        self._advance(self._original, step)

    def into_experts(self, index: int) -> LayerInput:
        """Advance both streams through a layer up to its experts, whose outputs `add` adds."""
        model, sizes = self._architecture, self._architecture.sizes
        layer = model.load_layer(self._checkpoint, index, self._device) if self.tokens else None
        quantized, original = self._input_tables(), self._input_tables()
        drift = self._pool.empty(self.tokens, sizes.hidden)
        finite = torch.ones(self.tokens, dtype=torch.bool)

        def step_into(inputs: _InputTables) -> Callable[[Rows, slice], None]:
            def step(states: Rows, place: slice) -> None:
                text = states.tensor[place][None].to(self._device)
                moved, found = model.route(layer, model.attend(layer, text))
                states.tensor[place] = moved[0].cpu()
                inputs.put(place, found)
                states.release()

            return step

        self._advance(self._quantized, step_into(quantized))
        self._advance(self._original, step_into(original))
        for place in self._places:
            lacking = self._original.tensor[place] - self._quantized.tensor[place]
            drift.tensor[place] = lacking
            finite[place] = finite_rows(lacking)
            finite[place] &= finite_rows(quantized.x.tensor[place])
            finite[place] &= finite_rows(original.x.tensor[place])
            for table in (drift, quantized.x, original.x, self._quantized, self._original):
                table.release()
        tables = (quantized.x, original.x, drift)
        return LayerInput(quantized.input, original.input, drift.tensor, finite, tables)

    def add(self, quantized: Contribution, original: Contribution) -> None:
        """Add an expert's outputs; in the order of experts, so that sums do not depend on
        threads."""
        quantized.add_to(self._quantized)
        original.add_to(self._original)

    def _input_tables(self) -> "_InputTables":
        return _InputTables(self.tokens, self._architecture, self._pool)

    def _advance(self, states: Rows, step: Callable[[Rows, slice], None]) -> None:
        """Move every window of ``states`` on, in place: all windows twice would be gigabytes."""
        if self._device.type != "cpu":
            for place in self._places:
                step(states, place)
            return

        def one(place: slice) -> None:
            # Both settings belong to a thread.
            torch.set_num_threads(1)
            with torch.no_grad():
                step(states, place)

        with ThreadPoolExecutor(self._threads) as workers:
            for done in [workers.submit(one, place) for place in self._places]:
                done.result()


class _InputTables:
    """What a layer's experts see of all windows, filled window by window."""

    def __init__(self, tokens: int, architecture: Architecture, pool: RowPool):
        sizes = architecture.sizes
        self.x = pool.empty(tokens, sizes.hidden)
        self.input = MoeInput(
            self.x.tensor,
            torch.zeros(tokens, sizes.top_k, dtype=torch.int64),
            torch.zeros(tokens, sizes.top_k),
        )

    def put(self, place: slice, found: MoeInput) -> None:
        self.input.x[place] = found.x.float().cpu()
        self.input.expert[place] = found.expert.cpu()
        self.input.weight[place] = found.weight.float().cpu()
        self.x.release()
