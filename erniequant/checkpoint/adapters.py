"""PEFT adapters in a checkpoint's folder. transformers loads them on top of the weights beside
them, so the weights alone are not the folder's model."""

from pathlib import Path

from erniequant.checkpoint.config import read_json
from erniequant.errors import ErnieQuantError

ADAPTER_FILE = "adapter_config.json"
_MERGE = "merge it (peft: merge_and_unload, then save_pretrained into a new folder)"


def adapter_problem(folder: Path) -> str | None:
    """The problem with a folder of weights that also has an adapter; None without one."""
    if not (folder / ADAPTER_FILE).exists():
        return None
    return (
        f"{folder} has an adapter beside its weights ({ADAPTER_FILE}), which transformers would "
        f"load on top of them; {_MERGE}, or move {ADAPTER_FILE} out of the folder"
    )


def require_no_adapter(folder: Path) -> None:
    """Raises ErnieQuantError with the `adapter_problem`, if there is one."""
    problem = adapter_problem(folder)
    if problem is not None:
        raise ErnieQuantError(problem)


def refuse_adapter_alone(folder: Path) -> None:
    """Refuse a folder that has an adapter but no weights, naming the base model.

    Raises:
        ErnieQuantError: it has one.
    """
    path = folder / ADAPTER_FILE
    if not path.exists():
        return
    base = read_json(path).get("base_model_name_or_path")
    named = f"the model {base}" if isinstance(base, str) and base else "a model it does not name"
    raise ErnieQuantError(
        f"{folder} holds only an adapter ({ADAPTER_FILE}) for {named}; give that model, or "
        f"{_MERGE} and give the new folder"
    )
