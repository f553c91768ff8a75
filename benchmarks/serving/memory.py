"""Bytes of weights that a rank holds, at the shapes of the large models; writes docs/serving.md.

python -m benchmarks.serving.memory

Counted from shapes: quantised experts by the format's own function, everything else as vLLM cuts
it, in bfloat16.
"""

import argparse
import math
from collections.abc import Iterator
from typing import Any

from benchmarks.large_models.checkpoint import Size, settings_of
from benchmarks.pages import DOCS, fill
from erniequant.formats.native.specs import specs_of
from erniequant.formats.plan import QuantizeOptions
from erniequant.models.registry import architecture_of
from erniequant.packing.sharding import Share, bytes_of, share_params

MODELS: dict[str, dict[str, Any]] = {
    "21B-A3B": settings_of(Size("21b", layers=27, experts=64)),
    "300B-A47B": settings_of(Size("300b", layers=53, experts=64)) | {"moe_layer_start_index": 3},
}
RANKS = (1, 2, 4, 8)


def weight_bytes(settings: dict[str, Any], bits: int, ranks: int) -> int | None:
    """Of one rank; None if heads or experts cannot be cut so. bits: 16 for bfloat16."""
    model = architecture_of(settings)
    sizes = model.sizes
    if settings["num_attention_heads"] % ranks:
        return None
    kept = 0
    for name, shape in model.required().items():
        whole = len(shape) < 2 or ".mlp.gate." in name
        kept += 2 * math.prod(shape) // (1 if whole else ranks)
    group, layers = sizes.groups[0], len(sizes.moe_layers)
    if bits == 16:
        return kept + layers * 2 * 3 * group.experts * sizes.hidden * group.inner // ranks
    spec = specs_of(sizes, QuantizeOptions(bits, max_tp=max(ranks, 2)))[group.name]
    share = Share(0, ranks)
    return kept + layers * bytes_of(
        share_params(group.experts, sizes.hidden, group.inner, spec, share)
    )


def rows() -> Iterator[str]:
    """A row for each model and width, ranks in columns."""
    for name, settings in MODELS.items():
        for bits in (2, 3, 4, 16):
            found = [weight_bytes(settings, bits, ranks) for ranks in RANKS]
            cells = ["no" if n_bytes is None else f"{n_bytes / 1e9:.1f}" for n_bytes in found]
            yield f"| {name} | {bits if bits < 16 else 'bf16'} | {' | '.join(cells)} |"


def main() -> None:
    """Fill the page."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    columns = [f"TP {ranks}" for ranks in RANKS]
    head = f"| model | bits | {' | '.join(columns)} |\n|" + "---|" * 6
    fill(DOCS / "serving.md", "memory", "\n".join([head, *rows()]))


if __name__ == "__main__":
    main()
