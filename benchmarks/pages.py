"""Puts generated tables between the markers ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def replace_section(page: str, name: str, text: str) -> str:
    """The page with ``text`` between its markers ``name:begin`` and ``name:end``; exits without."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, _, rest = page.partition(begin)
    _, marker, after = rest.partition(end)
    if not marker:
        sys.exit(f"the page lacks the markers {begin} and {end}")
    return f"{before}{begin}\n{text.strip()}\n{end}{after}"


def fill(page: Path, name: str, text: str) -> None:
    """Replace one section of a page."""
    page.write_text(replace_section(page.read_text("utf-8"), name, text), "utf-8")
