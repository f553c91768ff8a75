"""Draw the benchmark: time against tokens, ours and the fastest bfloat16 method."""

from collections.abc import Sequence
from pathlib import Path

from erniequant.errors import ErnieQuantError
from erniequant_kernels.bench.problem import BFLOAT16_BITS
from erniequant_kernels.bench.rows import Row


def curves(rows: Sequence[Row], shape: str) -> dict[str, list[tuple[int, float]]]:
    """Tokens and microseconds by label; of bfloat16 the fastest method for each batch."""
    times: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.shape != shape or row.microseconds is None:
            continue
        label = "bf16, fastest" if row.bits == BFLOAT16_BITS else row.method
        best = times.setdefault(label, {})
        best[row.tokens] = min(row.microseconds, best.get(row.tokens, row.microseconds))
    return {label: sorted(points.items()) for label, points in times.items()}


def save_plot(rows: Sequence[Row], card: str, path: Path) -> None:
    """One panel per shape, both axes logarithmic.

    Raises:
        ErnieQuantError: matplotlib is not installed, or cannot write this kind of file.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ErnieQuantError("--plot needs matplotlib: pip install 'erniequant[plot]'") from error
    shapes = list(dict.fromkeys(row.shape for row in rows))
    figure = Figure(figsize=(5 * len(shapes), 4), layout="constrained")
    for index, shape in enumerate(shapes):
        axes = figure.add_subplot(1, len(shapes), index + 1)
        for label, points in curves(rows, shape).items():
            style = "--" if label.startswith(("bf16", "fp32")) else "-"
            axes.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=label)
        axes.set(xscale="log", yscale="log", title=shape, xlabel="tokens")
        axes.set_ylabel("microseconds a layer")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(card)
    try:
        figure.savefig(path)
    except (ValueError, OSError) as error:
        raise ErnieQuantError(f"cannot write the plot {path}: {error}") from error
