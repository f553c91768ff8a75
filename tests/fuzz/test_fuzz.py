"""Damaged and hostile input: a few hundred random cases a day, and every case that once failed."""

from harness import Bases, run_case
from seeds import cases, seed_of_the_day


def test_a_fresh_sample(bases: Bases) -> None:
    seed = seed_of_the_day()
    failed = [v for v in (run_case(bases, seed, case) for case in cases(300)) if v.failed]
    assert not failed, "\n\n".join(map(str, failed[:10]))
