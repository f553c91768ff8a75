"""Measure the tables of docs/codes.md again and write them between their markers.

Run from the repository root on an idle machine: ``python -m benchmarks.codes.page [NAME ...]``.
"""

import argparse

from benchmarks.codes import study
from benchmarks.codes.products import product_rows
from benchmarks.pages import DOCS, fill

PAGE = DOCS / "codes.md"
SECTIONS = {
    "labels": study.label_rows,
    "table": study.table_rows,
    "weighted": study.weighted_rows,
    "products": product_rows,
}


def main() -> None:
    """Write the named tables, all by default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(SECTIONS))
    for name in parser.parse_args().names or list(SECTIONS):
        fill(PAGE, name, "\n".join(SECTIONS[name]()))


if __name__ == "__main__":
    main()
