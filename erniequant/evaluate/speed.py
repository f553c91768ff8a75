"""Tokens per second and memory of a loaded model, from the outside: one sequence, greedy.

Decoding reads the weights of every module once a token, so the bytes it reads a second are compared
with those of a triad ``a = b + s c`` over more memory than caches hold, measured in the same run.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from erniequant.errors import ErnieQuantError
from erniequant.runtime.graphs import cache_argument, captured_steps, static_cache
from erniequant.runtime.warm_up import warm_up
from erniequant.system import peak_memory, peak_vram
from erniequant.timing import Spread, extremes, triad, triad_bytes, turn_ratios

SEED_TOKEN_STRIDE = 7919
"""Prompt ids step through the vocabulary by a prime: varied, equal for equal vocabularies."""

CAPTURED_BY = 2
"""New tokens after which the pass of one is a CUDA graph."""

TRIAD_NUMBERS = 64 * 2**20
TRIAD_TURNS = 5


@dataclass(frozen=True)
class SpeedResult:
    """One model's speed.

    Attributes:
        prefill_tokens_per_second: prompt tokens over the time of one forward pass.
        decode_tokens_per_second: new tokens over the time of the passes that made them, one a pass.
        prefill_seconds, decode_seconds: medians of a whole prompt and of one new token.
        weight_bytes: parameters and buffers as they are in memory.
        token_bytes: weights that a new token reads; of a mixture those of the chosen experts.
        decode_bytes_per_second: ``token_bytes`` over ``decode_seconds``.
        memory_bytes_per_second: bytes that the triad reads and writes a second.
        peak_bytes: most memory so far: on a GPU, what torch took; on a CPU, the resident memory of
            the process, None where another model had been loaded before.
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
    token_bytes: int
    decode_bytes_per_second: float
    memory_bytes_per_second: float
    peak_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


@dataclass(frozen=True)
class SpeedComparison:
    """A model and a reference.

    Attributes:
        interleaved: they were measured in turns, else one after the other.
        prefill, decode: ratios of the reference's time to the model's, turn by turn: median, least
            and most; above 1 the model is faster.
    """

    model: SpeedResult
    reference: SpeedResult
    interleaved: bool
    prefill: Spread
    decode: Spread

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: the model's figures, ``reference`` and ``ratio`` beside them."""
        ratio: dict[str, Any] = {"prefill": asdict(self.prefill), "decode": asdict(self.decode)}
        ratio |= {"interleaved": self.interleaved}
        return self.model.to_dict() | {"reference": self.reference.to_dict(), "ratio": ratio}


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
    subject = _Subject(model, prompt_tokens, new_tokens)
    for _ in range(repetitions):
        subject.turn()
    peak = subject.peak()  # before the triad, which takes memory of its own
    return subject.result(memory_speed(subject.device), peak)


def compare_speed(
    load_model: Callable[[], Any],
    load_reference: Callable[[], Any],
    *,
    interleave: bool = True,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    repetitions: int = 3,
) -> SpeedComparison:
    """Measure a model and a reference.

    Args:
        load_model, load_reference: give them when their turn comes.
        interleave: keep both in memory and measure them in turns, so that a busy machine slows
            both. Otherwise the model is let go before the reference is loaded.

    Raises:
        ErnieQuantError: see `speed`.
    """
    subject = _Subject(load_model(), prompt_tokens, new_tokens)
    peak = subject.peak()
    if not interleave:
        for _ in range(repetitions):
            subject.turn()
        memory = memory_speed(subject.device)
        measured = subject.result(memory, peak)
        subject.model = None
    other = _Subject(load_reference(), prompt_tokens, new_tokens)
    for _ in range(repetitions):
        if interleave:
            subject.turn()
        other.turn()
    if interleave:
        memory = memory_speed(subject.device)
        measured = subject.result(memory, peak)
    return SpeedComparison(
        measured,
        other.result(memory, None),
        interleave,
        extremes(turn_ratios(other.prefill, subject.prefill)),
        extremes(turn_ratios(*(list(map(statistics.median, s.decode)) for s in (other, subject)))),
    )


def memory_speed(device: torch.device) -> float:
    """Bytes that a device reads and writes a second; the best of some turns of the triad."""
    call = triad(TRIAD_NUMBERS, device)
    best = float("inf")
    for _ in range(TRIAD_TURNS):
        started = time.perf_counter()
        call()
        _finish(device)
        best = min(best, time.perf_counter() - started)
    return triad_bytes(TRIAD_NUMBERS) / best


