"""Checkpoints on Hugging Face: small files at once, headers of shards by a few requests, shards
when they are needed.

So a plan needs no weights, and damage in an early shard is found before the last is downloaded.
"""

from pathlib import Path
from typing import Any

from erniequant.checkpoint.adapters import ADAPTER_FILE
from erniequant.checkpoint.config import CONFIG_FILE
from erniequant.checkpoint.folder import COMPANIONS, LICENCES, REPORT_FILE, TEMPLATES_FOLDER
from erniequant.errors import ErnieQuantError, wrap_errors

SMALL_FILES = (
    CONFIG_FILE,
    "*.index.json",
    ADAPTER_FILE,
    REPORT_FILE,
    f"{TEMPLATES_FOLDER}/*.jinja",
    *COMPANIONS,
    *LICENCES,
    *map(str.upper, LICENCES),
)


class HubRepository:
    """A model repository at the commit that its name meant when it was opened.

    Attributes:
        folder: the folder in the local cache that holds the small files.
    """

    def __init__(self, name: str):
        """Download the small files. Raises ErnieQuantError if that fails."""
        from huggingface_hub import snapshot_download

        self.name = name
        self.folder = Path(_ask(name, snapshot_download, name, allow_patterns=list(SMALL_FILES)))
        # The cache names a snapshot's folder after its commit.
        self._revision = self.folder.name

    def remote_headers(self) -> dict[str, dict[str, Any]]:
        """Headers of all shards by file name, as in the files: dtype, shape and data_offsets by
        tensor.

        Raises:
            ErnieQuantError: they cannot be fetched.
        """
        from huggingface_hub import get_safetensors_metadata

        repository = _ask(self.name, get_safetensors_metadata, self.name, revision=self._revision)
        return {
            file: {
                name: {
                    "dtype": tensor.dtype,
                    "shape": list(tensor.shape),
                    "data_offsets": list(tensor.data_offsets),
                }
                for name, tensor in metadata.tensors.items()
            }
            for file, metadata in repository.files_metadata.items()
        }

    def fetch(self, shard: str) -> Path:
        """Download a shard into `folder` unless it is there.

        Raises:
            ErnieQuantError: the download fails; what has arrived is kept for the next attempt.
        """
        from huggingface_hub import hf_hub_download

        path = self.folder / shard
        if not path.is_file():
            _ask(self.name, hf_hub_download, self.name, shard, revision=self._revision)
        if not path.is_file():
            raise ErnieQuantError(f"{self.name}: {shard} was downloaded, but is not at {path}")
        return path


def _ask(name: str, function: Any, *arguments: Any, **options: Any) -> Any:
    with wrap_errors(f"no folder {name}, and it cannot be fetched from Hugging Face"):
        return function(*arguments, **options)
