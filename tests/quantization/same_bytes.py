"""What five small quantisations write, as sha256 of every shard: ours at 4, 3 and 2 bits, a
vision-language model, and WINT2.

Run as a program, it adds what is written here to recorded_bytes.json, beside this file. Sums of
floats depend on the processor, and random models on the libraries that make them, so each
combination has a record of its own.
"""

import hashlib
import json
import platform
import re
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import erniequant
from testing.micro_model import add_tokenizer, write_micro_ernie
from tests.micro import CALIBRATION, write_text
from tests.micro_vl import write_micro_vl, write_records

_LIBRARIES = ("torch", "transformers", "numpy", "numba")
RECORD = Path(__file__).with_name("recorded_bytes.json")
# FastDeploy packs 128 inputs at a time, more than the micro model has.
_FOR_FASTDEPLOY = {"hidden_size": 128, "moe_intermediate_size": 128, "intermediate_size": 128,
                   "moe_num_experts": 4}  # fmt: skip


def surroundings() -> str:
    """What bytes depend on beside our code: the processor, the instructions that torch uses, and
    versions of libraries."""
    cpu = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpu.read_text()) if cpu.is_file() else []
    cpu = f"{(names or [platform.machine()])[0]}, {torch.backends.cpu.get_cpu_capability()}"
    versions = (f"{name} {version(name).partition('+')[0]}" for name in _LIBRARIES)
    return ", ".join([cpu, *versions])


def runs(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Small quantisations by name: the source, made in ``folder``, and the options."""
    text = write_text(folder / "text.txt")
    source = add_tokenizer(write_micro_ernie(folder / "text"))
    wide = add_tokenizer(write_micro_ernie(folder / "wide", **_FOR_FASTDEPLOY))
    images = write_records(folder / "records")
    found: dict[str, tuple[Path, dict[str, Any]]] = {
        **{f"{bits} bits": (source, {"bits": bits, "calib": str(text)}) for bits in (4, 3, 2)},
        "vision-language": (
            write_micro_vl(folder / "vl"), {"bits": 2, "calib": str(images), "effort": "fast"}
        ),
        "wint2": (
            wide,
            {"bits": 2, "calib": str(text), "format": "fastdeploy-wint2", "w4_layers": 1},
        ),
    }  # fmt: skip
    return {
        name: (model, {"device": "cpu", **CALIBRATION, **options})
        for name, (model, options) in found.items()
    }


def shards_of(result: Path) -> dict[str, str]:
    """sha256 of every shard of a checkpoint, by file name."""
    return {
        shard.name: hashlib.sha256(shard.read_bytes()).hexdigest()
        for shard in sorted(result.glob("*.safetensors"))
    }


def written(folder: Path) -> dict[str, dict[str, str]]:
    """Quantise into ``folder``; sha256 of the shards of each run, by its name and theirs."""
    found = {}
    for name, (model, options) in runs(folder).items():
        result = folder / f"{name} result"
        erniequant.quantize(model, result, **options)
        found[name] = shards_of(result)
    return found


if __name__ == "__main__":
    known = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    with tempfile.TemporaryDirectory() as made:
        known[surroundings()] = written(Path(made))
    RECORD.write_text(json.dumps(known, indent=1) + "\n")
