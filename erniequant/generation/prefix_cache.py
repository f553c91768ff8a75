"""Keys and values of tokens that the model has read, kept for the next prompt.

A prompt that begins as the last one did, such as the next turn of a chat, costs only its new
tokens. Those but the last are read here, with their images; transformers' `generate` begins with
the last one, so it never sees an image and cannot mix up positions of this text with those of
another.
"""

from collections.abc import Mapping
from typing import Any

import torch

from erniequant.data.inputs import ImagePatches, ModelInput
from erniequant.errors import ErnieQuantError
from erniequant.generation.streaming import TokenStreamer
from erniequant.runtime.graphs import cache_argument, captured_steps, static_cache
from erniequant.runtime.warm_up import warm_up

_Key = int | tuple[int, int]
"""A token id; for a token of an image also which image it is."""

LEAST_CAPACITY = 4096
"""Tokens for which memory is taken at first, where it does not move."""


class PrefixCache:
    """Keys and values of one sequence for one model."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        from transformers import DynamicCache

        self._cache: Any = DynamicCache()
        self._capacity = 0  # tokens, where memory does not move
        self._read: list[_Key] = []
        # An image that is in the cache must not be freed: another could take its id.
        self._images: tuple[ImagePatches, ...] = ()

    def generate(
        self, entry: ModelInput, streamer: TokenStreamer, arguments: Mapping[str, Any]
    ) -> int:
        """Let the model continue an input; the new tokens are the streamer's.

        arguments: of transformers' `generate`, ``max_new_tokens`` among them.

        Whatever is raised while it runs, the cache stays sound and keeps what was read.

        Returns:
            Tokens of the input that did not have to be read again.

        Raises:
            ErnieQuantError: the input ends with an image.
        """
        if entry.vision is not None and bool(entry.vision[-1]):
            raise ErnieQuantError("the chat template ends with an image; it must end with text")
        keys = _keys(entry)
        last = len(keys) - 1
        with torch.inference_mode():
            self._make_room(len(keys) + arguments["max_new_tokens"])
            reused = _common(self._read, keys[:last])
            self._cut(reused)
            warm_up(self._model, (1, max(last - reused, 1)))
            if reused < last:
                self._prefill(entry, reused, last)
            self._read, self._images = keys[:last], entry.images
            try:
                self._continue(entry, streamer, arguments)
            finally:
                self._read = (keys + streamer.ids)[: self._length()]
        return reused

    def _prefill(self, entry: ModelInput, start: int, stop: int) -> None:
        """Read tokens `start` to `stop`, where `start` are read."""
        ids = entry.ids[None, start:stop]
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": torch.ones(1, stop, dtype=torch.long),
            "position_ids": _positions(entry)[..., start:stop],
        }
        if entry.placeholder is not None and entry.vision is not None:
            inputs["mm_token_type_ids"] = entry.placeholder[None, start:stop].int()
            inputs["moe_mm_token_type_ids"] = entry.vision[None, start:stop].int()
            images = entry.images[_runs(entry.placeholder[:start]) :]
            if images:
                inputs["pixel_values"] = torch.cat([image.patches for image in images])
                inputs["image_grid_thw"] = torch.tensor([image.grid for image in images])
        inputs = self._on_device(inputs)
        self._model(**inputs, **self._named(), use_cache=True, logits_to_keep=1)

    def _continue(
        self, entry: ModelInput, streamer: TokenStreamer, arguments: Mapping[str, Any]
    ) -> None:
        ids = entry.ids[None]
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "position_ids": _positions(entry),
        }
        # transformers would compile the model for a cache that can be captured.
        with captured_steps(self._model, self._cache if self._capacity else None):
            self._model.generate(
                **self._on_device(inputs), **self._named(), **arguments, streamer=streamer,
                disable_compile=True,
            )  # fmt: skip

    def _named(self) -> dict[str, Any]:
        return {cache_argument(): self._cache}

    def _on_device(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        device = next(self._model.parameters()).device
        return {name: tensor.to(device) for name, tensor in inputs.items()}

    def _cut(self, length: int) -> None:
        """Keep the first tokens only. Layers differ in length after an interruption."""
        if length == 0 and not self._capacity:
            return self.clear()
        for layer in self._cache.layers:
            if self._capacity:
                layer.cumulative_length.fill_(length)
            else:
                layer.keys = layer.keys[..., :length, :]
                layer.values = layer.values[..., :length, :]
        self._read = self._read[:length]

    def _make_room(self, tokens: int) -> None:
        """Where passes for one token are captured, use a cache of so many tokens that does not
        move; what was read comes along."""
        if tokens <= self._capacity:
            return
        capacity = 2 ** max(tokens - 1, LEAST_CAPACITY - 1).bit_length()
        roomy = static_cache(self._model, capacity)
        if roomy is None:
            # A capture has failed since; from now on the cache grows as it has to.
            return self.clear() if self._capacity else None
        length = len(self._read)
        if length:
            for layer, old in zip(roomy.layers, self._cache.layers, strict=True):
                layer.lazy_initialization(old.keys, old.values)
                layer.keys[..., :length, :] = old.keys[..., :length, :]
                layer.values[..., :length, :] = old.values[..., :length, :]
                layer.cumulative_length.fill_(length)
        self._cache, self._capacity = roomy, capacity

    def _length(self) -> int:
        """Tokens that every layer has read."""
        if self._capacity:
            return min(int(layer.get_seq_length()) for layer in self._cache.layers)
        states = [state for layer in self._cache.layers for state in (layer.keys, layer.values)]
        depth = self._model.config.get_text_config().num_hidden_layers
        # Layers appear when they are first used.
        if len(self._cache.layers) < depth or any(state is None for state in states):
            return 0
        return min(state.shape[-2] for state in states)


def _keys(entry: ModelInput) -> list[_Key]:
    ids: list[_Key] = entry.ids.tolist()
    if entry.placeholder is None:
        return ids
    image, inside = -1, False
    for at, flag in enumerate(entry.placeholder.tolist()):
        image += flag and not inside
        inside = flag
        if flag:
            ids[at] = (int(entry.ids[at]), id(entry.images[image]))
    return ids


def _common(read: list[_Key], wanted: list[_Key]) -> int:
    """Length of the common beginning."""
    pairs = enumerate(zip(read, wanted, strict=False))
    shorter = min(len(read), len(wanted))
    return next((at for at, (left, right) in pairs if left != right), shorter)


def _runs(flags: torch.Tensor) -> int:
    """Number of runs of true values."""
    before = torch.cat([torch.zeros(1, dtype=torch.bool), flags[:-1]]) if len(flags) else flags
    return int((flags & ~before).sum())


def _positions(entry: ModelInput) -> torch.Tensor:
    """int64 ``[1, T]``; with images ``[4, 1, T]``: those of text alone come first, as transformers'
    own do."""
    plain = torch.arange(len(entry))[None]
    if entry.positions is None:
        return plain
    return torch.cat([plain[None], entry.positions[:, None]])
