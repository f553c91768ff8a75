"""Measure the tables of docs/ccq.md again and write them between their markers.

Run from the repository root on an idle machine: ``python -m benchmarks.wint2.page [NAME ...]``.
"""

import argparse

import torch

from benchmarks.pages import DOCS, fill
from benchmarks.wint2 import comparison

PAGE = DOCS / "ccq.md"
SECTIONS = {
    "gaussian": comparison.gaussian_rows,
    "tiny": comparison.tiny_rows,
    "held_out": comparison.held_out_rows,
    "massive": comparison.massive_rows,
    "parts": comparison.part_rows,
}


def main() -> None:
    """Write the named tables, all by default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(SECTIONS))
    names = parser.parse_args().names
    torch.set_num_threads(1)
    for name in names or list(SECTIONS):
        fill(PAGE, name, "\n".join(SECTIONS[name]()))


if __name__ == "__main__":
    main()
