"""Put a demo report between the markers of the README: update_readme.py REPORT README."""

import sys
from pathlib import Path

BEGIN, END = "<!-- demo:begin -->", "<!-- demo:end -->"


def main(report: Path, readme: Path) -> None:
    before, _, rest = readme.read_text("utf-8").partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        sys.exit(f"{readme} lacks the markers {BEGIN} and {END}")
    table = report.read_text("utf-8").strip()
    readme.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
