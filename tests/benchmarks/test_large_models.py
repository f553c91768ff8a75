"""The measurements of docs/large_models.md, on a shape that takes seconds."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForCausalLM

import erniequant
from benchmarks.large_models import calibration, checkpoint, memory, packed
from benchmarks.large_models.plot import plot
from erniequant.data.files import text_blocks
from erniequant.errors import ErnieQuantError
from erniequant_data import calibration_text

# No power of two, and fewer heads of keys than of queries, as the shapes that are measured.
SMALL: dict[str, Any] = dict(
    hidden_size=96, intermediate_size=160, num_attention_heads=4, num_key_value_heads=2,
    moe_num_experts=64, moe_k=6, moe_intermediate_size=64, moe_num_shared_experts=2,
)  # fmt: skip


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two MoE layers of eight experts."""
    monkeypatch.setitem(checkpoint.SHAPES, "small", SMALL)
    folder = tmp_path / "source"
    checkpoint.write_source(folder, checkpoint.Size("small", layers=2, experts=8))
    return folder


def test_the_checkpoint_is_one_of_transformers(source: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    # Half of the experts at the most, where there are few.
    assert model.config.moe_k == 4
    assert model(torch.arange(2, 90)[None]).logits.isfinite().all()


def test_a_run_under_the_least_budget(source: Path, tmp_path: Path) -> None:
    case = memory.Case("small", 2, 8, tokens=256, budget="least", window=64)
    least = memory.least_budget(source, case)
    found = memory.measure(source, tmp_path / "out", case)
    report = json.loads((tmp_path / "out/quantization_report.json").read_text())
    assert found["predicted"] == report["predicted"] and found["measured"] == report["measured"]
    assert len(found["layer_seconds"]) == 3 and found["samples"]
    assert found["predicted"]["peak_memory_bytes"] == least
    # Seen from outside and from inside.
    own = report["measured"]["peak_memory_bytes"]
    assert found["peak_bytes"] == pytest.approx(own, rel=0.1)
    assert max(size for _, size in found["samples"]) <= found["peak_bytes"]
    assert report["calibration"]["tokens"] == 256
    entry = {**vars(case), **found}
    assert f"| small | 2 | 8 | 256 | least | {found['peak_bytes'] / 1e9:.2f} GB |" in memory.table(
        [entry]
    )
    plot([entry], tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    # The least there is: with any less the same run is refused.
    with pytest.raises(ErnieQuantError, match="max-memory"):
        erniequant.quantize(
            source, tmp_path / "less", bits=2, effort="fast", device="cpu", calib_samples=4,
            calib_length=64, threads=1, max_memory=least - 1, dry_run=True, tune="none",
        )  # fmt: skip


@pytest.mark.parametrize("kind", calibration.WRITERS)
def test_files_hold_as_much_text_as_asked_for(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"large.{kind}"
    calibration.write(path, 5 * 10**6)
    if kind == "parquet":
        text = "".join(pyarrow.parquet.read_table(path)["text"].to_pylist())
    else:
        text = "".join(text_blocks(path))
    # As many whole copies as fit.
    copies = text.count("Emma Woodhouse, handsome, clever, and rich")
    assert copies == 5 * 10**6 // len(calibration_text().encode()) > 1


def test_a_packed_checkpoint_of_random_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(checkpoint.SHAPES, "small", SMALL)
    packed.write_packed(tmp_path / "q", 3, checkpoint.Size("small", layers=2, experts=8))
    assert erniequant.verify(tmp_path / "q").ok
    run = packed.measure(tmp_path / "q", torch.get_num_threads(), new_tokens=2)
    assert run["peak_bytes"] >= run["load_peak"] > 0
    line = packed.table({3: [run]}).splitlines()[2]
    assert line.startswith(f"| 3 | {torch.get_num_threads()} |") and line.count("|") == 10
    # Random weights that neither vanish nor overflow on their way through the layers.
    model, _ = erniequant.load(tmp_path / "q", device="cpu")
    logits = model(torch.arange(2, 20)[None]).logits.detach()
    assert logits.isfinite().all() and 0.01 < float(logits.float().std()) < 100
