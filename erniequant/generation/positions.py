"""Positions of a model, and how many of them an input takes."""

from typing import Any

from erniequant.data.inputs import ModelInput


def max_positions(model: Any) -> int | None:
    """Positions that the model was made for; None where its config does not say."""
    config = model.config.get_text_config()
    positions: int | None = getattr(config, "max_position_embeddings", None)
    return positions


def positions_of(entry: ModelInput) -> int:
    """Positions that an input takes."""
    # An image has more tokens than positions: its rows and columns share them.
    return len(entry) if entry.positions is None else int(entry.positions.max()) + 1
