"""The table of the example against stock transformers, which computes every figure again."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer

import erniequant
from tests.examples.conftest import RunExample

# Three windows of the micro model's 256 positions, the last of them short.
TOKENS, CONTEXT = 600, 256


@torch.no_grad()
def log_probabilities(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Float32 ``[scored, vocabulary]``, of all tokens but the first of each window."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    windows = [model(part[None]).logits[0, :-1].float() for part in ids.split(CONTEXT)]
    return torch.cat(windows).log_softmax(-1)


def megabytes(folder: Path) -> float:
    tensors = [t for shard in folder.glob("*.safetensors") for t in load_file(shard).values()]
    return sum(t.numel() * t.element_size() for t in tensors) / 1e6


def test_every_figure(
    micro_source: Path, micro_text: Path, tmp_path: Path, run_example: RunExample
) -> None:
    folders = [micro_source]
    for bits in (4, 2):
        folders.append(tmp_path / f"q{bits}")
        erniequant.quantize(
            micro_source, folders[-1], bits=bits, no_calib=True, max_tp=1, effort="fast"
        )
    out = run_example(
        "evaluate_and_compare", *folders, "--text", micro_text, "--tokens", str(TOKENS)
    )
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()]
    assert [row[0] for row in rows[2:]] == [str(folder) for folder in folders]

    ids = torch.tensor(AutoTokenizer.from_pretrained(micro_source)(micro_text.read_text())[
        "input_ids"])[:TOKENS]  # fmt: skip
    targets = torch.cat([part[1:] for part in ids.split(CONTEXT)])
    original = log_probabilities(micro_source, ids)
    for folder, row in zip(folders, rows[2:], strict=True):
        found = log_probabilities(folder, ids)
        loss, base = (-x.gather(1, targets[:, None]).mean().item() for x in (found, original))
        assert float(row[1]) == pytest.approx(megabytes(folder), abs=0.06)
        assert float(row[3]) == pytest.approx(math.exp(loss), rel=1e-3)
        assert float(row[4].split(" ± ")[0]) == pytest.approx(math.exp(loss - base), abs=2e-3)
        kl = kl_div(found, original, reduction="batchmean", log_target=True).item()
        assert float(row[5]) == pytest.approx(kl, abs=1e-3)
        same = (found.argmax(-1) == original.argmax(-1)).float().mean().item()
        assert float(row[6].removesuffix(" %")) == pytest.approx(100 * same, abs=0.5)
    # The two widths differ by more than these tolerances.
    assert float(rows[4][5]) > float(rows[3][5]) + 5e-3


def test_held_out_text_is_the_default(micro_source: Path, run_example: RunExample) -> None:
    out = run_example("evaluate_and_compare", micro_source, micro_source, "--tokens", "100")
    assert out.splitlines()[-1].endswith("| 1.0000 ± 0.0000 | 0.0000 | 100.0 % |")


def test_a_failure_is_one_line(
    micro_source: Path, micro_ernie: Path, tmp_path: Path, run_example: RunExample
) -> None:
    with pytest.raises(SystemExit, match="^error: .*gone"):
        run_example("evaluate_and_compare", micro_source, tmp_path / "gone", "--tokens", "100")
    with pytest.raises(SystemExit, match="has no tokenizer"):
        run_example("evaluate_and_compare", micro_ernie, micro_ernie)
