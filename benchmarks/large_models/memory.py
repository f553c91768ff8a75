"""Measure memory and time of quantising checkpoints with the names and shapes of the large models.

    python -m benchmarks.large_models.memory --work DIR --shape 21b --layers 4 --budget least
    python -m benchmarks.large_models.memory --plot

Makes a checkpoint with as many MoE layers as asked for (after one dense layer), quantises it in a
process of its own for each memory budget, samples that process's resident memory, and adds the run
to memory.json and to docs/large_models.md.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.large_models.checkpoint import SHAPES, Size, write_source
from benchmarks.large_models.plot import plot
from benchmarks.pages import DOCS, fill
from erniequant.checkpoint.reader import open_checkpoint
from erniequant.models.registry import architecture_of
from erniequant.quantization.memory import MemoryInputs, largest_layer, plan_memory

RUN = Path(__file__).with_name("run.py")
RESULTS = Path(__file__).with_name("memory.json")
PLOT = DOCS / "memory.png"
PAGE = DOCS / "large_models.md"
SAMPLE_SECONDS = 0.1


@dataclass(frozen=True)
class Case:
    """One run to be measured, with ``tokens`` calibration tokens in windows of ``window``."""

    shape: str
    layers: int
    experts: int
    tokens: int
    budget: str
    bits: int = 2
    effort: str = "fast"
    window: int = 512


def main() -> None:
    """Measure and fill the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="folder for sources and results")
    parser.add_argument("--shape", choices=SHAPES, default="21b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--budget", nargs="+", default=["default", "least"])
    parser.add_argument("--plot", action="store_true", help="only draw what was measured")
    arguments = parser.parse_args()
    if not arguments.plot:
        if arguments.work is None:
            parser.error("give --work, or --plot")
        source = arguments.work / f"source-{arguments.shape}"
        size = Size(arguments.shape, arguments.layers, arguments.experts)
        if not (source / "config.json").exists():
            write_source(source, size)
        for budget in arguments.budget:
            case = Case(**asdict(size), tokens=arguments.tokens, budget=budget)
            figures = measure(source, arguments.work / f"out-{arguments.shape}-{budget}", case)
            print(json.dumps({k: v for k, v in figures.items() if k != "samples"}, indent=2))
            record(case, figures)
    entries = json.loads(RESULTS.read_text())
    plot(entries, PLOT)
    fill(PAGE, "memory", table(entries))


def table(entries: list[dict[str, Any]]) -> str:
    """Peaks, bounds and times, one line a run."""
    lines = [
        "| shape | MoE layers | experts in each | tokens | budget | peak | bound | predicted | "
        "disk, predicted | minutes, predicted | minutes for each layer |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for e in entries:
        ends = [0.0, *e["layer_seconds"]]
        steps = [(b - a) / 60 for a, b in zip(ends, ends[1:], strict=False)]
        measured, predicted = e["measured"], e["predicted"]
        lines.append(
            f"| {e['shape']} | {e['layers']} | {e['experts']} | {e['tokens']} | {e['budget']} "
            f"| {e['peak_bytes'] / 1e9:.2f} GB | {e['bound_bytes'] / 1e9:.2f} GB "
            f"| {predicted['peak_memory_bytes'] / 1e9:.2f} GB "
            f"| {measured['disk_bytes'] / 1e9:.1f}, {predicted['disk_bytes'] / 1e9:.1f} GB "
            f"| {measured['seconds'] / 60:.1f}, {predicted['seconds'] / 60:.1f} "
            f"| {', '.join(f'{step:.1f}' for step in steps)} |"
        )
    return "\n".join(lines) + "\n"


def least_budget(source: Path, case: Case) -> int:
    """The smallest ``max_memory`` that a run on one thread accepts."""
    checkpoint = open_checkpoint(source)
    model = architecture_of(checkpoint.config)
    needs = MemoryInputs(case.tokens, case.window, 0, largest_layer(checkpoint, model))
    return plan_memory(model, needs, 1, 0, True).peak_bytes


def measure(source: Path, out: Path, case: Case) -> dict[str, Any]:
    """Quantise in a child; peaks, bounds, predictions and samples of (seconds, bytes)."""
    options: dict[str, Any] = {
        "src": str(source), "dst": str(out), "bits": case.bits, "effort": case.effort,
        "device": "cpu", "tune": "none", "calib_samples": case.tokens // case.window,
        "calib_length": case.window,
    }  # fmt: skip
    if case.budget == "least":
        options |= {"threads": 1, "max_memory": least_budget(source, case)}
    started = time.perf_counter()
    child = subprocess.Popen([sys.executable, RUN, json.dumps(options)])
    samples, peak = [], 0
    while child.poll() is None:
        try:
            status = Path(f"/proc/{child.pid}/status").read_text()
        except OSError:
            break
        fields = dict(line.split(":", 1) for line in status.splitlines())
        if "VmRSS" in fields:
            peak = max(peak, 1024 * int(fields["VmHWM"].split()[0]))
            now = 1024 * int(fields["VmRSS"].split()[0])
            samples.append((time.perf_counter() - started, now))
        time.sleep(SAMPLE_SECONDS)
    if child.wait():
        raise SystemExit(f"the run failed with {child.returncode}")
    report = json.loads((out / "quantization_report.json").read_text())
    thinned = samples[:: max(len(samples) // 400, 1)]
    return {
        "peak_bytes": peak,
        "bound_bytes": bound(source, case),
        "predicted": report["predicted"],
        "measured": report["measured"],
        "layer_seconds": report["layer_seconds"],
        "samples": [(round(t, 1), n) for t, n in thinned],
    }


def bound(source: Path, case: Case) -> int:
    """The bound of a run: 1.5 layers of experts and 2 GB; with the least budget, four experts, 32
    bytes for every entry of the largest Hessian, the largest layer without experts, and 1 GB. All
    weights are in bfloat16. Activations do not count; with the least budget they are on disk."""
    checkpoint = open_checkpoint(source)
    model = architecture_of(checkpoint.config)
    expert = 2 * 3 * model.sizes.hidden * model.sizes.groups[0].inner
    if case.budget == "default":
        return int(1.5 * model.sizes.experts * expert + 2e9)
    hessian = max(model.sizes.hidden, model.sizes.groups[0].inner) ** 2
    return int(4 * expert + 32 * hessian + largest_layer(checkpoint, model) + 1e9)


def record(case: Case, figures: dict[str, Any]) -> None:
    """Replace the case's entry in the results."""
    recorded = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    key = asdict(case)
    entries = [e for e in recorded if (e["shape"], e["budget"]) != (case.shape, case.budget)]
    RESULTS.write_text(json.dumps([*entries, key | figures], indent=1) + "\n")


if __name__ == "__main__":
    main()
