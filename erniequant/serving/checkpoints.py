"""Whether a checkpoint can be served, from its config.json and headers: before weights are read."""

from pathlib import Path

from erniequant.checkpoint.adapters import require_no_adapter
from erniequant.checkpoint.hub import SMALL_FILES
from erniequant.checkpoint.reader import Checkpoint, open_checkpoint
from erniequant.errors import wrap_errors
from erniequant.models.config_check import require_fit
from erniequant.models.header_check import require_sound


def require_servable(source: str | Path) -> Checkpoint | None:
    """The checkpoint in ``source``, a folder or a Hugging Face id; of the latter only headers are
    fetched. None for a folder without weights, of which vLLM makes a model to time.

    Raises:
        ErnieQuantError: a tensor is missing, left over, or of another shape or dtype.
    """
    folder = Path(source)
    if folder.is_dir() and not any(folder.glob("*.safetensors*")):
        return None
    checkpoint = open_checkpoint(source)
    require_no_adapter(checkpoint.folder)
    check = require_sound(checkpoint)
    require_fit(checkpoint.config, checkpoint.headers, {layer.key for layer in check.layers})
    return checkpoint


def small_files(source: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint or, for a Hugging Face id, one with everything but its weights.

    Raises:
        ErnieQuantError: it cannot be fetched.
    """
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    with wrap_errors(f"no folder {source}, and it cannot be fetched from Hugging Face"):
        return Path(
            snapshot_download(str(source), revision=revision, allow_patterns=list(SMALL_FILES))
        )
