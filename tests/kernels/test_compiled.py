"""Kernels compiled for a card, executed on this machine: the numbers of the machine's own code.

Other tests run kernels in Triton's interpreter, which knows nothing of layouts, swizzles, barriers
or asynchronous copies. Here some of them run again, in a process of their own, on the PTX that
Triton's compiler makes; `make compiled` runs them all.
"""

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
ARCHITECTURES = (80, 90)
# Packed products in five splits with fewer groups than a warp takes; fused ones of 64 tokens, on
# sm_90 by the instruction of a warp group; a layer with all its other kernels; the search of codes.
FILES = ("test_packed_gemm.py", "test_fused_gemm.py", "test_moe.py", "test_viterbi.py")
CHOSEN = (
    "(packed_gemm and routed_tokens and config1 and not cc3)"
    " or (fused_gemm and routed_tokens and config3 and not cc3) or one_large_channel"
    " or (viterbi and rows_with_feedback and (cc2s or cc3))"
)


def test_compiled_kernels_pass_the_tests_of_interpreted_ones(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", "-q"]
    command += ["-k", CHOSEN, *(str(FOLDER / name) for name in FILES)]
    running = [
        subprocess.Popen(
            command, env=environment | {"ERNIEQUANT_COMPILED": str(arch)}, text=True, cwd=tmp_path,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for arch in ARCHITECTURES
    ]  # fmt: skip
    for process in running:
        output, _ = process.communicate()
        assert process.returncode == 0, output[-3000:]
        # Three codes of both products, three regimes of the layer, two searches.
        assert "11 passed" in output
