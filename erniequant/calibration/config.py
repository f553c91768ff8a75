"""The calibration source and how much of it to use."""

from dataclasses import dataclass

from erniequant.errors import ErnieQuantError

SURPLUS = 16
"""Reading stops at this many times the tokens asked for; a random choice of windows needs no
more."""


@dataclass(frozen=True)
class CalibrationConfig:
    """The calibration source and how much of it to use.

    ``source`` is ``builtin``, a file (`erniequant.data.files.ACCEPTED`), or
    ``hf:NAME[:SPLIT[:COLUMN]]``; records of files and data sets may have images
    (`erniequant.data.image_records`). ``chat_template`` ``apply`` renders chats with the model's
    template, ``none`` joins their contents.
    """

    source: str = "builtin"
    samples: int = 128
    length: int = 1024
    chat_template: str = "apply"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or self.length < 2:
            raise ErnieQuantError("calibration needs at least 1 sample of at least 2 tokens")
        if self.chat_template not in ("apply", "none"):
            raise ErnieQuantError(
                f"chat template must be apply or none, not {self.chat_template!r}"
            )

    @property
    def wanted(self) -> int:
        """Tokens of text after which reading stops."""
        return self.samples * self.length * SURPLUS
