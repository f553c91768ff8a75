"""Continues a prompt with a loaded model: the quick look that no perplexity replaces."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from erniequant.errors import ErnieQuantError
from erniequant.inputs import ModelInput
from erniequant.vision.reader import image_inputs


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


def complete(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    images: Sequence[str | Path] = (),
    max_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    chat_template: Literal["apply", "none"] = "apply",
) -> Generation:
    """Continue `prompt` by up to `max_tokens` tokens, given `images` (files) before it.

    chat_template "apply" makes the prompt a user's turn if the tokenizer has a template, "none"
    never. temperature 0 takes the likeliest token each time; above 0, equal seeds give equal
    texts on one machine. Raises ErnieQuantError for a prompt without tokens.
    """
    if images:
        entry = image_inputs(model, tokenizer, prompt, images, chat_template=chat_template)
        batch = entry.batch()
        prompt = tokenizer.decode(entry.ids)
    else:
        prompt, batch = _text_batch(tokenizer, prompt, chat_template)
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        torch.manual_seed(seed)
    started = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            **batch,
            max_new_tokens=max_tokens,
            pad_token_id=_padding(tokenizer),
            **sampling,
        )
    known = batch["input_ids"].shape[1]
    new = output[0, known:]
    return Generation(
        prompt=prompt,
        text=tokenizer.decode(new, skip_special_tokens=True),
        prompt_tokens=known,
        tokens=len(new),
        seconds=time.perf_counter() - started,
    )


def _text_batch(
    tokenizer: Any, prompt: str, chat_template: str
) -> tuple[str, dict[str, torch.Tensor]]:
    """The prompt as the model sees it, and its inputs."""
    if chat_template == "apply" and getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    ids = torch.as_tensor(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    if ids.numel() == 0:
        raise ErnieQuantError("the prompt is empty: give at least one word")
    return prompt, ModelInput(ids.long()).batch()


def _padding(tokenizer: Any) -> int | None:
    """One prompt needs no padding; naming a token only keeps transformers from warning."""
    pad: int | None = getattr(tokenizer, "pad_token_id", None)
    return getattr(tokenizer, "eos_token_id", None) if pad is None else pad
