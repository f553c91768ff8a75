"""A chat with a model that is loaded: turns, images, and what happens when the context is full."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from erniequant.data.image_inputs import reader_for
from erniequant.data.inputs import ImagePatches, ModelInput
from erniequant.data.templates import apply_template
from erniequant.errors import ErnieQuantError, wrap_errors
from erniequant.generation.continuation import padding, require_text
from erniequant.generation.positions import max_positions, positions_of
from erniequant.generation.prefix_cache import PrefixCache
from erniequant.generation.sampling import Sampling
from erniequant.generation.streaming import OnText, TokenStreamer
from erniequant.paths import expanded

_WHERE = "the chat"
_SHARE = 4
"""A quarter of the positions is kept for an answer that may be that long. Another quarter is freed
when exchanges are dropped: the model has to read everything behind them again, and should not have
to at every turn."""


@dataclass(frozen=True)
class Answer:
    """One answer of the model.

    Attributes:
        text: plain, without special tokens.
        prompt_tokens: all that the model saw, of which `reused_tokens` were read before.
        tokens: of the answer, in so many `seconds`, reading the prompt included.
        finish: "length" if it was cut off, by the limit of its length or of the context.
        dropped: exchanges that were forgotten to make room.
    """

    text: str
    prompt_tokens: int
    reused_tokens: int
    tokens: int
    seconds: float
    finish: Literal["end", "length"]
    dropped: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


@dataclass(frozen=True)
class _Turn:
    role: str
    text: str
    images: tuple[ImagePatches, ...] = ()

    def message(self, in_parts: bool) -> dict[str, Any]:
        if not in_parts:
            return {"role": self.role, "content": self.text}
        images = [{"type": "image", "image": image} for image in self.images]
        return {"role": self.role, "content": [*images, {"type": "text", "text": self.text}]}


class ChatSession:
    """A chat in the form of the model's own template.

    Keys and values of earlier turns are kept, so a turn costs its own tokens only. Where prompt
    and answer could outgrow the model's positions, the oldest exchanges are dropped; the system
    prompt stays.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        system: str | None = None,
        sampling: Sampling | None = None,
        max_new_tokens: int = 1024,
    ) -> None:
        """Raises ErnieQuantError if there is no chat template, it cannot render the system prompt,
        or max_new_tokens is below 1."""
        if max_new_tokens < 1:
            raise ErnieQuantError(
                f"max_new_tokens {max_new_tokens} is too little; ask for at least 1"
            )
        if not getattr(tokenizer, "chat_template", None):
            raise ErnieQuantError(
                "the model has no chat template: put the chat_template.jinja of a model that was "
                "trained to chat into its folder, or use erniequant generate"
            )
        if system is not None:
            require_text(system, "the system prompt")
        self._model, self._tokenizer = model, tokenizer
        self._system = () if system is None else (_Turn("system", system),)
        self._sampling, self._max_new_tokens = sampling or Sampling(), max_new_tokens
        self._cache = PrefixCache(model)
        self._answers = 0
        self._waiting: tuple[ImagePatches, ...] = ()
        self._turns: tuple[_Turn, ...] = ()
        self._input([_Turn("user", "hello")])  # a template that fails does so here

    @property
    def messages(self) -> list[dict[str, str]]:
        """Role and text of all that the model remembers, oldest first."""
        return [{"role": turn.role, "content": turn.text} for turn in (*self._system, *self._turns)]

    def attach(self, image: str | Path) -> None:
        """Read an image; it goes with the next message.

        Raises:
            ErnieQuantError: the model takes no images, or this one cannot be read.
        """
        reader = reader_for(self._model, self._tokenizer)
        read = reader.image_reader.read(expanded(image).resolve())
        self._waiting = (*self._waiting, read)

    def detach(self) -> None:
        """Let images that wait for a message go."""
        self._waiting = ()

    def reset(self) -> None:
        """Forget all turns, and images that wait for one; the system prompt stays."""
        self._turns = self._waiting = ()

    def say(self, text: str, on_text: OnText | None = None) -> Answer:
        """The model's answer to a message, with the images attached before it.

        on_text: called with every piece of the answer when it is there.

        If it is interrupted (KeyboardInterrupt, or anything that `on_text` raises), the chat goes
        on from the message and the pieces so far; without any, as if nothing had been said.

        Raises:
            ErnieQuantError: the message is too long for the model or not a text, or the chat
                template cannot render it. The chat is as it was before.
        """
        require_text(text, "the message")
        started = time.perf_counter()
        asked = _Turn("user", text, self._waiting)
        kept, entry, room = self._fit(asked)
        dropped = (len(self._turns) - len(kept)) // 2
        streamer = TokenStreamer(self._tokenizer, on_text)
        try:
            reused = self._generate(entry, streamer, room)
            answer = str(self._tokenizer.decode(streamer.ids, skip_special_tokens=True))
            streamer.finish(answer)
        except BaseException:
            if streamer.text:
                self._remember(kept, asked, streamer.text)
            raise
        self._remember(kept, asked, answer)
        return Answer(
            text=answer,
            prompt_tokens=len(entry),
            reused_tokens=reused,
            tokens=len(streamer.ids),
            seconds=time.perf_counter() - started,
            finish="length" if self._is_cut(streamer.ids, room) else "end",
            dropped=dropped,
        )

    def _remember(self, kept: tuple[_Turn, ...], asked: _Turn, answer: str) -> None:
        self._turns = (*kept, asked, _Turn("assistant", answer))
        self._waiting = ()

    def _generate(self, entry: ModelInput, streamer: TokenStreamer, room: int) -> int:
        self._answers += 1
        torch.manual_seed(self._sampling.seed + self._answers - 1)
        arguments = {
            "max_new_tokens": room,
            "num_beams": 1,
            "pad_token_id": padding(self._tokenizer),
            **self._sampling.arguments(),
        }
        return self._cache.generate(entry, streamer, arguments)

    def _fit(self, asked: _Turn) -> tuple[tuple[_Turn, ...], ModelInput, int]:
        """The turns that fit before a message, the prompt, and the tokens of the answer."""
        kept = self._turns
        entry = self._input([*kept, asked])
        positions = max_positions(self._model)
        if positions is None:
            return kept, entry, self._max_new_tokens
        room = min(self._max_new_tokens, positions // _SHARE)
        if positions_of(entry) + room > positions:
            while kept and positions_of(entry) + room > positions - positions // _SHARE:
                kept = kept[2:]
                entry = self._input([*kept, asked])
        taken = positions_of(entry)
        if taken >= positions:
            raise ErnieQuantError(
                f"the message takes {taken} of the model's {positions} positions, system prompt "
                "included, and leaves none for an answer; shorten it"
            )
        return kept, entry, min(self._max_new_tokens, positions - taken)

    def _input(self, turns: list[_Turn]) -> ModelInput:
        turns = [*self._system, *turns]
        has_images = any(turn.images for turn in turns)
        messages = [turn.message(has_images) for turn in turns]
        if has_images:
            return reader_for(self._model, self._tokenizer).chat(messages)
        text = apply_template(self._tokenizer, messages, _WHERE, add_generation_prompt=True)
        with wrap_errors(f"{_WHERE}: the tokenizer cannot read its text"):
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ErnieQuantError("the chat template makes nothing of the chat; mend it")
        return ModelInput(torch.tensor(ids))

    def _is_cut(self, ids: list[int], room: int) -> bool:
        ends = getattr(self._model.generation_config, "eos_token_id", None)
        ends = ends if isinstance(ends, list) else [ends]
        return len(ids) >= room and ids[-1] not in ends
