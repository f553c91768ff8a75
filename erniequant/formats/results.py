"""Results of every format's verbs: a summary, a verification, an export."""

from dataclasses import asdict, dataclass
from typing import Any

GUARD_CODE = "guard"


@dataclass(frozen=True)
class TensorSummary:
    """One stored tensor.

    ``code`` names code and register length of a quantised one ("cc2/12"), is "guard" for a guard,
    and None for a tensor that was kept as it is.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    n_bytes: int
    shard: str
    code: str | None

    @property
    def quantized(self) -> bool:
        """True if it holds part of quantised weights."""
        return self.code not in (None, GUARD_CODE)


@dataclass(frozen=True)
class ModelSummary:
    """A checkpoint at a glance. Bits per weight count every stored byte, scales and signs included.

    ``codes`` counts layers by description of their code; ``expert_weights`` are routed experts,
    in a dense model the MLPs, whether quantised or not. ``notes`` tell of what else in the folder
    keeps it from being loaded as it is.
    """

    folder: str
    model_type: str
    format_version: int | None
    producer: str | None
    quantized_layers: tuple[str, ...]
    codes: dict[str, int]
    expert_weights: int
    expert_bytes: int
    total_weights: int
    total_bytes: int
    provenance: dict[str, Any]
    tensors: tuple[TensorSummary, ...]
    notes: tuple[str, ...] = ()

    @property
    def expert_bits_per_weight(self) -> float:
        """Stored bits of routed experts by their number of weights; 0 without experts."""
        return 8 * self.expert_bytes / self.expert_weights if self.expert_weights else 0.0

    @property
    def total_bits_per_weight(self) -> float:
        """Stored bits of everything by the number of weights of the original."""
        return 8 * self.total_bytes / self.total_weights if self.total_weights else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        result = asdict(self)
        for entry, tensor in zip(result["tensors"], self.tensors, strict=True):
            entry["quantized"] = tensor.quantized
        result["bits_per_weight"] = {
            "experts": self.expert_bits_per_weight,
            "total": self.total_bits_per_weight,
        }
        result["gigabytes"] = self.total_bytes / 1e9
        return result


@dataclass(frozen=True)
class MatrixError:
    """Relative squared error ``|W - W_ref|^2 / |W_ref|^2`` of one original matrix."""

    name: str
    error: float


@dataclass(frozen=True)
class VerifyReport:
    """Outcome of a verification; problems are one line each.

    ``checksums`` gives "ok", "differs" or "missing" for every file that the report beside the
    weights lists; ``errors`` is empty without a reference."""

    folder: str
    problems: tuple[str, ...]
    tensors: int
    decoded_matrices: int
    checksums: dict[str, str]
    errors: tuple[MatrixError, ...]

    @property
    def ok(self) -> bool:
        """True if nothing is wrong."""
        return not self.problems

    @property
    def mean_error(self) -> float | None:
        """Mean relative error of all matrices, None without a reference."""
        if not self.errors:
            return None
        return sum(entry.error for entry in self.errors) / len(self.errors)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {"ok": self.ok, **asdict(self), "mean_error": self.mean_error}


@dataclass(frozen=True)
class ExportReport:
    """Outcome of an export; ``left_behind`` names what else is in the source's folder."""

    folder: str
    to: str
    tensors: int
    total_bytes: int
    sha256: dict[str, str]
    left_behind: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


@dataclass(frozen=True)
class WrittenShards:
    """Shards that were written: sha256 of each by path below the folder, bytes and number of all
    tensors; ``left_out`` are tensors of the original that the format has no place for."""

    folder: str
    sha256: dict[str, str]
    total_bytes: int
    tensors: int
    left_out: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)
