"""The folder that a result is written to: opened for one run at a time, completed at the end."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from erniequant.checkpoint.files import disk_error, write_json
from erniequant.checkpoint.folder import REPORT_FILE
from erniequant.checkpoint.layout import index_of
from erniequant.checkpoint.reader import CONFIG_FILE, INDEX_FILE, WORK_FOLDER, Checkpoint
from erniequant.checkpoint.shards import ShardFiles
from erniequant.data.companions import write_companions
from erniequant.errors import ErnieQuantError
from erniequant.formats.base import OutputFormat
from erniequant.paths import expanded
from erniequant.quantization.report import QuantizationReport
from erniequant.resume.workfolder import WorkFolder

SIZE_TOLERANCE = 0.01
"""The result may differ from the planned size by this much, headers included."""

_SHARD = re.compile(r"\.?model(-\d{5}-of-\d{5})?\.safetensors(\.partial)?")


@contextmanager
def opened(
    destination: Path, work_dir: str | Path | None, resume: bool | None
) -> Iterator[WorkFolder]:
    """The locked work folder of a run into ``destination``, which is new, empty or the run's."""
    made = not destination.exists()
    try:
        destination.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(destination, error) from error
    try:
        work = WorkFolder(expanded(work_dir) if work_dir else destination / WORK_FOLDER)
        try:
            _prepare_destination(destination, work, resume)
            yield work
        finally:
            work.release()
    finally:
        if made and not any(destination.iterdir()):
            destination.rmdir()


def _prepare_destination(destination: Path, work: WorkFolder, resume: bool | None) -> None:
    if work.unfinished() and resume is False and not (destination / CONFIG_FILE).exists():
        for path in destination.iterdir():
            if _SHARD.fullmatch(path.name) or path.name in (INDEX_FILE, REPORT_FILE):
                path.unlink()
        work.clear()
        return
    if work.unfinished():
        return
    if resume:
        raise ErnieQuantError(
            f"there is no unfinished run in {work.folder}; leave out --resume to start one"
        )
    if any(path != work.folder for path in destination.iterdir()):
        raise ErnieQuantError(f"{destination} is not empty; give a new folder")


def complete(
    checkpoint: Checkpoint,
    output: OutputFormat,
    shards: ShardFiles,
    report: QuantizationReport,
) -> None:
    """Write everything that is not weights."""
    folder, plan = shards.folder, report.plan
    written = sum((folder / shard.file).stat().st_size for shard in shards.shards)
    headers = sum(len(shard.header) for shard in shards.shards)
    if abs(written - headers - plan.output_bytes) > SIZE_TOLERANCE * plan.output_bytes:
        raise ErnieQuantError(
            f"{folder} holds {written} bytes, but {plan.output_bytes} were planned; "
            "use --restart, and report this"
        )
    if len(shards.shards) > 1:
        write_json(folder / INDEX_FILE, index_of(shards.shards))
    write_companions(checkpoint.folder, folder)
    write_json(folder / REPORT_FILE, report.to_dict())
    # The config comes last: without it nothing takes the folder for a finished checkpoint.
    write_json(folder / CONFIG_FILE, output.config())
