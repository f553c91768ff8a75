"""The fuzz test for longer: python tests/fuzz/soak.py [--cases 20000] [--seeds 4]

    python tests/fuzz/soak.py --seed S --case N     replays one case

Prints how often each target ended how, and every failure; exits with 1 if there was one. Run by
pytest underneath, for its fixtures.
"""

import argparse
import os
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

SHOWN = 20


def test_soak(bases) -> None:
    from harness import run_case

    seeds = [int(s) for s in os.environ["FUZZ_SEEDS"].split()]
    first, last = map(int, os.environ["FUZZ_RANGE"].split())
    started, counts, failures = time.perf_counter(), Counter(), 0
    for seed in seeds:
        for case in range(first, last):
            verdict = run_case(bases, seed, case)
            counts[verdict.target, verdict.kind] += 1
            if verdict.failed:
                failures += 1
                if failures <= SHOWN:
                    print(f"\n{verdict}\n")
            elif len(seeds) == 1 and last - first == 1:
                print(f"\n{verdict}\n")
    seconds = time.perf_counter() - started
    for (target, kind), count in sorted(counts.items()):
        print(f"  {target:12} {kind:8} {count}")
    kinds = Counter()
    for (_, kind), count in counts.items():
        kinds[kind] += count
    found = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    print(
        f"fuzz: {sum(counts.values())} cases, seeds {seeds[0]} to {seeds[-1]}: {found}; "
        f"{failures} failures in {seconds:.0f} s"
    )
    assert not failures


def main() -> int:
    """Parse the command line and run the cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seeds", type=int, default=4, help="the cases are shared out among them")
    parser.add_argument("--seed", type=int, default=1, help="the first")
    parser.add_argument("--case", type=int, help="only this one")
    options = parser.parse_args()
    seeds = [options.seed + i for i in range(1 if options.case is not None else options.seeds)]
    first, last = 0, -(-options.cases // len(seeds))
    if options.case is not None:
        first, last = options.case, options.case + 1
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    os.environ["FUZZ_SEEDS"] = " ".join(map(str, seeds))
    os.environ["FUZZ_RANGE"] = f"{first} {last}"
    return int(pytest.main([str(Path(__file__)), "-q", "-s", "--tb=no", "--durations=0"]))


if __name__ == "__main__":
    sys.exit(main())
