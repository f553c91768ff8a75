"""The calibration text on its way through the layers, in two models at once.

One stream of hidden states runs through the quantised layers, so that every layer is calibrated on
its actual inputs; the other runs through the original layers and says what the outputs should have
been. Only one layer's non-expert weights are in memory, and of tables on disk only a window.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch

from erniequant.calibration.rows import RowPool, Rows
from erniequant.calibration.texts import CalibrationWindows
from erniequant.checkpoint.reader import Checkpoint
from erniequant.data.inputs import ModelInput
from erniequant.encoding.hessian import finite_rows
from erniequant.encoding.products import fast_products
from erniequant.models.architecture import Architecture, MoeInput, TensorSource
from erniequant.quantization.expert_job import Contribution
from erniequant.quantization.layer import LayerInput
from erniequant.quantization.token_batches import PATCHES_AT_ONCE

SPACING = 3
"""One window in so many is left for training. The quantised model's divergence on the windows that
its matrices were fitted to was half of that on fresh text (2 bits, 24 windows): training on them
has nothing left to learn, and their loss does not say when to stop."""

FEWEST_WINDOWS = 2 * SPACING
"""With fewer, none is left to say when to stop training."""

EMBEDDING_ROWS = 4096
"""Rows of the embedding read at once."""

Step = Callable[[Rows, slice, ModelInput], None]
"""Moves one window on, given all hidden states, the window's rows among them, and the window."""


