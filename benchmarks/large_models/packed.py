"""A packed checkpoint of the 21B's names and shapes, with random weights: whether it loads and
talks in the memory of a laptop, and how fast, without the model itself.

``python -m benchmarks.large_models.packed FOLDER [--bits 2]`` makes the checkpoint if it is not
there (8 GB at 2 bits), then loads it and generates in a process of its own.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import erniequant
from benchmarks.large_models.checkpoint import Size, settings_of
from erniequant.checkpoint.files import write_json
from erniequant.checkpoint.layout import OutputTensor, index_of, plan_shards
from erniequant.formats.native.specs import expert_tensors, specs_of
from erniequant.formats.plan import QuantizeOptions
from erniequant.models.registry import architecture_of
from erniequant.packing.schema import QuantizationMetadata
from erniequant.system import peak_memory
from testing.micro_model import add_tokenizer

MOE_LAYERS, EXPERTS = 27, 64
SHARD_BYTES = 2_000_000_000
PIECE = 1 << 26
"""Bytes that are written at once."""


def write_packed(folder: Path, bits: int, layers: int = MOE_LAYERS, experts: int = EXPERTS) -> None:
    """The checkpoint: any words are a weight, so random ones stand for a quantised model's."""
    folder.mkdir(parents=True)
    settings = settings_of(Size("21b", layers, experts))
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
        if dtype == torch.int32:
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
        "first_pass_seconds": first, "peak": peak_memory(), **result.to_dict(),
    }  # fmt: skip


def main() -> None:
    """Make, load, generate, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--measure", action="store_true", help="in this process")
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.folder, given.threads, given.new_tokens)))
        return
    if not given.folder.exists():
        write_packed(given.folder, given.bits)
    command = [sys.executable, "-m", "benchmarks.large_models.packed", *sys.argv[1:], "--measure"]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    for name, value in json.loads(found.stdout.splitlines()[-1]).items():
        print(f"{name:28} {value}")


if __name__ == "__main__":
    main()
