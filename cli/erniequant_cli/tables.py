"""Tables of results for a terminal. Nothing here computes."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from erniequant_cli.terminal import encodable, printable, say

if TYPE_CHECKING:
    from erniequant.demo import DemoReport
    from erniequant.evaluate import ImageTextResult, PerplexityResult, ReferenceResult
    from erniequant.evaluate.speed import SpeedComparison, SpeedResult
    from erniequant.formats.results import ModelSummary, VerifyReport
    from erniequant.quantization.report import QuantizationReport
    from erniequant.timing import Spread
    from erniequant_kernels.bench.rows import Ratio, Row

FALLBACKS_SHOWN = 5
WORST_SHOWN = 5
LONGEST_FACT = 80
# Without a terminal, a table is for grep: no name is broken.
FILE_WIDTH = 160
NARROWEST = 40


def print_quantization(report: "QuantizationReport", folder: str) -> None:
    """Size before and after, error and tokens by layer, and every kind of fallback."""
    plan = report.plan
    table = _Table(
        "layer", "error, gate and up", "error, down", "tokens per expert", title="experts"
    )
    tokens = report.tokens_per_expert()
    for layer, errors in report.layer_errors().items():
        seen = sorted(tokens[layer])
        spread = f"{seen[0]} … {seen[len(seen) // 2]} … {seen[-1]}"
        by_name = (f"{errors[name]:.5f}" for name in ("gate_up_proj", "down_proj"))
        table.add_row(str(layer), *by_name, spread)
    _print(table)
    say("error: tr(G E H Eᵀ) / tr(G W H Wᵀ), mean over experts; tokens: least, median, most")
    for line in _training_lines(report):
        say(line)
    fallbacks = [matrix for matrix in report.matrices if matrix.fallback is not None]
    for fallback in fallbacks[:FALLBACKS_SHOWN]:
        where = f"layer {fallback.place} expert {fallback.expert} {fallback.projection}"
        say(f"fallback, {where}: {fallback.fallback}")
    if len(fallbacks) > FALLBACKS_SHOWN:
        say(f"and {len(fallbacks) - FALLBACKS_SHOWN} more fallbacks in the report")
    say(
        f"{plan.expert_bits_per_weight:.3f} bits per expert weight, "
        f"{plan.total_bits_per_weight:.3f} in all; {plan.source_bytes / 1e9:.3f} GB before, "
        f"{plan.output_bytes / 1e9:.3f} GB after; {report.seconds:.0f} s, "
        f"at most {report.peak_memory_bytes / 1e9:.1f} GB of memory"
    )
    say(f"wrote {folder}")


def _training_lines(report: "QuantizationReport") -> list[str]:
    """What training gained on held-out windows."""
    layers = [stage for stage in report.tuned if stage.layer < report.plan.model.layers]
    lines = []
    if layers:
        before, after = (
            sum(getattr(stage, name) for stage in layers) / len(layers)
            for name in ("before", "after")
        )
        improved = sum(stage.epochs > 0 for stage in layers)
        lines.append(
            f"training improved {improved} of {len(layers)} layers; mean error of a layer's "
            f"outputs on held-out windows {before:.5f} -> {after:.5f}"
        )
    return lines + [
        f"training of the whole model: KL on held-out windows {stage.before:.4f} -> "
        f"{stage.after:.4f}"
        for stage in report.tuned
        if stage not in layers
    ]


def print_perplexity(result: "PerplexityResult") -> None:
    """Perplexity, protocol, and the distance to the reference if there was one."""
    table = _Table.grid(padding=(0, 2))
    table.add_row("perplexity", f"{result.perplexity:.4f} ± {result.stderr:.4f}")
    table.add_row("tokens scored", f"{result.tokens} in {result.windows} windows")
    table.add_row("context, stride", f"{result.context}, {result.stride}, no BOS")
    table.add_row("text", f"sha256 {result.text_sha256[:16]}…")
    table.add_row("token ids", f"sha256 {result.token_ids_sha256[:16]}…")
    _add_distance(table, result.reference)
    _print(table)


def print_image_perplexity(result: "ImageTextResult") -> None:
    """Perplexity of text given images, protocol, and the distance to the reference if any."""
    table = _Table.grid(padding=(0, 2))
    table.add_row(
        "perplexity given images",
        f"{result.perplexity:.4f} ± {result.stderr:.4f} (NLL {result.nll:.4f})",
    )
    table.add_row(
        "tokens scored",
        f"{result.tokens} in {result.records} records with {result.images} images "
        f"({result.vision_tokens} tokens for vision experts)",
    )
    table.add_row("inputs", f"sha256 {result.inputs_sha256[:16]}…")
    _add_distance(table, result.reference)
    say("")
    _print(table)


def _add_distance(table: Table, distance: "ReferenceResult | None") -> None:
    if distance is not None:
        table.add_row("reference perplexity", f"{distance.perplexity:.4f}")
        table.add_row("ratio", f"{distance.ratio:.5f} ± {distance.ratio_stderr:.5f} (paired)")
        table.add_row("KL, mean and 90 %", f"{distance.kl_mean:.5f}, {distance.kl_p90:.5f} nats")
        table.add_row("top-1 agreement", f"{100 * distance.top1_agreement:.2f} %")


def print_demo(report: "DemoReport", out: Path) -> None:
    """The demo's one table, and where the report went."""
    from erniequant.demo import cells

    # No frame: nine columns have to fit a terminal.
    table = _Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("model", no_wrap=True)
    for name in (
        "bits,\nexperts",
        "bits,\nall",
        "MB",
        "perpl.",
        "ratio to bf16",
        "KL",
        "top-1",
        "s",
    ):
        table.add_column(name, justify="right")
    for row, following in zip(report.rows, (*report.rows[1:], None), strict=True):
        last = following is None or following.method != row.method
        table.add_row(*cells(row), end_section=last)
    _print(table)
    say(f"tiny ERNIE 4.5 MoE, {report.tokens} held-out tokens, {report.seconds:.0f} s in all")
    say(f"reports in {out}")


