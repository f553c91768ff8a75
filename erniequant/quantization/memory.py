"""Fit a run into memory: choose how many experts are under way at once, and whether tables of
activations go to disk.

Neither changes a bit of the result.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from erniequant.checkpoint.reader import Checkpoint
from erniequant.errors import ErnieQuantError
from erniequant.models.architecture import Architecture
from erniequant.quantization.layer import SAMPLE_TOKENS
from erniequant.quantization.token_batches import CHUNK, PATCHES_AT_ONCE
from erniequant.quantization.tuning_cost import TuningBytes
from erniequant.system import available_memory

BASE_BYTES = 700_000_000
"""A process that has imported torch, transformers and numba and compiled the encoder (555 MB), and
what its allocator keeps."""

SHARE_OF_AVAILABLE = 0.85
"""Default limit of a run, as a share of the memory that is free when it starts."""

POPULARITY = 2.0
"""Tokens of the experts under way over the mean, with which their tables are predicted."""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
          "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}  # fmt: skip


@dataclass(frozen=True)
class MemoryPlan:
    """The resources of a run and its predicted peaks in bytes.

    ``tables_on_disk``: hidden states and activations are in mapped files, so that their pages do
    not count. ``scratch_bytes``: the size of these files.
    """

    experts_at_once: int
    tables_on_disk: bool
    peak_bytes: int
    vram_bytes: int
    scratch_bytes: int


def _nothing(inputs: int) -> int:
    return 0


@dataclass(frozen=True)
class MemoryInputs:
    """The inputs of the memory plan beside the model.

    Attributes:
        tokens: most tokens of the calibration text.
        length: tokens of its longest window.
        patches: most patches of all images.
        layer: bytes from `largest_layer`.
        tuning: bytes of training, from `tuning_bytes`.
        encoder_bytes: bytes that coding takes for a number of inputs, from `Format.encoder_bytes`.
    """

    tokens: int
    length: int
    patches: int
    layer: int
    encoder_bytes: Callable[[int], int] = _nothing
    tuning: TuningBytes = TuningBytes()


@dataclass(frozen=True)
class _Parts:
    """Bytes of what a run holds; see `_parts`."""

    layer: int
    window: int
    tower: int
    patches: int
    tables: int
    context: int
    expert: int
    expert_tables: int
    tuning: TuningBytes


def plan_memory(
    model: Architecture, needs: MemoryInputs, threads: int, budget: int, on_cpu: bool
) -> MemoryPlan:
    """The fastest way to run within ``budget`` bytes.

    Falls back to the least memory there is, which may be more than the budget.
    """
    parts = _parts(model, needs)
    tokens = needs.tokens
    most = min(threads, max(group.experts for group in model.sizes.groups))
    # Without tokens there are no tables to put on disk.
    ways = [(most, False), *((at_once, tokens > 0) for at_once in range(most, 0, -1))]
    for at_once, on_disk in ways:
        plan = _way(parts, at_once, on_disk, threads if on_cpu else 1, on_cpu)
        if plan.peak_bytes <= budget:
            return plan
    return plan


def _way(parts: _Parts, at_once: int, on_disk: bool, threads: int, on_cpu: bool) -> MemoryPlan:
    tables = parts.tables + at_once * parts.expert_tables
    advance = max(parts.layer + threads * parts.window, threads * parts.tower)
    experts = parts.context + at_once * parts.expert
    training = parts.tuning.shared + at_once * parts.tuning.window
    experts = max(experts, training)
    return MemoryPlan(
        at_once,
        on_disk,
        BASE_BYTES + parts.patches + max(advance, experts) + (0 if on_disk else tables),
        0 if on_cpu else max(advance, at_once * parts.expert, training),
        tables if on_disk else 0,
    )


def _parts(model: Architecture, needs: MemoryInputs) -> _Parts:
    """Peak bytes of: a layer without its experts; a window passing through it; images passing
    through the vision tower; all their patches; hidden states, inputs and drift; moments and sample
    that experts share; one expert under way; its tables."""
    tokens, length, patches = needs.tokens, needs.length, needs.patches
    images = model.images
    sizes = model.sizes
    hidden, inner = sizes.hidden, max(group.inner for group in sizes.groups)
    widest = max(2 * getattr(model.config, "intermediate_size", 0), 4 * hidden)
    sample = min(SAMPLE_TOKENS, tokens)
    matrices = 4 * 2 * inner * hidden
    # float64 Cholesky in two copies beside three float32 moments; later four float32 matrices.
    solving = 28 * hidden**2 + 2 * matrices
    encoding = 8 * hidden**2 + 5 * matrices
    # Metrics of the outputs, their factor in float64 and its block-wise inverse.
    solving += 36 * 4 * inner**2
    down = 24 * inner**2 + 36 * hidden**2 + 4 * inner * hidden + 2 * matrices
    solving += needs.encoder_bytes(hidden)
    down += needs.encoder_bytes(inner)
    chunk = 4 * min(CHUNK, max(tokens, 1)) * (6 * hidden + 9 * inner)
    mean = tokens * sizes.top_k / min(group.experts for group in sizes.groups)
    popular = min(tokens, POPULARITY * mean)
    return _Parts(
        needs.layer,
        4 * min(length, max(tokens, 1)) * (3 * widest + 6 * hidden),
        model.image_bytes(min(patches, PATCHES_AT_ONCE)) if patches else 0,
        4 * patches * images.channels * images.patch**2 if images else 0,
        4 * tokens * 7 * hidden + 24 * tokens * sizes.top_k,
        8 * hidden**2 + 4 * sample * 3 * hidden,
        max(solving, encoding, down) + chunk,
        int(4 * ((popular + sample) * 2 * inner + popular * 2 * hidden)),
        needs.tuning,
    )


def largest_layer(checkpoint: Checkpoint, model: Architecture) -> int:
    """Bytes of the largest layer without the matrices that are quantised, as it is stored."""
    layers: Counter[str] = Counter()
    for name in model.required():
        if name.startswith("model.layers.") and name in checkpoint.headers:
            layers[name.split(".")[2]] += checkpoint.header(name).n_bytes
    return max(layers.values())


def default_budget() -> int:
    """Bytes that a run may take by default."""
    return int(SHARE_OF_AVAILABLE * available_memory())


def parse_size(text: str) -> int:
    """Bytes of "16GB", "500M", "24GiB" or a plain number.

    Raises:
        ErnieQuantError: it is none of these.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    if match is None or match[2] not in _UNITS:
        raise ErnieQuantError(f"{text!r} is not a size; write for example 16GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2]])
