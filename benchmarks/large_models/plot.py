"""Resident memory of measured runs over time, with what was promised and predicted."""

from pathlib import Path
from typing import Any


def plot(entries: list[dict[str, Any]], path: Path) -> None:
    """Resident memory over time, with the bound, for every case,
    as an image."""
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
    figure.savefig(path, dpi=110)
