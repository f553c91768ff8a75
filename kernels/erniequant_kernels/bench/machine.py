"""The machine of a measurement."""

import subprocess
import sys
from typing import Any

import torch
import triton


def driver() -> str:
    """The version of the GPU driver, or "unknown"."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def machine() -> dict[str, Any]:
    """Card, driver and versions; needs a GPU."""
    import transformers

    card = torch.cuda.get_device_properties(0)
    return {
        "card": card.name,
        "compute_capability": f"{card.major}.{card.minor}",
        "memory_gib": round(card.total_memory / 2**30, 1),
        "multiprocessors": card.multi_processor_count,
        "driver": driver(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
    }
