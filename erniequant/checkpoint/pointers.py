"""Git LFS leaves a small text in place of a file that it has not downloaded; read as the file, it
looks like damage of any kind."""

from pathlib import Path

from erniequant.errors import ErnieQuantError

_BEGINNINGS = (
    b"version https://git-lfs.github.com/spec/",
    b"version https://hawser.github.com/spec/",
)
_LENGTH = max(map(len, _BEGINNINGS))


def is_pointer(data: bytes) -> bool:
    """True if a file that begins with ``data`` is a pointer."""
    return data.startswith(_BEGINNINGS)


def refuse_pointer(path: Path, data: bytes | None = None) -> None:
    """Refuse a file that is a pointer; its first bytes are read unless given.

    A file that cannot be read passes: what reads it next says why.

    Raises:
        ErnieQuantError: it is one.
    """
    if data is None:
        try:
            with path.open("rb") as file:
                data = file.read(_LENGTH) if path.is_file() else b""
        except OSError:
            return
    if is_pointer(data):
        raise ErnieQuantError(
            f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in "
            f"{path.parent}, or download the file"
        )
