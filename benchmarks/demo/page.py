"""Put the report of `erniequant demo` into the README.

``make readme`` runs the demo and then ``python -m benchmarks.demo.page REPORT README``.
"""

import argparse
from pathlib import Path

from benchmarks.pages import fill


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("readme", type=Path)
    options = parser.parse_args()
    fill(options.readme, "demo", options.report.read_text("utf-8"))


if __name__ == "__main__":
    main()
