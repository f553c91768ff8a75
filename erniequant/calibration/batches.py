"""Calibration on batches and token ids from Python: all of them, unchanged."""

from erniequant.calibration.texts import CalibrationWindows
from erniequant.data.given import BATCHES, Given, members
from erniequant.data.inputs import ModelInput, hash_inputs, sequences_of
from erniequant.errors import ErnieQuantError
from erniequant.models.images import ImageSettings


def batched_windows(
    data: Given, images: ImageSettings | None, vocabulary: int, most: int
) -> CalibrationWindows:
    """The sequences of batches that are ready for the model (`sequences_of`).

    Args:
        vocabulary: size of the model's vocabulary.
        most: anything but a list is read up to this many sequences, since it may never end.

    Raises:
        ErnieQuantError: there is none, or one contradicts itself or the model.
    """
    windows: list[ModelInput] = []
    for batch, where in members(data, BATCHES):
        for window in sequences_of(batch, images, where):
            _check_ids(window, vocabulary, where)
            if len(window):
                windows.append(window)
        if not data.sized and len(windows) >= most:
            windows = windows[:most]
            break
    if not windows:
        raise ErnieQuantError("the calibration batches hold no tokens; give at least one sequence")
    return CalibrationWindows(tuple(windows), hash_inputs(windows), "")


def _check_ids(window: ModelInput, vocabulary: int, where: str) -> None:
    beyond = window.ids[(window.ids < 0) | (window.ids >= vocabulary)]
    if len(beyond):
        raise ErnieQuantError(
            f"{where} has token id {int(beyond[0])}, but the model has ids from 0 to "
            f"{vocabulary - 1}; give ids of its own tokenizer"
        )
