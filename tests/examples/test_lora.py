"""The example trains an adapter that a user can load."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import erniequant

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_lora(micro_source: Path, micro_text: Path, tmp_path: Path) -> None:
    erniequant.quantize(
        micro_source, tmp_path / "q2", bits=2, no_calib=True, max_tp=1, effort="fast"
    )
    done = subprocess.run(
        [sys.executable, EXAMPLES / "lora.py", tmp_path / "q2", micro_text, tmp_path / "adapter",
         "--steps", "2", "--length", "32"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "trainable params" in done.stdout
    assert "packed experts take no adapter" in done.stderr
    weights = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert any("shared_experts" in name for name in weights)
    assert any(bool(t.any()) for name, t in weights.items() if "lora_B" in name)
    assert (
        "down_proj"
        in json.loads((tmp_path / "adapter/adapter_config.json").read_text())["target_modules"]
    )
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "q2"), tmp_path / "adapter"
    )
    assert model(torch.arange(5)[None]).logits.isfinite().all()
