"""Predicted time, memory and disk of a quantisation, told before it starts."""

from dataclasses import dataclass

from erniequant.formats.plan import Plan
from erniequant.quantization.memory import MemoryPlan
from erniequant.quantization.work import Work, expert_work

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


def estimate(
    plan: Plan,
    memory: MemoryPlan,
    tokens: int,
    rate: float,
    training: float = 0.0,
    kept: int = 0,
) -> Estimate:
    """Predict a run over ``tokens`` calibration tokens that goes as ``memory`` says, computing on
    the CPU; ``rate`` from `Format.encode_rate`, ``training`` from `tuning_seconds`, ``kept`` from
    `tuning_disk`."""
    disk = plan.output_bytes + memory.scratch_bytes + kept
    disk += 4 * tokens * plan.model.hidden * _STATES_KEPT
    seconds = (_work_seconds(plan, tokens, rate) + training) / memory.experts_at_once
    return Estimate(seconds, memory.peak_bytes, memory.vram_bytes, disk)


def _work_seconds(plan: Plan, tokens: int, rate: float) -> float:
    """Seconds on one core."""
    model = plan.model
    routed = tokens * model.top_k * len(model.moe_layers)
    work = Work()
    for group in model.groups:
        count = group.experts * len(model.moe_layers)
        # A token goes to one group; which one is not known yet, so to any expert alike.
        each = routed / (model.experts * len(model.moe_layers))
        work += expert_work(model.hidden, group.inner, each).times(count)
    others = plan.total_weights - plan.expert_weights
    work += Work(low=4 * tokens * others)
    return plan.expert_weights / rate + work.seconds()


def describe(plan: Plan, memory: MemoryPlan, predicted: Estimate, download: int = 0) -> str:
    """The plan as text: layers, sizes, time, memory and disk, and bytes to ``download``."""
    model, wording = plan.model, plan.wording
    where = "mapped files" if memory.tables_on_disk else "memory"
    lines = [
        f"quantise {len(plan.quantized)} expert matrices ({plan.expert_weights / 1e6:.1f} M "
        "weights, "
        f"{model.experts} experts in each of {len(model.moe_layers)} layers) to "
        f"{plan.options.bits} bits",
        *(f"  {line}" for line in wording.codes),
        f"{wording.verb} {len(plan.copied)} other tensors {wording.manner} "
        f"({(plan.total_weights - plan.expert_weights) / 1e6:.1f} M weights)",
    ]
    if plan.mtp:
        lines.append(f"  of these, {len(plan.mtp)} of multi-token prediction, which {wording.mtp}")
    lines += [f"  {group.line()}" for group in plan.groups]
    if plan.options.tune == "model":
        lines.append("  the whole model is trained at the end, with its packed experts in memory")
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


def _gigabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
