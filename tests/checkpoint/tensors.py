"""Tensors whose places in a file are awkward, and files of safetensors made without the library."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch

from erniequant.checkpoint.layout import OutputTensor, PlannedShard, plan_shards

Stored = tuple[str, tuple[int, ...], bytes]


def awkward_tensors() -> dict[str, torch.Tensor]:
    """One of every type, narrow ones of odd sizes first, so that what follows lies askew."""
    generator = torch.Generator().manual_seed(6)

    def bits(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    return {
        "u8": bits(3),
        "bool": torch.tensor([True, False, True, True, False]),
        "i8": bits(7, 1).view(torch.int8),
        "e4m3": bits(5).view(torch.float8_e4m3fn),
        "e5m2": bits(1, 9).view(torch.float8_e5m2),
        "i16": bits(7, 6).view(torch.int16),
        "bf16": bits(5, 2).view(torch.bfloat16),
        "fp16": bits(3, 2).view(torch.float16),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
        "i32": bits(1, 4).view(torch.int32),
        "fp32": bits(5, 12).view(torch.float32),
        # Names that JSON has to escape.
        'i64 "ünï"\n': bits(3, 8).view(torch.int64),
        "fp64 scalar": bits(8).view(torch.float64)[0],
        "fp64": bits(2, 3, 8).view(torch.float64),
    }


def bits_of(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes; nan compares equal to itself."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def planned(tensors: Mapping[str, torch.Tensor], bound: int = 10_000) -> tuple[PlannedShard, ...]:
    """Shards for tensors."""
    wanted = [OutputTensor.of(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]
    return plan_shards(wanted, bound)


def write_stored(path: Path, tensors: Mapping[str, Stored]) -> Path:
    """A safetensors file of raw bytes; beside it a config, so that the folder is a checkpoint."""
    entries, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        offsets = [len(data), len(data) + len(content)]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += content
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    (path.parent / "config.json").write_text("{}")
    return path
