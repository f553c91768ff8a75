"""Kills and damage for longer: python tests/resume/soak.py [--kills 200] [--damage 1000].

Makes the micro model it runs on; prints what went wrong and one line of counts, exits with 1 on
anything wrong.
"""

import argparse
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from testing.micro_model import add_tokenizer, write_micro_ernie  # noqa: E402
from tests.micro import CALIBRATION, write_text  # noqa: E402
from tests.resume.hostile import KILL, survive_damage  # noqa: E402
from tests.resume.kills import Driver, contents, survive_kills  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--damage", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    arguments = parser.parse_args()
    driver, seed = Driver(), arguments.seed
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = add_tokenizer(write_micro_ernie(folder / "source"))
        text = write_text(folder / "text.txt")
        options = {"bits": 2, "calib": str(text), "threads": 1, "tune": "none", **CALIBRATION}
        problems = survive_kills(driver, source, options, folder, arguments.kills, seed)
        expected = contents(folder / "whole")
        refused, right, wrong = survive_damage(
            driver, source, options, folder, expected, arguments.damage, seed, kill_at=KILL
        )
    driver.close()
    for line in problems + wrong:
        print(line.replace(name, "DIR"))
    print(
        f"resume: seed {seed}: {arguments.kills} kills, {len(problems)} problems; "
        f"{arguments.damage} damaged: {refused} refused, {right} right, {len(wrong)} problems"
    )
    sys.exit(bool(problems or wrong))


if __name__ == "__main__":
    main()