class HiddenStates:
    """Hidden states of all windows in the quantised and in the original model, float32 ``[T, H]``
    each; empty without windows."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture,
        windows: CalibrationWindows | None,
        device: torch.device,
        threads: int,
        pool: RowPool,
        trains: bool = False,
    ) -> None:
        self._checkpoint, self._architecture = checkpoint, architecture
        self._device, self._threads, self._pool = device, threads, pool
        self._windows = windows.windows if windows else ()
        trains = trains and len(self._windows) >= FEWEST_WINDOWS
        self._fresh = range(SPACING - 1, len(self._windows), SPACING) if trains else range(0)
        self.tokens = sum(map(len, self._windows))
        hidden = architecture.sizes.hidden
        self._quantized = pool.empty(self.tokens, hidden)
        self._original = pool.empty(self.tokens, hidden)
        ends = list(accumulate(map(len, self._windows)))
        self._window_rows = [
            slice(end - len(window), end) for end, window in zip(ends, self._windows, strict=True)
        ]

    @property
    def tables(self) -> tuple[Rows, Rows]:
        """Both hidden states, to be saved or restored."""
        return self._quantized, self._original

    @property
    def windows(self) -> list[tuple[slice, ModelInput]]:
        """Rows of every window, and the window."""
        return list(zip(self._window_rows, self._windows, strict=True))

    @property
    def fresh(self) -> list[tuple[slice, ModelInput]]:
        """Those windows that no matrix is fitted to, kept for training."""
        return [self.windows[number] for number in self._fresh]

    @property
    def quantized(self) -> Rows:
        """Hidden states of the quantised model."""
        return self._quantized

    @property
    def original(self) -> Rows:
        """Hidden states of the original model."""
        return self._original

    def embed(self) -> None:
        """Begin: both streams hold the embeddings of the text and its images."""
        if not self.tokens:
            return
        self._embed_text()
        self._embed_images()

    def _embed_text(self) -> None:
        ids = torch.cat([window.ids for window in self._windows])
        name = "model.embed_tokens.weight"
        # A few rows at a time: the whole table of the largest model has 1.7 GB.
        for start in range(0, self._architecture.sizes.vocabulary, EMBEDDING_ROWS):
            stop = min(start + EMBEDDING_ROWS, self._architecture.sizes.vocabulary)
            rows = torch.where((ids >= start) & (ids < stop))[0]
            if rows.numel():
                table = self._checkpoint.rows(name, start, stop)
                for part in rows.split(EMBEDDING_ROWS):
                    embedded = table[ids[part] - start].float()
                    self._quantized.tensor[part] = embedded
                    self._original.tensor[part] = embedded
                    self._quantized.release()
                    self._original.release()

    def _embed_images(self) -> None:
        """Put image embeddings in the place of image tokens, a few windows at a time."""

        def embed(group: list[int]) -> None:
            torch.set_num_threads(1)
            windows = [self._windows[i] for i in group]
            images = [image for window in windows for image in window.images]
            with torch.no_grad():
                embedded = self._architecture.embed_images(
                    self._checkpoint,
                    torch.cat([image.patches for image in images]),
                    torch.tensor([image.grid for image in images]),
                    self._device,
                )
            start = 0
            for i, window in zip(group, windows, strict=True):
                assert window.placeholder is not None
                rows = torch.where(window.placeholder)[0]
                part = embedded[start : start + rows.numel()]
                start += rows.numel()
                for states in (self._quantized, self._original):
                    states.tensor[self._window_rows[i]][rows] = part
                    states.release()

        groups = _by_patches(self._windows)
        workers = self._threads if self._device.type == "cpu" else 1
        with ThreadPoolExecutor(workers) as pool:
            for done in [pool.submit(embed, group) for group in groups]:
                done.result()

    def through_dense_layer(self, index: int) -> None:
        """Advance both streams through a layer that is not quantised."""
        if not self.tokens:
            return
        model = self._architecture
        layer = model.load_layer(self._checkpoint, index, self._device)

        def step(states: Rows, rows: slice, window: ModelInput) -> None:
            text = states.tensor[rows][None].to(self._device)
            attended = model.attend(layer, text, window.positions)
            states.tensor[rows] = model.dense_mlp(layer, attended)[0].cpu()
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
        self._advance(self._quantized, self._step_into(layer, quantized))
        self._advance(self._original, self._step_into(layer, original))
        for rows in self._window_rows:
            lacking = self._original.tensor[rows] - self._quantized.tensor[rows]
            drift.tensor[rows] = lacking
            finite[rows] = finite_rows(lacking)
            finite[rows] &= finite_rows(quantized.x.tensor[rows])
            finite[rows] &= finite_rows(original.x.tensor[rows])
            for table in (drift, quantized.x, original.x, self._quantized, self._original):
                table.release()
        fitted = torch.ones(self.tokens, dtype=torch.bool)
        for number in self._fresh:
            fitted[self._window_rows[number]] = False
        tables = (quantized.x, original.x, drift)
        return LayerInput(quantized.input, original.input, drift.tensor, finite, fitted, tables)

    def copy_quantized(self) -> Rows:
        """A copy of the hidden states in the quantised model."""
        copy = self._pool.empty(*self._quantized.tensor.shape)
        self._copy(self._quantized, copy)
        return copy

    def into_tuned_experts(
        self, source: TensorSource, index: int, entering: Rows, before: LayerInput
    ) -> LayerInput:
        """Advance the quantised stream once more, from ``entering``, through a layer read from
        another source up to its experts; `into_experts` gave ``before``."""
        self._copy(entering, self._quantized)
        layer = self._architecture.load_layer(source, index, self._device)
        tables = self._input_tables()
        self._advance(self._quantized, self._step_into(layer, tables))
        return replace(before, quantized=tables.input, tables=(*before.tables, tables.x))

    def _copy(self, source: Rows, to: Rows) -> None:
        """Copy hidden states, of one window at a time in memory."""
        for rows in self._window_rows:
            to.tensor[rows] = source.tensor[rows]
            to.release()
            source.release()

    def _step_into(self, layer: Any, inputs: "_InputTables") -> Step:
        model = self._architecture

        def step(states: Rows, rows: slice, window: ModelInput) -> None:
            text = states.tensor[rows][None].to(self._device)
            attended = model.attend(layer, text, window.positions)
            moved, expert_input = model.route(layer, attended, window.vision)
            states.tensor[rows] = moved[0].cpu()
            inputs.put(rows, expert_input)
            states.release()

        return step

    def add(self, quantized: Contribution, original: Contribution | None) -> None:
        """Add an expert's outputs; in the order of experts, so that sums do not depend on
        threads."""
        quantized.add_to(self._quantized)
        if original is not None:
            original.add_to(self._original)

    def _input_tables(self) -> "_InputTables":
        return _InputTables(self.tokens, self._architecture, self._pool)

    def _advance(self, states: Rows, step: Step) -> None:
        """Move every window of ``states`` on, in place: all windows twice would be gigabytes."""
        jobs = list(zip(self._window_rows, self._windows, strict=True))

        def one(rows: slice, window: ModelInput) -> None:
            with fast_products(self._device, gradients=False):
                step(states, rows, window)

        with ThreadPoolExecutor(self._threads if self._device.type == "cpu" else 1) as workers:
            for done in [workers.submit(one, *job) for job in jobs]:
                done.result()


def _by_patches(windows: Sequence[ModelInput]) -> list[list[int]]:
    """Windows with images, in groups of about `PATCHES_AT_ONCE`."""
    groups: list[list[int]] = []
    size = 0
    for number, window in enumerate(windows):
        patches = sum(len(image.patches) for image in window.images)
        if not patches:
            continue
        if not groups or size + patches > PATCHES_AT_ONCE:
            groups.append([])
            size = 0
        groups[-1].append(number)
        size += patches
    return groups


class _InputTables:
    """The inputs of a layer's experts for all windows, filled window by window."""

    def __init__(self, tokens: int, architecture: Architecture, pool: RowPool):
        sizes = architecture.sizes
        self.x = pool.empty(tokens, sizes.hidden)
        self.input = MoeInput(
            self.x.tensor,
            torch.zeros(tokens, sizes.top_k, dtype=torch.int64),
            torch.zeros(tokens, sizes.top_k),
        )

    def put(self, rows: slice, expert_input: MoeInput) -> None:
        self.input.x[rows] = expert_input.x.float().cpu()
        self.input.expert[rows] = expert_input.expert.cpu()
        self.input.weight[rows] = expert_input.weight.float().cpu()
        self.x.release()