def print_inspection(summary: "ModelSummary") -> None:
    """Every tensor, then the model as a whole."""
    tensors = _Table(box=None)
    for name in ("tensor", "shape", "type", "bytes", "code"):
        tensors.add_column(name, overflow="fold")
    for tensor in summary.tensors:
        shape = "×".join(map(str, tensor.shape))
        row = (tensor.name, shape, tensor.dtype, f"{tensor.n_bytes:,}", tensor.code or "kept")
        tensors.add_row(*row)
    table = _Table.grid(padding=(0, 2))
    table.add_row("architecture", summary.model_type)
    version = f"{summary.format_version}, written by {summary.producer}"
    table.add_row("format", "plain" if summary.format_version is None else version)
    for code, layers in summary.codes.items():
        table.add_row("code", f"{code} ({layers} layers)")
    table.add_row("expert weights", f"{summary.expert_weights:,} of {summary.total_weights:,}")
    experts, total = summary.expert_bits_per_weight, summary.total_bits_per_weight
    table.add_row("bits per weight", f"{experts:.3f} for experts, {total:.3f} in all")
    table.add_row("size", f"{summary.total_bytes / 1e9:.3f} GB in {len(summary.tensors)} tensors")
    for note in summary.notes:
        table.add_row("note", note)
    for name, value in summary.provenance.items():
        facts = value if isinstance(value, dict) else {name: value}
        for fact, content in facts.items():
            label = fact if facts is not value else f"{name}, {fact}"
            table.add_row(label, " ".join(str(content).split())[:LONGEST_FACT])
    # Many names are longer than a terminal is wide; they fold.
    _print(tensors, least=NARROWEST)
    say("")
    _print(table)


def print_verification(report: "VerifyReport") -> None:
    """Every problem, or a summary without any; with a reference also the worst matrices."""
    for problem in report.problems:
        say(f"wrong: {problem}")
    if report.mean_error is not None:
        say(f"mean relative squared error of the experts {report.mean_error:.5f}; worst:")
        for entry in sorted(report.errors, key=lambda e: -e.error)[:WORST_SHOWN]:
            say(f"  {entry.error:.5f}  {entry.name}")
    intact = sum(state == "ok" for state in report.checksums.values())
    say(
        f"{report.tensors} tensors, {report.decoded_matrices} expert matrices decoded, "
        f"{intact} of {len(report.checksums)} checksums agree"
    )


