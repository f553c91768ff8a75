"""Predicted time, memory and disk of a quantisation, told before it starts. Rough: within a factor
of two."""

from collections.abc import Iterator
from dataclasses import dataclass

from erniequant.codes import register_length
from erniequant.formats.plan import Plan
from erniequant.models.architecture import ExpertGroup
from erniequant.quantization.memory import MemoryPlan

# Weights per second and core at register length 12, measured on an AVX-512 server core; each
# register bit more halves the rate.
_ENCODE_RATE = {2: 1_700_000, 3: 900_000, 4: 1_200_000}
_REFERENCE_LENGTH = 12
_WINT2_RATE = 300_000
_FLOPS_PER_CORE = 40e9
_STATES_KEPT = 4
"""Two streams of hidden states, of the last layer and of the one being written."""


@dataclass(frozen=True)
class Estimate:
    """Predicted wall time in seconds, and peaks in bytes: resident memory, GPU memory, disk (the
    result and what the run keeps beside it)."""

    seconds: float
    peak_memory_bytes: int
    peak_vram_bytes: int
    disk_bytes: int


def estimate(plan: Plan, memory: MemoryPlan, tokens: int) -> Estimate:
    """Predict a run over ``tokens`` calibration tokens that goes as ``memory`` says, computing on
    the CPU."""
    disk = plan.output_bytes + memory.scratch_bytes
    disk += 4 * tokens * plan.model.hidden * _STATES_KEPT
    seconds = _work_seconds(plan, tokens) / memory.experts_at_once
    return Estimate(seconds, memory.peak_bytes, memory.vram_bytes, disk)


def _work_seconds(plan: Plan, tokens: int) -> float:
    """Seconds on one core."""
    model, options = plan.model, plan.options
    shorter = _REFERENCE_LENGTH - register_length(options.bits, options.effort)
    rate = _ENCODE_RATE[options.bits] * 2.0**shorter
    encode = plan.expert_weights / (rate if plan.settings is None else _WINT2_RATE)
    # A token goes to one group; which one is not known yet, so the largest.
    hidden, inner = model.hidden, max(group.inner for group in model.groups)
    expert_tokens = tokens * model.top_k * len(model.moe_layers)
    # Per routed token: Hessian and cross moments of both inputs, gate and up in both models, down
    # in both models and the moments of the drift.
    moments = 2 * expert_tokens * (2 * hidden**2 + 2 * inner**2 + 7 * inner * hidden)
    feedback = plan.expert_weights * (2 * hidden + 6 * inner)
    others = plan.total_weights - plan.expert_weights
    return encode + (moments + feedback + 4 * tokens * others) / _FLOPS_PER_CORE


def describe(plan: Plan, memory: MemoryPlan, predicted: Estimate, download: int = 0) -> str:
    """The plan as text: layers, sizes, time, memory and disk, and bytes to ``download``."""
    model = plan.model
    where = "mapped files" if memory.tables_on_disk else "memory"
    lines = [
        f"quantise {len(plan.quantized)} expert matrices ({plan.expert_weights / 1e6:.1f} M "
        "weights, "
        f"{model.experts} experts in each of {len(model.moe_layers)} layers) to "
        f"{plan.options.bits} bits",
        *(line for group in model.groups for line in _code_lines(plan, group)),
        f"{'copy' if plan.settings is None else 'convert'} {len(plan.copied)} other tensors "
        f"{'unchanged' if plan.settings is None else 'to wint8 and as FastDeploy has them'} "
        f"({(plan.total_weights - plan.expert_weights) / 1e6:.1f} M weights)",
    ]
    if plan.mtp:
        fate = "transformers does not run" if plan.settings is None else "are left out"
        lines.append(f"  of these, {len(plan.mtp)} of multi-token prediction, which {fate}")
    lines += [f"  {group.line()}" for group in plan.groups]
    vram = predicted.peak_vram_bytes
    lines += [
        f"size {_gigabytes(plan.source_bytes)} -> {_gigabytes(plan.output_bytes)}: "
        f"{plan.expert_bits_per_weight:.3f} bits per expert weight, "
        f"{plan.total_bits_per_weight:.3f} in all",
        f"predicted time {_duration(predicted.seconds)}, experts at a time: "
        f"{memory.experts_at_once}, activations in {where}",
        f"predicted peak memory {_gigabytes(predicted.peak_memory_bytes)}"
        + (f", GPU memory {_gigabytes(vram)}" if vram else "")
        + f", disk {_gigabytes(predicted.disk_bytes)}",
    ]
    if download:
        lines.append(f"to download before that: {_gigabytes(download)}")
    if predicted.seconds > 86_400:
        lines.append("this takes more than a day on this machine; use more cores or --effort fast")
    return "\n".join(lines)


def _code_lines(plan: Plan, group: ExpertGroup) -> Iterator[str]:
    if plan.settings is not None:
        yield from (f"  {name}: {value}" for name, value in plan.settings.items())
        return
    spec, several = plan.specs[group.name], len(plan.model.groups) > 1
    if several:
        yield f"  {group.experts} experts of {group.name}, inner size {group.inner}:"
    for what, matrix in (("gate and up:", spec.gate_up_proj), ("down:", spec.down_proj)):
        yield (
            f"  {'  ' * several}{what:12} {matrix.code}, register {matrix.register_length}, "
            f"tile {matrix.tile}, rotation block {matrix.rotation_block}"
        )


def _gigabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
