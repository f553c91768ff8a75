"""The whole product on one page: quantise the embedded tiny ERNIE 4.5 MoE, measure it, write a
report.

Every row is measured the same way, on held-out text, against the bf16 original on the same tokens.
Round-to-nearest rows show what the same model loses without codes, calibration and error feedback.
"""

import copy
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from erniequant.checkpoint.files import write_file, write_json
from erniequant.errors import ErnieQuantError
from erniequant.evaluate.perplexity import PerplexityResult, perplexity
from erniequant.evaluate.rtn import round_to_nearest
from erniequant.evaluate.texts import evaluation_text
from erniequant.formats.verbs import load
from erniequant.paths import expanded
from erniequant.progress import NullProgress, Progress, observed
from erniequant.quantization.pipeline import quantize

BITS = (4, 3, 2)
RTN_GROUP = 64
WINT2_W4_LAYERS = (0, 1)
"""Numbers of 4-bit layers, of three with experts, in the rows of FastDeploy's format."""
# Figures move by less than their standard error beyond this; a row takes seconds on two cores.
EVALUATION_TOKENS = 32_768
CONTEXT = 512
CALIBRATION_SAMPLES = 64
# Units of the progress bar: one evaluation takes about as long as quantising this many experts.
EVALUATION_UNITS = 10


@dataclass(frozen=True)
class DemoRow:
    """One model; `seconds` is the time to quantise it, the distances are to the first row."""

    method: str
    bits: int
    expert_bits_per_weight: float
    total_bits_per_weight: float
    megabytes: float
    perplexity: float
    perplexity_stderr: float
    ratio: float
    ratio_stderr: float
    kl_mean: float
    top1_agreement: float
    seconds: float


@dataclass(frozen=True)
class DemoReport:
    """All rows, and what it takes to repeat them."""

    rows: tuple[DemoRow, ...]
    expert_weights: int
    total_weights: int
    tokens: int
    context: int
    text_sha256: str
    token_ids_sha256: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


@dataclass(frozen=True)
class _Size:
    """Weights and bytes of a checkpoint, its routed experts apart from the rest."""

    expert_weights: int
    total_weights: int
    other_bytes: int

    def row(self, total_bytes: float) -> dict[str, float]:
        return {
            "expert_bits_per_weight": 8 * (total_bytes - self.other_bytes) / self.expert_weights,
            "total_bits_per_weight": 8 * total_bytes / self.total_weights,
            "megabytes": total_bytes / 1e6,
        }


