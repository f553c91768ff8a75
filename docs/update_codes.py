"""Measure the tables of docs/codes.md again and write them between their markers.

Run from the repository root on an idle machine: ``python docs/update_codes.py [NAME ...]``.
"""

import sys
from pathlib import Path

from update_readme import replace_section

from benchmarks.codes import study

PAGE = Path(__file__).with_name("codes.md")


SECTIONS = {
    "labels": study.label_rows,
    "table": study.table_rows,
    "weighted": study.weighted_rows,
}


def main(names: list[str]) -> None:
    """Write the named tables, all by default."""
    for name in names or list(SECTIONS):
        rows = "\n".join(SECTIONS[name]())
        page = replace_section(PAGE.read_text(encoding="utf-8"), name, rows)
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
