"""Inspection: counts and bits per weight against numbers worked out by hand."""

import json
import shutil
from pathlib import Path

import pytest

from erniequant.checkpoint.files import write_json
from erniequant.errors import ErnieQuantError
from erniequant.formats.verbs import inspect

# Per expert 3 matrices of 96 x 64; 8 experts, 2 layers.
WEIGHTS = 3 * 96 * 64 * 8 * 2


def test_quantised(packed_ernie: Path) -> None:
    found = inspect(packed_ernie)
    assert (found.model_type, found.format_version, found.producer) == ("ernie4_5_moe", 1, "tests")
    assert found.quantized_layers == ("1", "2")
    assert found.codes == {
        "gate_up_proj: cc2, register 12, tile 64, rotation 32": 1,
        "down_proj: cc4, register 10, tile 32, rotation 64": 1,
        "gate_up_proj: cc3, register 16, tile 32, rotation 32": 1,
        "down_proj: cc2s, register 16, tile 32, rotation 1": 1,
    }
    assert found.expert_weights == WEIGHTS
    # gate_up is two thirds: words of (2 + 3) and (4 + 2) bits, 2 bytes per output, signs, guards.
    words = 8 * (96 * 128 * (2 + 3) + 96 * 64 * (4 + 2)) // 8
    scales, signs, guards = 2 * 8 * (128 + 96) * 2, 2 * 4 * (2 * 3 + 2), 2 * 2
    assert found.expert_bytes == words + scales + signs + guards
    assert found.expert_bits_per_weight == pytest.approx(8 * found.expert_bytes / WEIGHTS)
    assert found.total_bytes == sum(tensor.n_bytes for tensor in found.tensors)
    quantized = [tensor for tensor in found.tensors if tensor.quantized]
    assert len(quantized) == 2 * 6
    by_name = {tensor.name: tensor for tensor in found.tensors}
    assert by_name["model.layers.2.mlp.experts.gate_up_proj_scale"].code == "cc3/16"
    assert by_name["model.layers.2.mlp.experts.down_proj"].code == "guard"
    assert by_name["model.norm.weight"].code is None
    layers = [t.name.split(".")[2] for t in found.tensors if t.name.startswith("model.layers.")]
    assert layers == sorted(layers)
    assert by_name["model.layers.2.mlp.gate.weight"].dtype == "F32"
    assert found.provenance == {}


def test_json_form(packed_ernie: Path) -> None:
    found = inspect(packed_ernie)
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["bits_per_weight"]["experts"] == found.expert_bits_per_weight
    assert plain["gigabytes"] == found.total_bytes / 1e9
    assert sum(tensor["quantized"] for tensor in plain["tensors"]) == 12


def test_plain_checkpoint(micro_ernie: Path) -> None:
    found = inspect(micro_ernie)
    assert found.format_version is None and found.quantized_layers == () and found.codes == {}
    assert found.expert_weights == WEIGHTS and found.expert_bits_per_weight == 16
    # Router and its bias are float32, so the whole is a little above 16 bits.
    assert 16 < found.total_bits_per_weight < 17


def test_total_counts_the_weights_of_the_original(packed_ernie: Path, micro_ernie: Path) -> None:
    assert inspect(packed_ernie).total_weights == inspect(micro_ernie).total_weights


def test_provenance_and_damage(packed_ernie: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(packed_ernie, folder)
    write_json(folder / "quantization_report.json", {"bits": 2, "matrices": [1], "seed": 0})
    assert inspect(folder).provenance == {"bits": 2, "seed": 0}
    config = json.loads((folder / "config.json").read_text())
    config["moe_num_experts"] = 9
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ErnieQuantError, match=r"has shape \[8, "):
        inspect(folder)
