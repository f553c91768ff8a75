"""The options that every command shares, so that they read and behave alike."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer


def writable(path: Path | None) -> Path | None:
    """Refuse a target that cannot be written now, not after hours of work."""
    if path is not None and not path.expanduser().resolve().parent.is_dir():
        raise typer.BadParameter(f"the folder of {path} does not exist")
    return path


JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", callback=writable, help="Also write the result to FILE as JSON."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Device = Annotated[
    str,
    typer.Option(
        metavar="auto|cpu|cuda", help="Where to compute; auto takes a GPU if there is one."
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="bfloat16|float32", help="Compute in this type instead of the checkpoint's own."
    ),
]


def write_json(path: Path | None, result: Mapping[str, Any]) -> None:
    """Write `result` for other programs; non-finite numbers become null, which JSON can hold."""
    if path is not None:
        text = json.dumps(_finite(result), indent=2, allow_nan=False, default=str)
        path.expanduser().write_text(text + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
