"""Put generated tables between markers of a page: update_readme.py REPORT README."""

import sys
from pathlib import Path


def replace_section(page: str, name: str, text: str) -> str:
    """The page with ``text`` between its markers ``name:begin`` and ``name:end``; exits without."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        sys.exit(f"the page lacks the markers {begin} and {end}")
    return f"{before}{begin}\n{text.strip()}\n{end}{after}"


def main(report: Path, readme: Path) -> None:
    """Put a demo report into the README."""
    page = replace_section(readme.read_text("utf-8"), "demo", report.read_text("utf-8"))
    readme.write_text(page, "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
