"""Continues a prompt with a loaded model: the quick look that no perplexity replaces."""

import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from erniequant.data.image_inputs import image_inputs
from erniequant.data.inputs import ModelInput
from erniequant.errors import ErnieQuantError, ErnieQuantWarning, wrap_errors
from erniequant.generation.positions import max_positions, positions_of
from erniequant.generation.sampling import COLDEST, require_temperature
from erniequant.generation.streaming import OnText, TokenStreamer
from erniequant.runtime.graphs import cache_argument, captured_steps, static_cache
from erniequant.runtime.warm_up import warm_up

WORTH_CAPTURING = 8
"""New tokens from which a CUDA graph pays: capturing one takes about as long as two tokens."""


@dataclass(frozen=True)
class Generation:
    """`prompt` is what the model saw, chat template included; `text` what it added, plain."""

    prompt: str
    text: str
    prompt_tokens: int
    tokens: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    images: Sequence[str | Path] = (),
    max_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    chat_template: Literal["apply", "none"] = "apply",
    on_text: OnText | None = None,
) -> Generation:
    """Continue `prompt` by up to `max_tokens` tokens, given `images` (files) before it.

    chat_template "apply" makes the prompt a user's turn if the tokenizer has a template, "none"
    never. temperature 0 takes the likeliest token each time; above 0, equal seeds give equal
    texts on one machine. `on_text` is called with every piece of the text when its tokens are
    there; together they are the result's text. It comes in one piece where the model's
    generation_config asks for a search of beams.

    Warns (ErnieQuantWarning) before it begins where prompt and answer may be longer than the
    positions that the model was made for: the text then degrades, it does not fail.

    Raises:
        ErnieQuantError: the prompt has no tokens or is not a text, the chat template cannot render
            it, max_tokens is below 1, or temperature is negative or not finite.
    """
    if max_tokens < 1:
        raise ErnieQuantError(f"max_tokens {max_tokens} is too little; ask for at least 1")
    require_temperature(temperature)
    require_text(prompt, "the prompt")
    if images:
        entry = image_inputs(model, tokenizer, prompt, images, chat_template=chat_template)
        batch = entry.batch()
        prompt = tokenizer.decode(entry.ids)
    else:
        prompt, entry = _text_input(tokenizer, prompt, chat_template)
        batch = entry.batch()
    _warn_beyond_positions(model, entry, max_tokens)
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature >= COLDEST:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        torch.manual_seed(seed)
    streamer = TokenStreamer(tokenizer, on_text)
    if on_text is not None and not _searches_beams(model):
        sampling["streamer"] = streamer
    started = time.perf_counter()
    prompt_length = batch["input_ids"].shape[1]
    warm_up(model, (1, prompt_length))
    cache = _static_cache(model, prompt_length, max_tokens)
    with torch.inference_mode(), captured_steps(model, cache):
        if cache is not None:
            # transformers would compile the model for such a cache.
            sampling |= {cache_argument(): cache, "disable_compile": True}
        output = model.generate(
            **batch,
            max_new_tokens=max_tokens,
            pad_token_id=padding(tokenizer),
            **sampling,
        )
    new = output[0, prompt_length:]
    text = tokenizer.decode(new, skip_special_tokens=True)
    streamer.finish(text)
    return Generation(
        prompt=prompt,
        text=text,
        prompt_tokens=prompt_length,
        tokens=len(new),
        seconds=time.perf_counter() - started,
    )


def _static_cache(model: Any, prompt_length: int, max_tokens: int) -> Any | None:
    """The cache of passes in a CUDA graph, None where they are not captured."""
    settings = model.generation_config
    own_way = getattr(settings, "cache_implementation", None) or settings.use_cache is False
    if own_way or _searches_beams(model) or max_tokens < WORTH_CAPTURING:
        return None
    return static_cache(model, prompt_length + max_tokens)


def _text_input(tokenizer: Any, prompt: str, chat_template: str) -> tuple[str, ModelInput]:
    """The prompt as the model sees it, and as its input."""
    if chat_template == "apply" and getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": prompt}]
        with wrap_errors(
            "the chat template cannot render the prompt (--chat-template none does without it)"
        ):
            prompt = str(
                tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            )
        if not prompt:
            raise ErnieQuantError(
                "the chat template makes nothing of the prompt; use --chat-template none"
            )
    with wrap_errors("the tokenizer cannot read the prompt"):
        ids = torch.as_tensor(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    if ids.numel() == 0:
        raise ErnieQuantError("the prompt is empty: give at least one word")
    return prompt, ModelInput(ids.long())


def require_text(given: Any, name: str) -> None:
    """Raises ErnieQuantError if it is not a text, or holds bytes that are none."""
    if not isinstance(given, str):
        raise ErnieQuantError(f"{name} is a {type(given).__name__}; give a text")
    try:
        given.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ErnieQuantError(
            f"character {error.start + 1} of {name} is not text: give it in UTF-8"
        ) from error


def _warn_beyond_positions(model: Any, entry: ModelInput, max_tokens: int) -> None:
    positions, taken = max_positions(model), positions_of(entry)
    if positions is None or taken + max_tokens <= positions:
        return
    if taken >= positions:
        text = f"the prompt alone takes {taken} of the model's {positions} positions"
    else:
        text = (
            f"{taken} positions of the prompt and {max_tokens} of --max-tokens are more than the "
            f"{positions} of the model, so ask for at most {positions - taken} tokens"
        )
    warnings.warn(f"{text}; text beyond them is unreliable", ErnieQuantWarning, stacklevel=3)


def padding(tokenizer: Any) -> int | None:
    """A token to name as padding: one prompt needs none, but transformers warns without a name."""
    pad: int | None = getattr(tokenizer, "pad_token_id", None)
    return getattr(tokenizer, "eos_token_id", None) if pad is None else pad


def _searches_beams(model: Any) -> bool:
    return (getattr(model.generation_config, "num_beams", None) or 1) > 1
