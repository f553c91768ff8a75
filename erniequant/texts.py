"""Text from files, and the hash that says which tokens a figure was made with."""

import hashlib
from pathlib import Path

import torch

from erniequant.errors import ErnieQuantError


def read_text(path: Path) -> str:
    """The contents of a UTF-8 file.

    Raises:
        ErnieQuantError: it cannot be read, is not UTF-8, or holds nothing but space.
    """
    if path.exists() and not path.is_file():
        # A pipe or a device may never end.
        raise ErnieQuantError(f"cannot read {path}: it is not a file; check the path")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ErnieQuantError(f"cannot read {path}: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise ErnieQuantError(
            f"{path} is not UTF-8 (byte {error.start}): convert it to UTF-8 text"
        ) from error
    if not text.strip():
        raise ErnieQuantError(f"{path} holds no text: give a file with words in it")
    return text


def hash_token_ids(token_ids: torch.Tensor) -> str:
    """SHA-256 of the ids as little-endian 32-bit integers, one after the other."""
    return hashlib.sha256(token_ids.numpy().astype("<i4").tobytes()).hexdigest()
