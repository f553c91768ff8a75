"""Run a checkpoint of FastDeploy in transformers: decoded as it is loaded.

Nothing stays packed: the model takes the memory of the original.
"""

from pathlib import Path
from typing import Any

import torch

from erniequant.checkpoint.reader import CONFIG_FILE, read_json
from erniequant.errors import ErnieQuantError, foreign_errors
from erniequant.fastdeploy.config import is_fastdeploy_wint2
from erniequant.fastdeploy.reader import open_fastdeploy


def is_fastdeploy_folder(source: str | Path) -> bool:
    """Whether a local folder is a checkpoint of FastDeploy with WINT2, in rank folders or not."""
    path = Path(source).expanduser() / CONFIG_FILE
    return path.is_file() and is_fastdeploy_wint2(read_json(path))


def load_fastdeploy(
    source: str | Path,
    device: torch.device,
    dtype: torch.dtype | str,
    k_order: str | None = None,
) -> Any:
    """The stock model of the decoded weights.

    Args:
        source: folder, with or without rank folders, or Hugging Face id.
        dtype: of weights and activations; "auto" is bfloat16.
        k_order: of WINT2, where the files do not say.

    Raises:
        ErnieQuantError: a tensor is missing, left over, or of another kind than FastDeploy asks
            for, or nobody says which K order it has.
    """
    from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM

    opened = open_fastdeploy(source, k_order)
    for rank in opened.ranks:
        rank.fetch()
    wanted = torch.bfloat16 if isinstance(dtype, str) else dtype
    state = {name: opened.tensor(name) for name in opened.names()}
    state = {n: t if t.dtype == torch.float32 and _stays(n) else t.to(wanted)
             for n, t in state.items()}  # fmt: skip
    with foreign_errors(f"transformers cannot load {opened.folder}"):
        config = Ernie4_5_MoeConfig(**opened.config)
        kind: Any = Ernie4_5_MoeForCausalLM
        model, info = kind.from_pretrained(
            None, config=config, state_dict=state, dtype=wanted, output_loading_info=True
        )
    optional = {name for name in info["missing_keys"] if "e_score_correction_bias" in name}
    for names, what in (
        (set(info["missing_keys"]) - optional, "is missing"),
        (set(info["unexpected_keys"]), "is left over"),
    ):
        if names:
            raise ErnieQuantError(f"{opened.folder}: tensor {min(names)} {what}")
    model.name_or_path = str(opened.folder)
    with foreign_errors(f"the model of {opened.folder} cannot be moved to {device}"):
        return model.to(device)


def _stays(name: str) -> bool:
    """Whether transformers keeps a tensor in float32: routers and their biases."""
    return ".mlp.gate." in name or "e_score_correction_bias" in name
