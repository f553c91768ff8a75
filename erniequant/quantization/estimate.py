"""Predicted time and memory of a quantisation, told before it starts. Rough: within a factor of
two."""

import resource
import sys
from dataclasses import dataclass

from erniequant.codes import register_length
from erniequant.quantization.plan import Plan

# Weights per second and core at register length 12, measured on an AVX-512 server core; each
# register bit more halves the rate.
_ENCODE_RATE = {2: 1_700_000, 3: 900_000, 4: 1_200_000}
_REFERENCE_LENGTH = 12
_FLOPS_PER_CORE = 40e9
_BASE_BYTES = 700_000_000


@dataclass(frozen=True)
class Estimate:
    """Predicted wall time in seconds and peak resident memory in bytes."""

    seconds: float
    peak_bytes: int


def estimate(plan: Plan, tokens: int, threads: int) -> Estimate:
    """Predict a run over ``tokens`` calibration tokens on ``threads`` cores, computing on the
    CPU."""
    model, options = plan.model, plan.options
    shorter = _REFERENCE_LENGTH - register_length(options.bits, options.effort)
    encode = plan.expert_weights / (_ENCODE_RATE[options.bits] * 2.0**shorter)
    moe_layers = len(model.moe_layers)
    expert_tokens = tokens * model.top_k * moe_layers
    hidden, inner = model.hidden, model.inner
    # Per routed token: Hessian and cross moments of both inputs, gate and up in both models, down
    # in both models and the moments of the drift.
    moments = 2 * expert_tokens * (2 * hidden**2 + 2 * inner**2 + 7 * inner * hidden)
    feedback = plan.expert_weights * (2 * hidden + 6 * inner)
    others = plan.total_weights - plan.expert_weights
    arithmetic = (moments + feedback + 4 * tokens * others) / _FLOPS_PER_CORE
    per_expert = 4 * (8 * hidden * inner + 6 * max(hidden, inner) ** 2)
    evidence = 4 * (tokens * model.top_k // model.experts) * (3 * hidden + 10 * inner)
    # Hidden states and inputs in both models, and the difference of the states.
    resident = 4 * tokens * 5 * hidden + threads * (per_expert + evidence)
    resident += 4 * (others // max(model.layers, 1)) + plan.expert_bytes // moe_layers
    return Estimate((encode + arithmetic) / threads, _BASE_BYTES + resident)


def peak_memory() -> int:
    """Peak resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def describe(plan: Plan, predicted: Estimate, threads: int) -> str:
    """The plan as text: layers, sizes, time and memory."""
    model = plan.model
    gate_up, down = plan.layer.gate_up_proj, plan.layer.down_proj
    lines = [
        f"quantise {len(plan.quantized)} expert matrices ({plan.expert_weights / 1e6:.1f} M "
        "weights, "
        f"{model.experts} experts in each of {len(model.moe_layers)} layers) to "
        f"{plan.options.bits} bits",
        f"  gate and up: {gate_up.code}, register {gate_up.register_length}, tile {gate_up.tile}, "
        f"rotation block {gate_up.rotation_block}",
        f"  down:        {down.code}, register {down.register_length}, tile {down.tile}, "
        f"rotation block {down.rotation_block}",
        f"copy {len(plan.copied)} other tensors unchanged "
        f"({(plan.total_weights - plan.expert_weights) / 1e6:.1f} M weights)",
        *(f"  {group.line()}" for group in plan.groups),
        f"size {_gigabytes(plan.source_bytes)} -> {_gigabytes(plan.output_bytes)}: "
        f"{plan.expert_bits_per_weight:.3f} bits per expert weight, "
        f"{plan.total_bits_per_weight:.3f} in all",
        f"predicted time {_duration(predicted.seconds)} on {threads} CPU cores, "
        f"peak memory {_gigabytes(predicted.peak_bytes)}",
    ]
    if predicted.seconds > 86_400:
        lines.append("this takes more than a day on this machine; use more cores or --effort fast")
    return "\n".join(lines)


def _gigabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
