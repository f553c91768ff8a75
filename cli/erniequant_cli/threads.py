"""How torch's threads wait, which is read from the environment when torch is loaded.

They spin for milliseconds after each product, on the cores that our own threads need next: a token
of the 21B took 0.31 s instead of 0.24 s on two cores.
"""

import os

_VARIABLE = "OMP_WAIT_POLICY"
_AS_GIVEN = os.environ.get(_VARIABLE)


def wait_passively() -> None:
    """Have them sleep, unless the user has chosen."""
    os.environ.setdefault(_VARIABLE, "passive")


def wait_as_given() -> None:
    """Undo it, for another program that takes this one's place and has threads of its own."""
    if _AS_GIVEN is None:
        os.environ.pop(_VARIABLE, None)
