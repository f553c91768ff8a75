"""Measure memory and time of quantising checkpoints with the names and shapes of the large models.

    python docs/measure_memory.py --work DIR --shape 21b --layers 4 --budget default least
    python docs/measure_memory.py --plot

Makes a checkpoint with as many MoE layers as asked for (after one dense layer): weights that are
read are random, the rest of its files are holes. Quantises it in a process of its own for each
memory budget, samples that process's resident memory, and adds the run to docs/memory.json.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
RESULTS = DOCS / "memory.json"
PLOT = DOCS / "memory.png"
PAGE = DOCS / "large_models.md"
BEGIN, END = "<!-- memory:begin -->", "<!-- memory:end -->"
SHAPES: dict[str, dict[str, Any]] = {
    "21b": dict(
        hidden_size=2560, intermediate_size=12288, num_attention_heads=20, num_key_value_heads=4,
        moe_num_experts=64, moe_k=6, moe_intermediate_size=1536, moe_num_shared_experts=2,
    ),
    "300b": dict(
        hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8,
        moe_num_experts=64, moe_k=8, moe_intermediate_size=3584, moe_num_shared_experts=0,
    ),
}  # fmt: skip
SAMPLE_SECONDS = 0.1


@dataclass(frozen=True)
class Case:
    """One run to be measured."""

    shape: str
    layers: int
    experts: int
    tokens: int
    budget: str
    bits: int = 2
    effort: str = "fast"
    window: int = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="21b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--budget", nargs="+", default=["default", "least"])
    parser.add_argument("--plot", action="store_true", help="only draw what was measured")
    arguments = parser.parse_args()
    if not arguments.plot:
        source = arguments.work / f"source-{arguments.shape}"
        for budget in arguments.budget:
            case = Case(
                arguments.shape, arguments.layers, arguments.experts, arguments.tokens, budget
            )
            if not (source / "config.json").exists():
                write_source(source, case)
            found = measure(source, arguments.work / f"out-{arguments.shape}-{budget}", case)
            print(json.dumps({k: v for k, v in found.items() if k != "samples"}, indent=2))
            record(case, found)
    entries = json.loads(RESULTS.read_text())
    plot(entries)
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    PAGE.write_text(before + BEGIN + "\n" + table(entries) + END + rest.split(END)[1])


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


def settings_of(case: Case) -> dict[str, Any]:
    """config.json of the checkpoint."""
    shape = SHAPES[case.shape] | {"moe_num_experts": case.experts}
    shape["moe_k"] = min(shape["moe_k"], max(case.experts // 2, 1))
    return {
        "model_type": "ernie4_5_moe", "architectures": ["Ernie4_5_MoeForCausalLM"],
        "dtype": "bfloat16", "vocab_size": 103424, "num_hidden_layers": case.layers + 1,
        "moe_layer_start_index": 1, "tie_word_embeddings": True, **shape,
    }  # fmt: skip


def write_source(folder: Path, case: Case) -> None:
    """The checkpoint, with a tokenizer of one token per character."""
    import torch

    sys.path.insert(0, str(DOCS.parent))
    from erniequant.checkpoint.files import write_json
    from erniequant.checkpoint.layout import OutputTensor, index_of, plan_shards
    from erniequant.models.architecture import EXPERT_MATRICES
    from erniequant.models.registry import architecture_of
    from tests.micro import add_tokenizer

    folder.mkdir(parents=True)
    settings = settings_of(case)
    model = architecture_of(settings)
    sizes = model.sizes
    shapes = dict(model.required())
    for layer in sizes.moe_layers:
        for expert in range(sizes.experts):
            for matrix in EXPERT_MATRICES:
                turned = (sizes.groups[0].inner, sizes.hidden)
                shape = turned[::-1] if matrix == "down_proj" else turned
                shapes[model.expert_matrix_name(layer, expert, matrix)] = shape
    tensors = [
        OutputTensor.of(
            name, shape, torch.float32 if "mlp.gate." in name or "moe_statics" in name
            else torch.bfloat16,
        )
        for name, shape in shapes.items()
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    shards = plan_shards(tensors, 5_000_000_000)
    for shard in shards:
        with (folder / shard.file).open("wb") as file:
            file.truncate(shard.n_bytes)
            file.write(shard.header)
            for tensor in shard.tensors:
                file.seek(shard.offsets[tensor.name])
                file.write(_weights(tensor, generator))
    if len(shards) > 1:
        write_json(folder / "model.safetensors.index.json", index_of(shards))
    add_tokenizer(folder)
    write_json(folder / "config.json", settings)


def _weights(tensor: Any, generator: Any) -> bytes:
    import torch

    if tensor.name.endswith("norm.weight"):
        values = torch.ones(tensor.shape)
    elif tensor.name.endswith("bias"):
        values = torch.zeros(tensor.shape)
    elif tensor.name == "model.embed_tokens.weight":
        # Only the first tokens occur; the rest of the table stays a hole.
        values = torch.randn(128, tensor.shape[1], generator=generator)
    else:
        # Channels of uneven size, the outputs of every matrix of the size of its inputs.
        values = torch.randn(tensor.shape, generator=generator)
        uneven = torch.rand(tensor.shape[1], generator=generator) + 0.5
        values *= uneven * tensor.shape[1] ** -0.5
    dtype = torch.float32 if tensor.stored_dtype == "F32" else torch.bfloat16
    return values.to(dtype).view(torch.uint8).numpy().tobytes()


_CHILD = """
import json, sys
from erniequant.checkpoint.reader import open_checkpoint
from erniequant.models.registry import architecture_of
from erniequant.quantization.memory import Needs, largest_layer, plan_memory
from erniequant.quantization.pipeline import quantize
src, dst, case = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
least = None
if case["budget"] == "least":
    checkpoint = open_checkpoint(src)
    model = architecture_of(checkpoint.config)
    layer = largest_layer(checkpoint, model)
    needs = Needs(case["tokens"], case["window"], 0, layer)
    least = plan_memory(model, needs, 1, 0, True).peak_bytes
