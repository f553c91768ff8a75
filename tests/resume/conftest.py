"""A child that runs quantisations, and the micro model's uninterrupted result."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.micro import CALIBRATION
from tests.resume.kills import Driver, contents


@pytest.fixture(scope="session")
def driver() -> Iterator[Driver]:
    found = Driver()
    yield found
    found.close()


@pytest.fixture(scope="session")
def options(micro_text: Path) -> dict[str, Any]:
    """Of every quantisation that training does not matter to."""
    return {"bits": 2, "calib": str(micro_text), "threads": 1, "tune": "none", **CALIBRATION}


@pytest.fixture(scope="session")
def tuned_options(micro_text: Path) -> dict[str, Any]:
    """Of a quantisation that trains every layer, and the whole model. Of twelve windows one is held
    out, and three are trained on."""
    return {"bits": 2, "calib": str(micro_text), "threads": 1, "tune": "model",
            "sensitivity": "gradient", **CALIBRATION, "calib_length": 32}  # fmt: skip


@pytest.fixture(scope="session")
def whole(
    driver: Driver,
    micro_source: Path,
    options: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, bytes], int]:
    """Files of a run that nothing interrupted, and how often it touched the disk."""
    folder = tmp_path_factory.mktemp("whole") / "q"
    outcome = driver.run(micro_source, folder, options)
    assert outcome["ok"], outcome
    return contents(folder), outcome["events"]
