"""The report of a quantisation: sizes, errors, tokens per expert, fallbacks; also written as JSON
beside the weights."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from erniequant.encoding.hessian import DEGRADED_DAMPING
from erniequant.errors import ErnieQuantError
from erniequant.formats.plan import Plan
from erniequant.models.architecture import ExpertGroup
from erniequant.quantization.estimate import Estimate


@dataclass(frozen=True)
class MatrixReport:
    """One projection of one expert. ``error`` is ``tr(E H E^T) / tr(W H W^T)`` on the calibration
    tokens, with ``E`` the difference from what the matrix aimed at (`quantization.targets`).

    ``experts`` names the group of experts where a layer has several, and ``expert`` counts within
    it.
    """

    layer: int
    experts: str
    expert: int
    projection: str
    tokens: int
    dropped_tokens: int
    error: float
    damping: float
    fallback: str | None

    @classmethod
    def from_event(
        cls, event: Mapping[str, Any], projection: str, groups: Sequence[ExpertGroup], where: Path
    ) -> "MatrixReport":
        """The report of one matrix from an expert's event in the journal; ``where`` names the line.

        Raises:
            ErnieQuantError: the line is not of this program.
        """
        outcome = event[projection]
        error, damping, fallback = (outcome.get(key) for key in ("error", "damping", "fallback"))
        if not isinstance(error, float | int) or not isinstance(damping, float | int):
            raise ErnieQuantError(
                f"{where} has no error of layer {event['layer']} expert {event['expert']}; "
                "use --restart"
            )
        group = next(group for group in groups if event["expert"] in group.numbers)
        return cls(
            event["layer"],
            group.name if len(groups) > 1 else "",
            event["expert"] - group.first,
            projection,
            event["tokens"],
            event["dropped_tokens"],
            float(error),
            float(damping),
            None if fallback is None else str(fallback),
        )

    @property
    def place(self) -> int | str:
        """The layer, or a layer's group of experts where there are several."""
        return f"{self.layer}.{self.experts}" if self.experts else self.layer

    def degraded(self, calibrated: bool) -> bool:
        """Quantised on less than the calibration was meant to give: no tokens, bad values or heavy
        damping."""
        unseen = calibrated and self.tokens == 0
        return unseen or self.dropped_tokens > 0 or self.damping > DEGRADED_DAMPING


@dataclass(frozen=True)
class CalibrationReport:
    """The text that was used; ``None`` in its place means no calibration. ``vision_tokens`` went to
    vision experts."""

    source: str
    windows: int
    tokens: int
    sha256: str
    rendered: str
    images: int = 0
    vision_tokens: int = 0


@dataclass(frozen=True)
class TunedReport:
    """What training did in one layer, or, where ``layer`` is the number of layers, in the whole
    model.

    Attributes:
        before, after: loss on held-out windows: the relative squared error of a layer's outputs,
            or the KL divergence of the model in nats.
        epochs: passes over the other windows that were kept; 0 if none was an improvement.
        moved: how far each trained tensor moved, relative to its length, by its name.
    """

    layer: int
    before: float
    after: float
    epochs: int
    moved: dict[str, float]


TUNED_KEYS = tuple(field.name for field in fields(TunedReport))
"""Names of the values of a `TunedReport`, which are those in the journal."""


@dataclass(frozen=True)
class QuantizationReport:
    """Result of `erniequant.quantize`; ``matrices`` is empty after a dry run.

    ``measured`` has what ``predicted`` predicts, None after a dry run; ``sessions`` counts how
    often the run was begun or continued; ``layer_seconds`` are the times worked when each layer
    was finished. ``left_behind`` names what is in the source's folder and not in the result.
    """

    plan: Plan
    plan_text: str
    calibration: CalibrationReport | None
    matrices: tuple[MatrixReport, ...]
    predicted: Estimate
    measured: Estimate | None
    sha256: dict[str, str]
    sessions: int = 1
    layer_seconds: tuple[float, ...] = ()
    dry_run: bool = False
    left_behind: tuple[str, ...] = ()
    max_degraded: int = 0
    tuned: tuple[TunedReport, ...] = ()

    @property
    def seconds(self) -> float:
        """Time worked, in all sessions."""
        return self.measured.seconds if self.measured else 0.0

    @property
    def peak_memory_bytes(self) -> int:
        """Peak resident memory of the last session."""
        return self.measured.peak_memory_bytes if self.measured else 0

    @property
    def degraded(self) -> int:
        """Number of degraded expert matrices."""
        return sum(m.degraded(self.calibration is not None) for m in self.matrices)

    @property
    def is_degraded(self) -> bool:
        """True if more matrices are degraded than ``max_degraded``."""
        return self.degraded > self.max_degraded

    def layer_errors(self) -> dict[int | str, dict[str, float]]:
        """Mean relative error of each projection by `MatrixReport.place`."""
        sums: dict[int | str, dict[str, list[float]]] = {}
        for matrix in self.matrices:
            sums.setdefault(matrix.place, {}).setdefault(matrix.projection, []).append(matrix.error)
        return {
            place: {name: sum(errors) / len(errors) for name, errors in by_name.items()}
            for place, by_name in sums.items()
        }

    def tokens_per_expert(self) -> dict[int | str, list[int]]:
        """Routed tokens of each expert by `MatrixReport.place`."""
        counts: dict[int | str, list[int]] = {}
        for matrix in self.matrices:
            if matrix.projection == "down_proj":
                counts.setdefault(matrix.place, []).append(matrix.tokens)
        return counts

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        plan = self.plan
        return {
            "bits": plan.options.bits,
            "effort": plan.options.effort,
            "seed": plan.options.seed,
            "tune": plan.options.tune,
            "sensitivity": plan.options.sensitivity,
            "dry_run": self.dry_run,
            "format": dict(plan.settings),
            "tensors": {"quantized": len(plan.quantized), "copied": len(plan.copied)},
            "tensor_groups": [asdict(group) for group in plan.groups],
            "bits_per_weight": {
                "experts": plan.expert_bits_per_weight,
                "total": plan.total_bits_per_weight,
            },
            "bytes": {"before": plan.source_bytes, "after": plan.output_bytes},
            "calibration": asdict(self.calibration) if self.calibration else None,
            "left_behind": list(self.left_behind),
            "mtp_tensors": list(plan.mtp),
            "seconds": self.seconds,
            "sessions": self.sessions,
            "layer_seconds": list(self.layer_seconds),
            "predicted": asdict(self.predicted),
            "measured": asdict(self.measured) if self.measured else None,
            "degraded": self.degraded,
            "layer_errors": self.layer_errors(),
            "tokens_per_expert": self.tokens_per_expert(),
            "fallbacks": [asdict(m) for m in self.matrices if m.fallback is not None],
            "tuned": [asdict(stage) for stage in self.tuned],
            "matrices": [asdict(m) for m in self.matrices],
            "sha256": self.sha256,
        }
