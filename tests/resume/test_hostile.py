"""An unfinished run that was tampered with: one line that says why not, or the right bytes."""

import datetime
from pathlib import Path
from typing import Any

from tests.resume.hostile import survive_damage
from tests.resume.kills import Driver

CASES = 40


def test_damage_to_an_unfinished_run_is_refused_or_does_not_matter(
    driver: Driver,
    micro_source: Path,
    options: dict[str, Any],
    tmp_path: Path,
    whole: tuple[dict[str, bytes], int],
) -> None:
    seed = datetime.date.today().toordinal()
    refused, right, problems = survive_damage(
        driver, micro_source, options, tmp_path, whole[0], CASES, seed
    )
    assert problems == []
    assert refused >= 5 and right >= 5
