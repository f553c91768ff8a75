"""The folder in which an unfinished run lives: its lock, its journal, and the hidden states after
the last finished layer.

By default it is inside the destination. A folder with a journal is an unfinished run; when the run
is complete, the folder goes.
"""

import contextlib
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from erniequant.calibration.rows import Rows
from erniequant.checkpoint.files import delete, disk_error, write_file
from erniequant.checkpoint.reader import WORK_FOLDER
from erniequant.errors import ErnieQuantError
from erniequant.resume.journal import Journal
from erniequant.resume.lock import Lock

_JOURNAL, _LOCK = "journal.jsonl", "lock"
_LAST = {_JOURNAL: 1, _LOCK: 2}
_STATES = "states-{layer:05d}.f32"
_KEPT = re.compile(r"states-\d{5,}\.f32")
_TENSORS = re.compile(r"(tuned|gradient)-\d{5,}\.safetensors")
# The last are mapped tables, which have a name for a moment where files without one cannot be made.
_OURS = re.compile(
    rf"journal\.jsonl|lock|{_KEPT.pattern}|{_TENSORS.pattern}"
    rf"|\.(journal\.jsonl|{_KEPT.pattern}|{_TENSORS.pattern})\.partial"
    r"|rows-[a-z0-9_]{8}"
)
_BLOCK = 1 << 22
"""Numbers written or read at once."""


class WorkFolder:
    """A locked work folder.

    Attributes:
        journal: journal of the run, once `begin` was called.
    """

    def __init__(self, folder: Path):
        """Make and lock it. Raises ErnieQuantError if that fails or another run holds it."""
        self.folder = folder
        self._made, self._removed = not folder.exists(), False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            foreign = sorted(p.name for p in folder.iterdir() if not _OURS.fullmatch(p.name))
        except OSError as error:
            raise disk_error(folder, error) from error
        if foreign:
            raise ErnieQuantError(
                f"the work folder {folder} holds {foreign[0]}, which is not erniequant's; give "
                "a folder of its own with --work-dir"
            )
        self._lock = Lock(folder / _LOCK)
        self.journal: Journal

    def unfinished(self) -> bool:
        """True if a run was begun here and not completed."""
        return (self.folder / _JOURNAL).exists()

    def begin(self, identity: dict[str, Any]) -> None:
        """Start the journal of a new run, or continue the one that is there.

        Raises:
            ErnieQuantError: the run that is there differs in ``identity``; says in what.
        """
        path = self.folder / _JOURNAL
        if not path.exists():
            self.journal = Journal.create(path, identity)
        else:
            self.journal = Journal.open(path)
            changed = describe_changes(self.journal.identity, identity)
            if changed:
                raise ErnieQuantError(
                    f"{self.folder} holds an unfinished run that differs: {'; '.join(changed)}. "
                    "Repeat its command to continue it, or add --restart to start over"
                )
        self.journal.append("session")

    def clear(self) -> None:
        """Forget the unfinished run. Raises ErnieQuantError if the disk refuses."""
        for path in self._files(_OURS):
            if path.name != _LOCK:
                delete(path)

    def save_states(self, layer: int, tables: Sequence[Rows]) -> None:
        """Keep the hidden states that go into ``layer`` and drop those of the layer before."""
        digest = hashlib.sha256()

        def write(file: Any) -> None:
            for block in _blocks(tables):
                data = block.numpy().data
                digest.update(data)
                file.write(data)

        path = self.folder / _STATES.format(layer=layer)
        write_file(path, write)
        self.journal.append("states", layer=layer, sha256=digest.hexdigest())
        for old in self._files(_KEPT):
            if old != path:
                delete(old)

    def load_states(self, tables: Sequence[Rows]) -> int:
        """Fill ``tables`` with the last states kept; returns the layer that they go into, 0
        without any.

        Raises:
            ErnieQuantError: the file is not what was written.
        """
        saved = self.journal.of("states")
        if not saved:
            return 0
        path = self.folder / _STATES.format(layer=saved[-1]["layer"])
        digest = hashlib.sha256()
        try:
            whole = path.stat().st_size == sum(table.tensor.nbytes for table in tables)
            with path.open("rb") as file:
                for block in _blocks(tables):
                    data = block.numpy().data
                    file.readinto(data)
                    digest.update(data)
        except OSError as error:
            raise disk_error(path, error, "read") from error
        if not whole or digest.hexdigest() != saved[-1]["sha256"]:
            raise ErnieQuantError(f"{path} is damaged: its sha256 differs; use --restart")
        return int(saved[-1]["layer"])

    def save_tensors(self, kind: str, layer: int, tensors: Mapping[str, torch.Tensor]) -> str:
        """Keep tensors of a layer in a file of their own; returns its sha256.

        kind: "tuned" or "gradient".
        """
        data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        write_file(self._tensors_file(kind, layer), lambda file: file.write(data))
        return hashlib.sha256(data).hexdigest()

    def load_tensors(self, kind: str, layer: int, sha256: str) -> dict[str, torch.Tensor]:
        """What `save_tensors` kept.

        Raises:
            ErnieQuantError: the file is not what was written.
        """
        path = self._tensors_file(kind, layer)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise disk_error(path, error, "read") from error
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ErnieQuantError(f"{path} is damaged: its sha256 differs; use --restart")
        return load(data)

    def drop_tensors(self, kind: str, layer: int) -> None:
        """Delete the file of `save_tensors`, if it is there."""
        path = self._tensors_file(kind, layer)
        if path.exists():
            delete(path)

    def _tensors_file(self, kind: str, layer: int) -> Path:
        return self.folder / f"{kind}-{layer:05d}.safetensors"

    def release(self) -> None:
        """Unlock; a folder that was made for nothing is removed."""
        try:
            # Once it is removed, anything there belongs to another run.
            if not self._removed and not self.unfinished():
                self.remove()
        finally:
            self._lock.release()

    def remove(self) -> None:
        """Delete everything of ours; the folder too, unless it was there before us.

        Raises:
            ErnieQuantError: the disk refuses.
        """
        # The journal goes last but one: as long as it is there, the run can be continued.
        for path in sorted(self._files(_OURS), key=lambda p: _LAST.get(p.name, 0)):
            delete(path)
        self._removed = True
        if self._made or self.folder.name == WORK_FOLDER:
            with contextlib.suppress(OSError):  # it holds something that is not ours
                self.folder.rmdir()

    def _files(self, names: re.Pattern[str]) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return [path for path in self.folder.iterdir() if names.fullmatch(path.name)]


_SOURCE, _TEXT = "--calib", "the calibration text"


def describe_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Differences between two identities, one phrase each. The same text in another file is no
    difference."""
    names = [*before, *(name for name in now if name not in before)]
    same_text = before.get(_TEXT) is not None and before.get(_TEXT) == now.get(_TEXT)
    return [
        f"{name} was {_short(before.get(name))}, now {_short(now.get(name))}"
        for name in names
        if before.get(name) != now.get(name) and not (name == _SOURCE and same_text)
    ]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"


def _blocks(tables: Sequence[Rows]) -> Iterable[torch.Tensor]:
    for table in tables:
        for block in table.tensor.view(-1).split(_BLOCK):
            yield block
            table.release()
