"""A model's pass for one new token as one launch: a CUDA graph, with keys and values in memory that
does not move.

A pass of the 21B is some hundreds of launches, which take the host longer than the GPU takes to run
them. transformers captures graphs too, but by `torch.compile`, which takes minutes.
"""

import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from erniequant.errors import ErnieQuantWarning

Capture = Callable[[Callable[[], Any]], Callable[[], Any]]
"""Takes a function and returns one that does the same again, in the same memory, and gives what the
function gave. Taking it runs nothing."""


def cuda_graph(device: torch.device, run: Callable[[], Any]) -> Callable[[], Any]:
    """`Capture` for a GPU, once the device is given."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        # torch's own stream for captures is that of the first device on which it was asked for.
        stream = torch.cuda.Stream(device)
        # Other threads may use the device meanwhile.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            out = run()

    def replay() -> Any:
        graph.replay()
        return out

    return replay


def capture_on(device: torch.device) -> Capture | None:
    """How passes are captured on a device, None where they are not."""
    return functools.partial(cuda_graph, device) if device.type == "cuda" else None


class DecodeStep:
    """The forward function of a model that replays its passes for one token with a cache.

    The first such pass runs as it is, so that kernels are compiled; the second is captured. Passes
    whose inputs have other names, shapes or types than the captured one run as they are.
    """

    def __init__(
        self, model: Any, forward: Callable[..., Any], cache: Any, capture: Capture
    ) -> None:
        self._model, self._forward, self._capture = model, forward, capture
        self._cache, self._argument = cache, cache_argument()
        self._warm = False
        self._given: dict[str, Any] = {}
        self._replay: Callable[[], Any] | None = None

    def __call__(self, **inputs: Any) -> Any:
        """As the model's forward function; the result lies in memory that the next call reuses."""
        ids = inputs.get("input_ids")
        ours = ids is not None and ids.shape == (1, 1) and inputs.get(self._argument) is self._cache
        if not ours or self._model in _failed:
            return self._forward(**inputs)
        if not self._warm:
            self._warm = True
            return self._forward(**inputs)
        if self._replay is None and not self._captured(inputs):
            return self._forward(**inputs)
        if not _alike(self._given, inputs):
            return self._forward(**inputs)
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor):
                self._given[name].copy_(value)
        assert self._replay is not None
        return self._replay()

    def _captured(self, inputs: dict[str, Any]) -> bool:
        """Capture a pass; False, with a warning, if that cannot be done."""
        self._given = {
            name: value.clone() if isinstance(value, torch.Tensor) else value
            for name, value in inputs.items()
        }
        try:
            self._replay = self._capture(lambda: self._forward(**self._given))
        except Exception as error:  # a refusal comes as any of CUDA's, torch's and the model's own
            _give_up(self._model, " ".join(str(error).split())[:200] or type(error).__name__)
            return False
        return True


_failed: weakref.WeakSet[Any] = weakref.WeakSet()


def _give_up(model: Any, reason: str) -> None:
    """Warn, once for a model, that its passes are launched one kernel at a time."""
    if model not in _failed:
        _failed.add(model)
        warnings.warn(
            f"new tokens are not captured in a CUDA graph, and come more slowly: {reason}",
            ErnieQuantWarning,
            stacklevel=2,
        )


def _alike(given: dict[str, Any], inputs: dict[str, Any]) -> bool:
    if given.keys() != inputs.keys():
        return False
    for name, value in inputs.items():
        before = given[name]
        if isinstance(value, torch.Tensor):
            if not isinstance(before, torch.Tensor):
                return False
            if (before.shape, before.dtype) != (value.shape, value.dtype):
                return False
        elif before is not value and not (isinstance(value, _PLAIN) and before == value):
            return False
    return True


_PLAIN = (bool, int, float, str, type(None))


def cache_argument() -> str:
    """Name of the cache among a model's arguments: transformers 5.24 or so renamed it."""
    from transformers import GenerationMixin

    names = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return "cache" if "cache" in names else "past_key_values"


def static_cache(model: Any, length: int) -> Any | None:
    """An empty cache for one sequence in memory that does not move; None where passes of the model
    are not captured, for which it would be no use.

    Warns (ErnieQuantWarning), once for a model on a GPU, where they cannot be: the model spans
    several devices, or keeps something else than keys and values of all tokens.

    Args:
        length: most tokens of the sequence.
    """
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer

    if capture_on(next(model.parameters()).device) is None or model in _failed:
        return None
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    if len(places) > 1 or places & {"cpu", "disk"}:
        _give_up(model, f"the model is spread over {', '.join(sorted(places))}")
        return None
    cache = StaticCache(config=model.config, max_cache_len=length)
    # Others count tokens on the host, which a graph does not see.
    if any(type(layer) is not StaticLayer for layer in cache.layers):
        _give_up(model, "not all of its layers keep the keys and values of all tokens")
        return None
    return cache


@contextmanager
def captured_steps(model: Any, cache: Any | None) -> Iterator[None]:
    """While it is open, passes of a model for one new token with this cache are captured and
    replayed; a cache of None changes nothing. Warns once for a model if the capture fails."""
    capture = capture_on(next(model.parameters()).device)
    if cache is None or capture is None:
        yield
        return
    own, forward = model.__dict__.get("forward"), model.forward
    step = DecodeStep(model, forward, cache, capture)
    names = list(inspect.signature(forward).parameters)

    @functools.wraps(forward)
    def stepping(*args: Any, **inputs: Any) -> Any:
        return step(**dict(zip(names, args, strict=False)), **inputs)

    model.forward = stepping
    try:
        yield
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own
