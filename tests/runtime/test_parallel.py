"""Tensor parallelism in transformers: two processes give the logits of one.

Left to the stock plan, the outputs of experts and MLPs of both ranks would be added, with no error.
"""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

RANK = """
import sys, torch, erniequant
import torch.distributed as dist
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
ids = torch.arange(3, 23)[None]
split = AutoModelForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto", dtype=torch.float32)
with torch.no_grad():
    found = split(ids).logits
found = found.full_tensor() if hasattr(found, "full_tensor") else found
names = [type(module).__name__ for module in split.model.layers[1].modules()]
assert "PackedExperts" in names or "PackedMlp" in names
whole = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
with torch.no_grad():
    expected = whole(ids).logits
error = float((found - expected).norm() / expected.norm())
assert dist.get_world_size() == 2 and 0 <= error < 1e-5, error
# torchrun counts a process as done only when it leaves the group.
dist.destroy_process_group()
"""


@pytest.mark.parametrize("packed", ["packed_ernie", "packed_dense"])
def test_two_ranks(request: pytest.FixtureRequest, tmp_path: Path, packed: str) -> None:
    folder = request.getfixturevalue(packed)
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
               "--master_port", str(port), str(script), str(folder)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
