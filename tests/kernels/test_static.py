"""Machine-code counts, in a fresh process: nothing compiles where the interpreter is on."""

import json
import os
import subprocess
import sys


def test_two_bit_tile_uses_matrix_instructions_and_does_not_spill(tmp_path):
    report = tmp_path / "static.json"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    command = [sys.executable, "-m", "erniequant_kernels.static", "--json", str(report)]
    command += ["--code", "cc2", "--register-length", "16", "--arch", "90"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (record,) = json.loads(report.read_text())
    assert "MMA" in record["matrix_opcode"]
    assert record["spill_bytes"] == 0
    # Two matrix instructions (8 tokens each) per 256 weights of a warp. Fewer would mean that two
    # registers are extracted from the same place and the compiler merged their weights.
    assert record["per_weight"]["matrix"] == 0.25
    # 3.46 with Triton 3.9, 4.17 with 3.6. A tile whose weights cross lanes on the way to the matrix
    # instruction has shared stores and took 6.9.
    assert record["issue_cost"] < 4.5
    assert not any(name.startswith("STS") for name in record["opcodes"])
    # The window, the multiplication and the masking of two weights: nothing can be below one each.
    assert record["per_weight"]["multiply"] >= 0.5
    assert record["per_weight"]["alu"] >= 1.0
