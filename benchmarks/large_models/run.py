"""One quantisation in a process of its own, so that nothing else adds to its peak memory.

``python run.py '{"src": "SRC", "dst": "DST", "bits": 2}'`` takes the arguments of
`erniequant.quantize`; its last line has the peak of resident bytes and the seconds as JSON.
"""

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import erniequant


def main() -> None:
    """Quantise, and print what it took."""
    options: dict[str, Any] = json.loads(sys.argv[1])
    start = time.perf_counter()
    erniequant.quantize(**options)
    # Not ru_maxrss, which starts at the parent's peak.
    (peak,) = re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    print(json.dumps({"peak": int(peak) * 1024, "seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main()