report = quantize(
    src, dst, bits=case["bits"], effort=case["effort"], device="cpu",
    calib_samples=case["tokens"] // case["window"], calib_length=case["window"],
    threads=1 if least else None, max_memory=least,
)
"""


def measure(source: Path, out: Path, case: Case) -> dict[str, Any]:
    """Quantise in a child; peaks, bounds, predictions and samples of (seconds, bytes)."""
    started = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(source), str(out), json.dumps(asdict(case))]
    )
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
    """What the run may take: 1.5 layers of experts and 2 GB; with the least budget four experts,
    32 bytes for every entry of the largest Hessian, the largest layer without experts, 1 GB. All
    weights in bfloat16. Of the activations, which are on disk in the latter, none count."""
    from erniequant.checkpoint.reader import open_checkpoint
    from erniequant.models.registry import architecture_of
    from erniequant.quantization.memory import largest_layer

    checkpoint = open_checkpoint(source)
    model = architecture_of(checkpoint.config)
    expert = 2 * 3 * model.sizes.hidden * model.sizes.groups[0].inner
    if case.budget == "default":
        return int(1.5 * model.sizes.experts * expert + 2e9)
    hessian = max(model.sizes.hidden, model.sizes.groups[0].inner) ** 2
    return int(4 * expert + 32 * hessian + largest_layer(checkpoint, model) + 1e9)


def record(case: Case, found: dict[str, Any]) -> None:
    """Replace the case's entry in the results."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    key = asdict(case)
    entries = [e for e in known if (e["shape"], e["budget"]) != (case.shape, case.budget)]
    RESULTS.write_text(json.dumps([*entries, key | found], indent=1) + "\n")


def plot(entries: list[dict[str, Any]]) -> None:
    """Resident memory over time, with the bound, for every case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(entries), figsize=(4.2 * len(entries), 3.2), squeeze=False
    )
    for axis, entry in zip(axes[0], entries, strict=True):
        times, sizes = zip(*entry["samples"], strict=True)
        axis.plot([t / 60 for t in times], [n / 1e9 for n in sizes], label="resident")
        axis.axhline(entry["bound_bytes"] / 1e9, color="tab:red", linestyle="--", label="bound")
        predicted = entry["predicted"]["peak_memory_bytes"] / 1e9
        axis.axhline(predicted, color="tab:gray", linestyle=":", label="predicted peak")
        start = times[-1] - entry["layer_seconds"][-1]
        for seconds in entry["layer_seconds"]:
            axis.axvline((start + seconds) / 60, color="0.85", zorder=0)
        axis.set(
            title=f"{entry['shape']}, {entry['budget']} budget", xlabel="minutes", ylabel="GB",
            ylim=(0, None),
        )  # fmt: skip
        axis.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(PLOT, dpi=110)


if __name__ == "__main__":
    main()
