"""The options of a run that do not change the result."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunOptions:
    """See `erniequant.quantize` for what each means."""

    device: str = "auto"
    threads: int | None = None
    work_dir: str | Path | None = None
    max_memory: str | int | None = None
    resume: bool | None = None
    dry_run: bool = False
    max_degraded: int = 0
    engine: str = "local"
    ray_address: str | None = None
