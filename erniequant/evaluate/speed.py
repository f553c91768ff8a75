"""Tokens per second and memory of a loaded model, from the outside: one sequence, greedy."""

import inspect
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from erniequant.errors import ErnieQuantError

SEED_TOKEN_STRIDE = 7919
"""Prompt ids step through the vocabulary by a prime: varied, equal for equal vocabularies."""


@dataclass(frozen=True)
class SpeedResult:
    """One model's speed.

    Attributes:
        prefill_tokens_per_second: prompt tokens over the time of one forward pass.
        decode_tokens_per_second: new tokens over the time of the passes that made them, one a pass.
        prefill_seconds, decode_seconds: medians of a whole prompt and of one new token.
        weight_bytes: parameters and buffers as they are in memory.
        peak_bytes: most memory on the GPU during the measurement; None on a CPU.
    """

    device: str
    dtype: str
    prompt_tokens: int
    new_tokens: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    prefill_seconds: float
    decode_seconds: float
    weight_bytes: int
    peak_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


@torch.inference_mode()
def speed(
    model: Any, *, prompt_tokens: int = 512, new_tokens: int = 64, repetitions: int = 3
) -> SpeedResult:
    """Measure a causal language model.

    The first repetition warms up (kernels compile) and is not counted. Every new token is one
    forward pass with the cache of those before it, as a server without batching would run it.

    Args:
        model: a causal language model of transformers.

    Raises:
        ErnieQuantError: the model has fewer positions than prompt and new tokens.
    """
    device = next(model.parameters()).device
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and prompt_tokens + new_tokens > positions:
        raise ErnieQuantError(
            f"{prompt_tokens} + {new_tokens} tokens do not fit the model's {positions} positions; "
            "ask for fewer"
        )
    ids = torch.arange(prompt_tokens, device=device) * SEED_TOKEN_STRIDE % config.vocab_size
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    prefill, decode = [], []
    for repetition in range(repetitions + 1):
        seconds = _once(model, ids[None], new_tokens, device)
        if repetition:
            prefill.append(seconds[0])
            decode += seconds[1:]
    first, each = statistics.median(prefill), statistics.median(decode)
    tensors = [*model.parameters(), *model.buffers()]
    return SpeedResult(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        dtype=str(model.dtype).removeprefix("torch."),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        prefill_tokens_per_second=prompt_tokens / first,
        decode_tokens_per_second=1 / each,
        prefill_seconds=first,
        decode_seconds=each,
        weight_bytes=sum(t.nbytes for t in {t.data_ptr(): t for t in tensors}.values()),
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


def _once(model: Any, ids: torch.Tensor, new_tokens: int, device: torch.device) -> list[float]:
    """Seconds of the prompt, then of each new token."""
    # The argument was renamed in transformers 5.2x; the old name goes in 5.40.
    named = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    cache, seconds = None, []
    for _ in range(new_tokens + 1):
        started = time.perf_counter()
        out = model(input_ids=ids, use_cache=True, **{named: cache})
        cache, ids = getattr(out, named), out.logits[:, -1:].argmax(-1)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return seconds
