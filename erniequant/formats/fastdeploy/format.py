"""FastDeploy's format as a row of the registry; docs/fastdeploy.md."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from erniequant.checkpoint.reader import Checkpoint
from erniequant.errors import ErnieQuantError
from erniequant.formats.base import Format, OutputFormat, ReadOptions
from erniequant.formats.fastdeploy.recognise import is_fastdeploy_wint2
from erniequant.formats.plan import Plan, QuantizeOptions
from erniequant.formats.results import ExportReport, ModelSummary, VerifyReport, WrittenShards
from erniequant.models.architecture import Architecture

# Weights per second and core that the encoder of WINT2 finds.
_ENCODE_RATE = 300_000.0


class FastDeployFormat(Format):
    """Experts in WINT2 and wint4, everything else in wint8."""

    name = "fastdeploy-wint2"
    title = "FastDeploy"
    own_options = ("k_order", "w4_layers")

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return is_fastdeploy_wint2(config)

    def check(self, options: QuantizeOptions) -> None:
        if options.bits != 2:
            raise ErnieQuantError(
                f"{self.name} has 2 bits, not {options.bits}; use --bits 2, and --w4-layers for "
                "layers of 4 bits"
            )
        if options.search != "cpu":
            raise ErnieQuantError(
                f"{self.name} has no codes to search on a GPU; leave --search {options.search} out"
            )

    def output(
        self, checkpoint: Checkpoint, model: Architecture, options: QuantizeOptions
    ) -> tuple[OutputFormat, Plan]:
        from erniequant.formats.fastdeploy.output import fastdeploy_output

        return fastdeploy_output(checkpoint, model, options)

    def load(
        self,
        source: str | Path,
        device: torch.device,
        dtype: torch.dtype | str,
        read: ReadOptions,
    ) -> tuple[Any, Path]:
        from erniequant.formats.fastdeploy.load import load_fastdeploy

        model = load_fastdeploy(source, device, dtype, read.k_order, read.reference)
        return model, Path(model.name_or_path)

    def inspect(self, source: str | Path) -> ModelSummary:
        from erniequant.formats.fastdeploy.inspect import inspect_fastdeploy

        return inspect_fastdeploy(source)

    def verify(self, source: str | Path, reference: str | Path | None) -> VerifyReport:
        from erniequant.formats.fastdeploy.verify import verify_fastdeploy

        return verify_fastdeploy(source, reference)

    def export(
        self,
        source: str | Path,
        destination: str | Path,
        to: str,
        read: ReadOptions,
        max_shard_bytes: int,
    ) -> ExportReport:
        from erniequant.formats.fastdeploy.export import export_bf16

        return export_bf16(
            source, destination, to, k_order=read.k_order, reference=read.reference,
            max_shard_bytes=max_shard_bytes,
        )  # fmt: skip

    def reshard(
        self, source: str | Path, destination: str | Path, ranks: int, read: ReadOptions
    ) -> WrittenShards:
        from erniequant.formats.fastdeploy.reshard import reshard

        return reshard(source, destination, tensor_parallel=ranks, k_order=read.k_order)

    def encoder_bytes(self, inputs: int) -> int:
        """A third float64 copy of the moments, and errors of some outputs for each code book."""
        from erniequant.formats.fastdeploy.ccq.books import BOOKS
        from erniequant.formats.fastdeploy.ccq.encode import CHUNK

        return 8 * inputs**2 + 4 * CHUNK * len(BOOKS) * inputs

    def encode_rate(self, options: QuantizeOptions) -> float:
        return _ENCODE_RATE


FORMAT = FastDeployFormat()
