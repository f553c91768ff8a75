"""Which cases a run takes: those of the day, unless the environment names a seed."""

import os
import time


def seed_of_the_day() -> int:
    """Days since 1970 in UTC; ``FUZZ_SEED`` replaces it."""
    return int(os.environ.get("FUZZ_SEED", time.time() // 86_400))


def cases(count: int) -> range:
    """Numbers of the cases of a seed."""
    return range(count)
