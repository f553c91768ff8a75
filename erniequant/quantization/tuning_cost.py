"""Memory, disk and time of training, and of running the original backwards, as predicted before a
run."""

import math
from dataclasses import dataclass

from erniequant.formats.plan import Plan
from erniequant.models.architecture import Architecture
from erniequant.quantization.gradients import TOKENS
from erniequant.tuning.config import LAYER, MODEL, Training
from erniequant.tuning.model import POSITIONS

_FLOPS_PER_CORE = 80e9
"""Of products in bfloat16 on a server core."""


@dataclass(frozen=True)
class TuningBytes:
    """Peak bytes of training: once, and for every window under way."""

    shared: int = 0
    window: int = 0


def unpacked_parameters(model: Architecture) -> int:
    """Parameters of all layers that are not packed."""
    return sum(math.prod(shape) for name, shape in model.required().items() if ".layers." in name)


def tuning_bytes(model: Architecture, plan: Plan, length: int, layer: int) -> TuningBytes:
    """Bytes beside what a run holds anyway.

    Args:
        length: tokens of the longest window.
        layer: bytes of the largest layer without its experts, as it is stored.
    """
    options, sizes = plan.options, model.sizes
    if options.tune == "none" and options.sensitivity != "gradient":
        return TuningBytes()
    hidden = sizes.hidden
    inner = max(group.inner for group in sizes.groups)
    experts = 2 * sum(3 * group.experts * group.inner * hidden for group in sizes.groups)
    # Float32 leaves, gradients, two moments and the best state so far; stored in two bytes each.
    trained = 5 * 2 * layer
    widest = max(2 * getattr(model.config, "intermediate_size", 0), 4 * hidden)
    graph = 4 * length * (16 * hidden + 3 * widest + sizes.top_k * (6 * inner + 2 * hidden))
    # A window's gradients wait for their turn.
    shared, window = experts + trained, graph + 2 * layer
    if options.tune != "model":
        return TuningBytes(shared, window)
    unpacked = unpacked_parameters(model)
    embedding = 2 * sizes.vocabulary * hidden
    whole = plan.expert_bytes + embedding + 2 * unpacked + experts // max(sizes.experts, 1)
    logits = 4 * 4 * POSITIONS * sizes.vocabulary + 4 * length * hidden * sizes.layers
    return TuningBytes(max(shared, whole), max(window, graph + logits))


def tuning_disk(model: Architecture, plan: Plan, tokens: int, layer: int) -> int:
    """Bytes in the work folder: trained tensors until they are in the result for good, and the
    original's hidden states and gradient moments.

    Args:
        layer: bytes of the largest layer without its experts, as it is stored.
    """
    options, sizes = plan.options, model.sizes
    rows = sum(group.experts * (2 * group.inner + sizes.hidden) for group in sizes.groups)
    scales = 2 * rows
    n_bytes = 0
    if options.tune == "layer":
        n_bytes = layer + scales
    elif options.tune == "model":
        # Those of every layer, and of the whole model norms and routers.
        layers = len(sizes.moe_layers)
        small = 4 * layers * sizes.hidden * (sizes.experts + 2)
        n_bytes = 2 * unpacked_parameters(model) + small + 2 * layers * scales
    if options.sensitivity == "gradient":
        states = 4 * min(TOKENS, tokens) * sizes.hidden * sizes.layers
        n_bytes += states + 4 * sizes.hidden**2 * len(sizes.moe_layers)
    return n_bytes


def tuning_seconds(model: Architecture, plan: Plan, tokens: int) -> float:
    """Seconds on one core."""
    options, sizes = plan.options, model.sizes
    inner = max(group.inner for group in sizes.groups)
    active = unpacked_parameters(model) + 3 * sizes.top_k * inner * sizes.hidden * len(
        sizes.moe_layers
    )
    head = sizes.vocabulary * sizes.hidden
    passes = 0.0
    if options.sensitivity == "gradient":
        # Forwards twice, backwards once at twice the cost.
        passes += 4 * min(TOKENS, tokens) * (active + head)
    if options.tune != "none":
        passes += _passes(LAYER, 3) * tokens * active
    if options.tune == "model":
        passes += _passes(MODEL, 4) * tokens * (active + 2 * head)
    return 2 * passes / _FLOPS_PER_CORE


def _passes(training: Training, of_step: int) -> float:
    """Forward passes that training is worth, over all windows."""
    return training.epochs * of_step + (training.epochs + 1) / training.heldout + 1
