"""Our own format as a row of the registry. Plain checkpoints are loaded and inspected here too."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from erniequant.checkpoint.layout import OutputTensor
from erniequant.checkpoint.reader import Checkpoint
from erniequant.codes import encode_rate
from erniequant.formats.base import Format, OutputFormat, ReadOptions
from erniequant.formats.native.search import require_search
from erniequant.formats.native.specs import (
    code_of,
    expert_tensors,
    settings_of,
    specs_of,
    wording_of,
)
from erniequant.formats.plan import Plan, PlanWording, QuantizeOptions, make_plan
from erniequant.formats.results import ExportReport, ModelSummary, VerifyReport
from erniequant.formats.rows import NATIVE
from erniequant.models.architecture import Architecture
from erniequant.packing.experts import is_quantized


class NativeFormat(Format):
    """docs/format.md."""

    name = NATIVE
    title = "erniequant"
    own_options = ("code",)

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return is_quantized(dict(config))

    def check(self, options: QuantizeOptions) -> None:
        """Every width; the code must be one of it, and searched where that is possible."""
        code_of(options)
        require_search(options.search)

    def output(
        self, checkpoint: Checkpoint, model: Architecture, options: QuantizeOptions
    ) -> tuple[OutputFormat, Plan]:
        from erniequant.formats.native.output import NativeOutput

        specs = {}

        def contents(
            copied: tuple[str, ...],
        ) -> tuple[tuple[OutputTensor, ...], int, Mapping[str, Any], PlanWording]:
            specs.update(specs_of(model.sizes, options))
            return (
                expert_tensors(model.sizes, specs),
                sum(checkpoint.header(name).n_bytes for name in copied),
                settings_of(specs),
                wording_of(model.sizes, specs),
            )

        plan = make_plan(checkpoint, model, options, contents)
        return NativeOutput(checkpoint, plan, specs), plan

    def load(
        self,
        source: str | Path,
        device: torch.device,
        dtype: torch.dtype | str,
        read: ReadOptions,
    ) -> tuple[Any, Path]:
        from erniequant.formats.native.load import load_native

        return load_native(source, device, dtype)

    def inspect(self, source: str | Path) -> ModelSummary:
        from erniequant.formats.native.inspect import inspect_native

        return inspect_native(source)

    def verify(self, source: str | Path, reference: str | Path | None) -> VerifyReport:
        from erniequant.formats.native.verify import verify_native

        return verify_native(source, reference)

    def export(
        self,
        source: str | Path,
        destination: str | Path,
        to: str,
        read: ReadOptions,
        max_shard_bytes: int,
    ) -> ExportReport:
        from erniequant.formats.native.export import export_native

        return export_native(source, destination, to, max_shard_bytes)

    def encoder_bytes(self, inputs: int) -> int:
        return 0

    def encode_rate(self, options: QuantizeOptions) -> float:
        return encode_rate(code_of(options))


FORMAT = NativeFormat()
