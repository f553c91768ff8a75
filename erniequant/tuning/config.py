"""How the unpacked parameters of a quantised model are trained."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Training:
    """Adam over the calibration windows.

    Attributes:
        epochs: passes over the windows that are trained on, at most.
        windows_per_step: windows whose gradients make one step.
        rate: first step of norms and output scales, relative to their root mean square.
        matrix_rate: the same for matrices.
        heldout: one window in so many is not trained on, and says when to stop.
    """

    epochs: int
    windows_per_step: int
    rate: float
    matrix_rate: float
    heldout: int = 4


LAYER = Training(epochs=2, windows_per_step=2, rate=3e-3, matrix_rate=3e-3)
MODEL = Training(epochs=2, windows_per_step=1, rate=5e-3, matrix_rate=2e-3)
