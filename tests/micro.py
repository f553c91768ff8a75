"""The micro models' calibration text and options, and a stop after so many experts."""

from pathlib import Path

import torch

from erniequant.progress import NullProgress

CALIBRATION = {"calib_samples": 12, "calib_length": 64, "max_tp": 1, "effort": "fast"}
"""Options of a quantisation of the micro model that takes half a second."""

FASTDEPLOY = {"bits": 2, "format": "fastdeploy-wint2", "w4_layers": 1, "calib_samples": 12,
              "calib_length": 64, "device": "cpu"}  # fmt: skip
"""The same for FastDeploy, with experts in wint4 and in WINT2."""


def write_text(path: Path) -> Path:
    """3,000 characters, enough for 40 windows of 64 tokens."""
    generator = torch.Generator().manual_seed(11)
    letters = torch.randint(32, 125, (3000,), generator=generator).tolist()
    path.write_text("".join(map(chr, letters)))
    return path


class StopAfter(NullProgress):
    """Ends a run as Ctrl-C does when so many experts are done."""

    def __init__(self, units: int):
        self.left = units

    def advance(self, units: int, label: str) -> None:
        self.left -= units
        if self.left == 0:
            raise KeyboardInterrupt