def run_demo(
    out: Path | str,
    *,
    keep_models: bool = False,
    threads: int | None = None,
    bits: tuple[int, ...] = BITS,
    tokens: int = EVALUATION_TOKENS,
    calib_samples: int = CALIBRATION_SAMPLES,
    all_formats: bool = False,
    progress: Progress | None = None,
) -> DemoReport:
    """Quantise the embedded model at each of `bits`, measure, write `report.json` and `report.md`.

    out: folder for the reports, created if missing; with keep_models the quantised models stay in
    it. tokens: how much of the held-out text to use. calib_samples: windows of calibration text.
    all_formats: also FastDeploy's WINT2, alone and with first layers of 4 bits.

    Raises ErnieQuantError if `out` is not a folder.
    """
    from erniequant_data import tiny_model_dir

    out = expanded(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ErnieQuantError(
            f"cannot make {out}: {error.strerror}; choose another --out"
        ) from error
    started = time.perf_counter()
    source = Path(tiny_model_dir())
    original, tokenizer = load(source, device="cpu")
    watch = observed(progress)
    size = _measure_size(original, tensor_bytes(source))
    bench = _Bench(_Remembering(original), tokenizer, evaluation_text(), tokens, size, watch)
    experts = sum(p.shape[0] for p in expert_parameters(original).values()) // 2
    before = torch.get_num_threads()
    # The operators of so small a model are over before a second thread has started: on a busy
    # machine of two cores, rounding the experts took 0.5 s on one thread and 24 s on two.
    torch.set_num_threads(1)
    others = WINT2_W4_LAYERS if all_formats else ()
    models = len(bits) + len(others)
    watch.start(EVALUATION_UNITS * (1 + len(bits) + models) + experts * models)
    try:
        base = bench.measure(bench.reference, "bf16")
        rows = [_row("bf16", 16, base, size.row(tensor_bytes(source)), 0.0)]
        for width in bits:
            with _folder(out / f"{width}bit", keep_models) as folder:
                row = _quantised_row(bench, source, folder, width, calib_samples, threads)
                rows.append(row)
        for count in others:
            with _folder(out / f"wint2-{count}", keep_models) as folder:
                rows.append(_wint2_row(bench, source, folder, count, calib_samples, threads))
        rows += [_rounded_row(bench, original, width) for width in bits]
    finally:
        watch.finish()
        torch.set_num_threads(before)
    report = DemoReport(
        rows=tuple(rows),
        expert_weights=size.expert_weights,
        total_weights=size.total_weights,
        tokens=base.tokens,
        context=base.context,
        text_sha256=base.text_sha256,
        token_ids_sha256=base.token_ids_sha256,
        seconds=time.perf_counter() - started,
    )
    write_json(out / "report.json", report.to_dict())
    write_file(out / "report.md", lambda file: file.write(to_markdown(report).encode()))
    return report


@dataclass(frozen=True)
class _Bench:
    """The original and the text that every row is measured against."""

    reference: nn.Module
    tokenizer: Any
    text: str
    tokens: int
    size: _Size
    watch: Progress

    def measure(self, model: nn.Module, label: str) -> PerplexityResult:
        self.watch.advance(0, f"evaluating {label}")
        result = perplexity(
            model,
            self.tokenizer,
            self.text,
            reference=self.reference,
            context=CONTEXT,
            tokens=self.tokens,
        )
        self.watch.advance(EVALUATION_UNITS, f"evaluated {label}")
        return result


def _quantised_row(
    bench: _Bench, source: Path, folder: Path, bits: int, calib_samples: int, threads: int | None
) -> DemoRow:
    step = _Step(bench.watch, f"quantising to {bits} bits")
    started = time.perf_counter()
    quantize(
        source,
        folder,
        bits=bits,
        calib_samples=calib_samples,
        device="cpu",
        threads=threads,
        progress=step,
    )
    seconds = time.perf_counter() - started
    model, _ = load(folder, device="cpu")
    measured = bench.measure(model, f"{bits} bits")
    return _row("erniequant", bits, measured, bench.size.row(tensor_bytes(folder)), seconds)


def _wint2_row(
    bench: _Bench, source: Path, folder: Path, w4_layers: int, calib_samples: int,
    threads: int | None,
) -> DemoRow:  # fmt: skip
    """FastDeploy's format: its dense layers are wint8, and count in all bits and in the ratio."""
    what = "WINT2" if not w4_layers else f"WINT2 + {w4_layers} wint4"
    step = _Step(bench.watch, f"quantising to {what}")
    started = time.perf_counter()
    report = quantize(
        source,
        folder,
        bits=2,
        format="fastdeploy-wint2",
        w4_layers=w4_layers,
        calib_samples=calib_samples,
        device="cpu",
        threads=threads,
        progress=step,
    )
    seconds = time.perf_counter() - started
    model, _ = load(folder, device="cpu")
    size = {
        "expert_bits_per_weight": report.plan.expert_bits_per_weight,
        "total_bits_per_weight": report.plan.total_bits_per_weight,
        "megabytes": report.plan.output_bytes / 1e6,
    }
    return _row(what, 2, bench.measure(model, what), size, seconds)


def _rounded_row(bench: _Bench, original: nn.Module, bits: int) -> DemoRow:
    started = time.perf_counter()
    model, expert_bits = round_experts(original, bits)
    seconds = time.perf_counter() - started
    measured = bench.measure(model, f"round-to-nearest at {bits} bits")
    total_bytes = bench.size.other_bytes + expert_bits * bench.size.expert_weights / 8
    return _row("RTN", bits, measured, bench.size.row(total_bytes), seconds)


def round_experts(model: nn.Module, bits: int) -> tuple[nn.Module, float]:
    """A copy of `model` with its routed experts rounded to nearest, and their bits per weight."""
    rounded = copy.deepcopy(model)
    stored = weights = 0.0
    with torch.no_grad():
        for parameter in expert_parameters(rounded).values():
            result = round_to_nearest(parameter, bits, group=RTN_GROUP, search_clip=True)
            parameter.copy_(result.weight)
            stored += result.bits_per_weight * parameter.numel()
            weights += parameter.numel()
    return rounded, stored / weights


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The fused routed experts, [E, 2I, H] and [E, H, I] per layer, by name."""
    suffixes = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")
    parameters = {name: p for name, p in model.named_parameters() if name.endswith(suffixes)}
    if not parameters:
        raise ErnieQuantError("the embedded model has no routed experts: install erniequant again")
    return parameters


def tensor_bytes(folder: Path) -> int:
    """Bytes of all tensors in the safetensors files of `folder`, headers not counted."""
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        total += sum(t.numel() * t.element_size() for t in load_file(file).values())
    return total


def to_markdown(report: DemoReport) -> str:
    """The table, and under it what was measured."""
    head = (
        "| model | bits/weight, experts | bits/weight, all | MB | perplexity | ratio to bf16 "
        "| KL | top-1 | seconds |\n|---|---|---|---|---|---|---|---|---|\n"
    )
    body = "".join("| " + " | ".join(cells(row)) + " |\n" for row in report.rows)
    millions = f"{report.total_weights / 1e6:.1f} M weights, {report.expert_weights / 1e6:.1f} M"
    note = (
        f"\n{millions} of them in routed experts; {report.tokens} held-out tokens in windows of "
        f"{report.context}; ratio paired with bf16 on the same tokens, ± one standard error "
        "clustered by window; KL(bf16 || model) in nats per token; top-1: how often both models "
        "find the same token likeliest; seconds to quantise. RTN: round-to-nearest, asymmetric, "
        f"groups of {RTN_GROUP} inputs, best clip per group.{_note_on_wint2(report)}\n"
    )
    return head + body + note


def _note_on_wint2(report: DemoReport) -> str:
    if not any(row.method.startswith("WINT2") for row in report.rows):
        return ""
    return (
        " WINT2: FastDeploy's format, with everything but the experts in wint8; + wint4: 4-bit "
        "experts in the first layer."
    )


def cells(row: DemoRow) -> list[str]:
    """A row as it reads in any table."""
    original = row.method == "bf16"
    return [
        row.method if original else f"{row.method}, {row.bits} bits",
        f"{row.expert_bits_per_weight:.2f}",
        f"{row.total_bits_per_weight:.2f}",
        f"{row.megabytes:.1f}",
        f"{row.perplexity:.2f}",
        "1" if original else f"{row.ratio:.4f} ± {row.ratio_stderr:.4f}",
        "0" if original else f"{row.kl_mean:.4f}",
        "100 %" if original else f"{100 * row.top1_agreement:.1f} %",
        "" if original else f"{row.seconds:.0f}",
    ]


class _Remembering(nn.Module):
    """A model that keeps its logits: every row asks the original about the same tokens.

    32 768 tokens of 4 352 words in bf16 are 285 MB, and half of all evaluation time is saved.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self._outputs: dict[bytes, Any] = {}

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        key = input_ids.cpu().numpy().tobytes()
        if key not in self._outputs:
            self._outputs[key] = self.model(input_ids=input_ids, use_cache=use_cache)
        return self._outputs[key]


class _Step(NullProgress):
    """Lets one quantisation speak through the demo's own progress."""

    def __init__(self, outer: Progress, what: str) -> None:
        self._outer, self._what = outer, what
        outer.advance(0, what)

    def advance(self, units: int, label: str) -> None:
        self._outer.advance(units, f"{self._what}: {label}")


@contextmanager
def _folder(kept: Path, keep: bool) -> Iterator[Path]:
    """A path that does not exist yet: `kept`, or one in a temporary folder that goes away."""
    if keep:
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="erniequant-demo-") as parent:
        yield Path(parent) / kept.name


def _measure_size(model: nn.Module, total_bytes: int) -> _Size:
    experts = sum(p.numel() for p in expert_parameters(model).values())
    expert_bytes = sum(p.numel() * 2 for p in expert_parameters(model).values())
    total = sum(p.numel() for p in model.parameters())
    return _Size(experts, total, total_bytes - expert_bytes)


def _row(
    method: str, bits: int, measured: PerplexityResult, size: dict[str, float], seconds: float
) -> DemoRow:
    distance = measured.reference
    assert distance is not None
    return DemoRow(
        method=method,
        bits=bits,
        **size,
        perplexity=measured.perplexity,
        perplexity_stderr=measured.stderr,
        ratio=distance.ratio,
        ratio_stderr=distance.ratio_stderr,
        kl_mean=distance.kl_mean,
        top1_agreement=distance.top1_agreement,
        seconds=seconds,
    )
