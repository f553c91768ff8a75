"""How the next token is chosen."""

import math
from dataclasses import dataclass
from typing import Any

from erniequant.errors import ErnieQuantError

COLDEST = 1e-6
"""Lower temperatures count as 0: logits divided by them overflow float32."""


@dataclass(frozen=True)
class Sampling:
    """What is None is as the model's generation_config has it. Temperature 0 always takes the
    likeliest token; above 0, equal seeds give equal texts on one machine.

    Raises:
        ErnieQuantError: temperature is negative or not finite, or top_p is not above 0 and at most
            1.
    """

    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature is not None:
            require_temperature(self.temperature)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ErnieQuantError(f"top-p {self.top_p} is not above 0 and at most 1; try 0.9")

    def arguments(self) -> dict[str, Any]:
        """Arguments of transformers' `generate`."""
        if self.temperature is not None and self.temperature < COLDEST:
            return {"do_sample": False}
        given = {"temperature": self.temperature, "top_p": self.top_p}
        given = {name: value for name, value in given.items() if value is not None}
        return {"do_sample": True, **given} if given else {}


def require_temperature(temperature: float) -> None:
    """Raises ErnieQuantError if it is negative or not finite."""
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ErnieQuantError(f"temperature {temperature} is not a number from 0 up; try 0.8")
