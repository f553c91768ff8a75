"""An unfinished run that was tampered with: one line that says why not, or the right bytes."""

import datetime
import random
import shutil
from pathlib import Path
from typing import Any

from tests.resume.hostile import damage
from tests.resume.kills import Driver, contents

CASES = 40
KILL = 135


def test_damage_to_an_unfinished_run_is_refused_or_does_not_matter(
    driver: Driver,
    micro_source: Path,
    options: dict[str, Any],
    tmp_path: Path,
    whole: tuple[dict[str, bytes], int],
) -> None:
    base, dst = tmp_path / "base", tmp_path / "q"
    assert driver.run(micro_source, base, options, kill_at=KILL) == {"signal": 9}
    seed = datetime.date.today().toordinal()
    refused = right = 0
    for case in range(CASES):
        rng = random.Random(f"{seed} {case}")
        shutil.copytree(base, dst)
        done = damage(dst / ".erniequant-work", dst / ".model.safetensors.partial", rng)
        outcome = driver.run(micro_source, dst, options)
        told = f"seed {seed} case {case}, {done}: {outcome}"
        if outcome.get("ok"):
            right += 1
            assert contents(dst) == whole[0], told
        else:
            refused += 1
            assert "error" in outcome, told
            assert outcome["error"].isprintable() and str(tmp_path) in outcome["error"], told
        shutil.rmtree(dst)
    assert refused >= 5 and right >= 5
