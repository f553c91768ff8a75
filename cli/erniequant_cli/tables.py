"""How results look on a terminal. Nothing here computes."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from erniequant.demo import DemoReport
    from erniequant.evaluate import PerplexityResult


def print_perplexity(result: "PerplexityResult") -> None:
    """Perplexity, protocol, and the distance to the reference if there was one."""
    table = Table.grid(padding=(0, 2))
    table.add_row("perplexity", f"{result.perplexity:.4f} ± {result.stderr:.4f}")
    table.add_row("tokens scored", f"{result.tokens} in {result.windows} windows")
    table.add_row("context, stride", f"{result.context}, {result.stride}, no BOS")
    table.add_row("text", f"sha256 {result.text_sha256[:16]}…")
    table.add_row("token ids", f"sha256 {result.token_ids_sha256[:16]}…")
    distance = result.reference
    if distance is not None:
        table.add_row("reference perplexity", f"{distance.perplexity:.4f}")
        table.add_row("ratio", f"{distance.ratio:.5f} ± {distance.ratio_stderr:.5f} (paired)")
        table.add_row("KL, mean and 90 %", f"{distance.kl_mean:.5f}, {distance.kl_p90:.5f} nats")
        table.add_row("top-1 agreement", f"{100 * distance.top1_agreement:.2f} %")
    Console().print(table)


def print_demo(report: "DemoReport", out: Path) -> None:
    """The demo's one table, and where the report went."""
    from erniequant.demo import cells

    table = Table(title="tiny ERNIE 4.5 MoE, held-out text")
    table.add_column("model", no_wrap=True)
    for name in (
        "bits/weight,\nexperts",
        "bits/weight,\nall",
        "MB",
        "perplexity",
        "ratio to bf16",
        "KL",
        "top-1",
        "seconds",
    ):
        table.add_column(name, justify="right")
    for row, following in zip(report.rows, (*report.rows[1:], None), strict=True):
        last = following is None or following.method != row.method
        table.add_row(*cells(row), end_section=last)
    Console().print(table)
    print(f"{report.tokens} tokens, {report.seconds:.0f} s in all; reports in {out}")
