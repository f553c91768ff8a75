"""An unfinished run that was tampered with: one line that says why not, or the right bytes."""

import datetime
from pathlib import Path
from typing import Any

from tests.resume.hostile import KILL, KILL_TRAINED, survive_damage
from tests.resume.kills import Driver, contents

CASES, TRAINED_CASES = 40, 16


def test_damage_to_an_unfinished_run_is_refused_or_does_not_matter(
    driver: Driver,
    micro_source: Path,
    options: dict[str, Any],
    tmp_path: Path,
    whole: tuple[dict[str, bytes], int],
) -> None:
    seed = datetime.date.today().toordinal()
    refused, right, problems = survive_damage(
        driver, micro_source, options, tmp_path, whole[0], CASES, seed, kill_at=KILL
    )
    assert problems == []
    assert refused >= 5 and right >= 5


def test_damage_to_an_unfinished_run_that_trains(
    driver: Driver, micro_source: Path, tuned_options: dict[str, Any], tmp_path: Path
) -> None:
    assert driver.run(micro_source, tmp_path / "whole", tuned_options)["ok"]
    expected = contents(tmp_path / "whole")
    seed = datetime.date.today().toordinal()
    refused, right, problems = survive_damage(
        driver, micro_source, tuned_options, tmp_path, expected, TRAINED_CASES, seed,
        kill_on=KILL_TRAINED,
    )  # fmt: skip
    assert problems == []
    assert refused >= 1 and right >= 1