def print_kernel_cost(record: Mapping[str, Any], first: bool) -> None:
    """One line per kernel, as soon as it is compiled; the first under a heading."""
    pipes = ("all", "alu", "multiply", "memory", "matrix")
    figures = {
        "slots": "cost", "slots_in_all": "in all", "l1_slots": "L1",
        "sectors_per_request": "sect.", "uncoalesced": "unco.", "conflicts": "confl.",
    }  # fmt: skip
    if first:
        names = "".join(name.rjust(9) for name in (*figures.values(), *pipes))
        say(f"{'kernel':46}{names}    regs  spill  shared  matrix instruction")
    costs = record["per_weight"]
    numbers = [record["figures"].get(name) for name in figures]
    numbers += [costs.get(name) for name in pipes]
    cells = "".join(("" if n is None else f"{n:.2f}").rjust(9) for n in numbers)
    name = f"sm_{record['arch']} {record['kernel']}"
    say(
        f"{name:46}{cells}{record['registers']:8}{record['spill_bytes']:7}"
        f"{record['shared_bytes']:8}  {record['matrix_opcode']}"
    )


def print_bench_row(row: "Row", first: bool) -> None:
    """One line per measurement, as soon as it is taken; the first under a heading."""
    if first:
        say(
            f"{'shape':6}{'tokens':>7}  {'method':30}{'us':>10}{'from':>10}{'to':>10}"
            f"{'GB/s':>9}{'of limit':>10}"
        )
    start = f"{row.shape:6}{row.tokens:7}  {row.method:30}"
    if row.microseconds is None:
        say(f"{start}  did not run: {row.reason}")
        return
    say(
        f"{start}{row.microseconds:10.1f}{row.low:10.1f}{row.high:10.1f}"
        f"{row.gigabytes_per_second:9.1f}{row.memory_limit_percent:8.0f} %"
    )


def print_ratios(ratios: "Sequence[Ratio]", title: str) -> None:
    """Packed methods against decoded ones, whoever wins, with quartiles over the rounds."""
    table = _Table(box=None, title=title)
    for name in ("shape", "tokens", "method", "against", "speed-up", "", "quartiles", "rounds"):
        table.add_column(name)
    for r in ratios:
        winner = "packed is faster" if r.median >= 1 else "decoded is faster"
        spread = f"{r.low:.2f} … {r.high:.2f}"
        start = (r.shape, str(r.tokens), r.method, r.rival, f"{r.median:.2f}")
        table.add_row(*start, winner, spread, str(r.rounds))
    _print(table)


def print_speed(model: "SpeedResult", compared: "SpeedComparison | None" = None) -> None:
    """The model, and the reference beside it."""
    results = [model] if compared is None else [model, compared.reference]
    table = _Table.grid(padding=(0, 2))
    if compared is not None:
        table.add_row("", "model", "reference", "ratio")

    def add(label: str, name: str, digits: int, unit: float = 1.0, ratio: str = "") -> None:
        values = [getattr(result, name) for result in results]
        if values[0] is None:
            return
        cells = ["" if value is None else f"{value / unit:.{digits}f}" for value in values]
        table.add_row(label, *cells, *([ratio] if compared is not None else []))

    def spread(ratio: "Spread | None") -> str:
        return f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})" if ratio else ""

    prefill, decode = (compared.prefill, compared.decode) if compared else (None, None)
    label = f"prefill, tokens/s ({model.prompt_tokens} tokens)"
    add(label, "prefill_tokens_per_second", 1, ratio=spread(prefill))
    label = f"decode, tokens/s ({model.new_tokens} tokens)"
    add(label, "decode_tokens_per_second", 1, ratio=spread(decode))
    add("weights, GB", "weight_bytes", 3, 1e9)
    add("weights a new token reads, GB", "token_bytes", 3, 1e9)
    add("reads, GB/s", "decode_bytes_per_second", 1, 1e9)
    shares = [r.decode_bytes_per_second / r.memory_bytes_per_second for r in results]
    limit = f"of the memory limit, {model.memory_bytes_per_second / 1e9:.1f} GB/s"
    table.add_row(limit, *(f"{share:.0%}" for share in shares))
    where = "in memory" if model.device == "cpu" else "on the GPU"
    add(f"peak {where}, GB", "peak_bytes", 3, 1e9)
    table.add_row("device, type", f"{model.device}, {model.dtype}")
    _print(table)


class _Table(Table):
    """A table whose cells are what the terminal can show, before their widths are taken."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*(encodable(printable(c), sys.stdout) for c in cells), **options)


def _print(table: Table, least: int | None = None) -> None:
    """Print a table as plain text: it holds names and numbers, not markup.

    least: smallest width; a narrower terminal breaks the lines. By default it is just wide enough
    to cut no number.
    """
    width = None if sys.stdout.isatty() else FILE_WIDTH
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    options = console.options.update(width=FILE_WIDTH)
    least = console.measure(table, options=options).minimum if least is None else least
    console.width = max(console.width, least)
    console.print(table)
