"""A packed checkpoint of the 21B's names and shapes, with random weights: whether it loads and
talks in the memory of a laptop, and how fast, without the model itself.

``python -m benchmarks.large_models.packed --work DIR`` makes the checkpoints that are not there (8
GB at 2 bits, 13 GB at 4), loads each in a process of its own, generates, and fills
docs/large_models.md.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import erniequant
from benchmarks.large_models.checkpoint import Size, settings_of
from benchmarks.pages import DOCS, fill
from erniequant.checkpoint.files import write_json
from erniequant.checkpoint.layout import OutputTensor, index_of, plan_shards
from erniequant.formats.native.specs import expert_tensors, specs_of
from erniequant.formats.plan import QuantizeOptions
from erniequant.models.registry import architecture_of
from erniequant.packing.schema import QuantizationMetadata
from erniequant.system import peak_memory
from testing.micro_model import add_tokenizer

WHOLE = Size("21b", layers=27, experts=64)
SHARD_BYTES = 2_000_000_000
PIECE = 1 << 26
"""Bytes that are written at once."""


def write_packed(folder: Path, bits: int, size: Size = WHOLE) -> None:
    """The checkpoint: any words are a weight, so random ones stand for a quantised model's."""
    folder.mkdir(parents=True)
    settings = settings_of(size)
    model = architecture_of(settings)
    sizes, options = model.sizes, QuantizeOptions(bits)
    specs = specs_of(sizes, options)
    tensors = [
        OutputTensor.of(name, shape, torch.float32 if _is_routing(name) else torch.bfloat16)
        for name, shape in model.required().items()
    ]
    tensors += expert_tensors(sizes, specs)
    generator = torch.Generator().manual_seed(1)
    shards = plan_shards(tensors, SHARD_BYTES)
    for shard in shards:
        with (folder / shard.file).open("wb") as file:
            file.write(shard.header)
            for tensor in shard.tensors:
                file.seek(shard.offsets[tensor.name])
                for piece in _pieces(tensor, generator):
                    file.write(piece)
            file.truncate(shard.n_bytes)
    write_json(folder / "model.safetensors.index.json", index_of(shards))
    add_tokenizer(folder)
    layer_specs = {
        group.layer_key(index): specs[group.name]
        for index in sizes.moe_layers for group in sizes.groups
    }  # fmt: skip
    metadata = QuantizationMetadata(layer_specs, f"erniequant {erniequant.__version__}")
    write_json(folder / "config.json", settings | {"quantization_config": metadata.to_dict()})


def _is_routing(name: str) -> bool:
    return "mlp.gate." in name or "moe_statics" in name


def _pieces(tensor: OutputTensor, generator: torch.Generator) -> Iterator[bytes]:
    """Contents of a tensor: rows of matrices whose outputs are as large as their inputs."""
    kind = {"F32": torch.float32, "BF16": torch.bfloat16, "I32": torch.int32, "I16": torch.int16}
    dtype, width = kind[tensor.stored_dtype], tensor.shape[-1]
    rows = torch.Size(tensor.shape).numel() // width
    at_once = max(PIECE // (4 * width), 1)
    for start in range(0, rows, at_once):
        shape = (min(at_once, rows - start), width)
        if tensor.name.endswith("signs"):
            # Both halves of a fused matrix have the same.
            values = torch.full(shape, 0x35A7C961, dtype=dtype)
        elif dtype == torch.int32:
            values = torch.randint(-(2**31), 2**31, shape, generator=generator).to(dtype)
        elif dtype == torch.int16:
            # The scale of labels, whose standard deviation is about one, in 2000 inputs.
            values = torch.full(shape, 0.02).bfloat16().view(dtype)
        elif tensor.name.endswith("norm.weight"):
            values = torch.ones(shape, dtype=dtype)
        elif tensor.name.endswith("bias") or "guard" in tensor.name:
            values = torch.zeros(shape, dtype=dtype)
        else:
            values = (torch.randn(shape, generator=generator) * width**-0.5).to(dtype)
        yield values.contiguous().view(torch.uint8).numpy().tobytes()


def measure(folder: Path, threads: int, new_tokens: int) -> dict[str, Any]:
    """Load and generate in this process."""
    torch.set_num_threads(threads)
    started = time.perf_counter()
    model, _ = erniequant.load(folder, device="cpu", dtype="bfloat16")
    loaded = time.perf_counter() - started
    load_peak = peak_memory()
    from erniequant.evaluate.speed import speed

    first = time.perf_counter()
    with torch.inference_mode():
        model(torch.arange(5)[None])
    first = time.perf_counter() - first
    result = speed(model, prompt_tokens=128, new_tokens=new_tokens, repetitions=1)
    return {
        "threads": threads, "load_seconds": loaded, "load_peak": load_peak,
        "first_pass_seconds": first, **result.to_dict(),
    }  # fmt: skip


def table(runs: dict[int, list[dict[str, Any]]]) -> str:
    """Figures by bits and threads."""
    names = (
        "bits", "threads", "load, s", "first pass, s", "prefill, tokens/s", "decode, tokens/s",
        "reads, GB/s", "of the memory limit", "peak memory, GB",
    )  # fmt: skip
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for bits, some in runs.items():
        for run in some:
            share = run["decode_bytes_per_second"] / run["memory_bytes_per_second"]
            cells = (
                str(bits), str(run["threads"]), f"{run['load_seconds']:.0f}",
                f"{run['first_pass_seconds']:.1f}", f"{run['prefill_tokens_per_second']:.0f}",
                f"{run['decode_tokens_per_second']:.1f}",
                f"{run['decode_bytes_per_second'] / 1e9:.1f}", f"{share:.0%}",
                f"{run['peak_bytes'] / 1e9:.2f}",
            )  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Make, load, generate; fill the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoints")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--page", type=Path, default=DOCS / "large_models.md")
    parser.add_argument("--measure", action="store_true", help="one model, in this process")
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.work, given.threads[0], given.new_tokens)))
        return
    runs: dict[int, list[dict[str, Any]]] = {}
    for bits in given.bits:
        folder = given.work / f"packed21b-{bits}"
        if not folder.exists():
            write_packed(folder, bits)
        for threads in given.threads:
            command = [
                sys.executable, "-m", "benchmarks.large_models.packed", "--measure", "--work",
                str(folder), "--threads", str(threads), "--new-tokens", str(given.new_tokens),
            ]  # fmt: skip
            # As the command line sets it.
            environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
            done = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, env=environment
            )
            runs.setdefault(bits, []).append(json.loads(done.stdout.splitlines()[-1]))
    fill(given.page, "packed", table(runs))


if __name__ == "__main__":
    main()