class _Subject:
    """A model that has been warmed up, and its times so far."""

    @torch.inference_mode()
    def __init__(self, model: Any, prompt_tokens: int, new_tokens: int):
        self.model, self.new_tokens = model, new_tokens
        self.device = next(model.parameters()).device
        config = model.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None)
        if positions is not None and prompt_tokens + new_tokens > positions:
            raise ErnieQuantError(
                f"{prompt_tokens} + {new_tokens} tokens do not fit the model's {positions} "
                "positions; ask for fewer"
            )
        ids = torch.arange(prompt_tokens, device=self.device) * SEED_TOKEN_STRIDE
        self.ids = (ids % config.vocab_size)[None]
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.prefill: list[float] = []
        self.decode: list[list[float]] = []
        warm_up(model, (1, prompt_tokens))
        _once(model, self.ids, new_tokens, self.device)

    @torch.inference_mode()
    def turn(self) -> None:
        """Measure once more."""
        first, *rest = _once(self.model, self.ids, self.new_tokens, self.device)
        self.prefill.append(first)
        self.decode.append(rest)

    def peak(self) -> int:
        """Most memory so far, in bytes."""
        return peak_vram(self.device) if self.device.type == "cuda" else peak_memory()

    def result(self, memory: float, peak: int | None) -> SpeedResult:
        """The figures, with the memory limit and the peak."""
        first = statistics.median(self.prefill)
        each = statistics.median(seconds for turn in self.decode for seconds in turn)
        tensors = [*self.model.parameters(), *self.model.buffers()]
        on_gpu = self.device.type == "cuda"
        token_bytes = bytes_of_a_token(self.model)
        return SpeedResult(
            device=torch.cuda.get_device_name(self.device) if on_gpu else self.device.type,
            dtype=str(self.model.dtype).removeprefix("torch."),
            prompt_tokens=self.ids.shape[1],
            new_tokens=self.new_tokens,
            prefill_tokens_per_second=self.ids.shape[1] / first,
            decode_tokens_per_second=1 / each,
            prefill_seconds=first,
            decode_seconds=each,
            weight_bytes=sum(t.nbytes for t in {t.data_ptr(): t for t in tensors}.values()),
            token_bytes=token_bytes,
            decode_bytes_per_second=token_bytes / each,
            memory_bytes_per_second=memory,
            peak_bytes=peak,
        )


@torch.inference_mode()
def bytes_of_a_token(model: Any) -> int:
    """Bytes of the weights that one new token reads: those of every module that runs, of an
    embedding one row, of experts the chosen ones."""
    config = model.config.get_text_config()
    names = {module: name for name, module in model.named_modules()}
    ran: set[torch.nn.Module] = set()
    hooks = [
        module.register_forward_hook(lambda module, *_: ran.add(module))
        for module in names
        if next(module.parameters(recurse=False), None) is not None
    ]
    try:
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device))
    finally:
        for hook in hooks:
            hook.remove()
    total = 0.0
    for module in ran:
        size = sum(parameter.nbytes for parameter in module.parameters(recurse=False))
        if isinstance(module, torch.nn.Embedding):
            size //= module.num_embeddings
        share = 1.0
        if names[module].endswith("experts"):
            share = config.moe_k / module.num_experts
        total += size * share
    return round(total)


def _once(model: Any, ids: torch.Tensor, new_tokens: int, device: torch.device) -> list[float]:
    """Seconds of the prompt, then of each new token."""
    named = cache_argument()
    cache = static_cache(model, ids.shape[1] + new_tokens)
    with captured_steps(model, cache):
        if cache is not None:
            _tokens(model, ids, min(new_tokens, CAPTURED_BY), device, named, cache)
            cache.reset()
        return _tokens(model, ids, new_tokens, device, named, cache)


def _tokens(
    model: Any, ids: torch.Tensor, new_tokens: int, device: torch.device, named: str, cache: Any
) -> list[float]:
    seconds = []
    # Some models ask the cache for its length, unless they are told where they are.
    positions = torch.arange(ids.shape[1] + new_tokens, device=device)[None]
    for _ in range(new_tokens + 1):
        started = time.perf_counter()
        at, positions = positions.split_with_sizes(
            (ids.shape[1], positions.shape[1] - ids.shape[1]), dim=1
        )
        out = model(input_ids=ids, position_ids=at, use_cache=True, **{named: cache})
        cache, ids = getattr(out, named), out.logits[:, -1:].argmax(-1)
        _finish(device)
        seconds.append(time.perf_counter() - started)
    return seconds


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
