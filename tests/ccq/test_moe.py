"""A layer of WINT2 experts on the kernels, against plain torch."""

from typing import Any

import pytest
import torch

from erniequant.ccq import decode_wint2
from erniequant.errors import ErnieQuantError
from erniequant.packing.products import experts_forward
from erniequant_kernels import launch
from erniequant_kernels.matrices import Wint2Matrices
from erniequant_kernels.wint2_decode import wint2_constants
from erniequant_kernels.wint2_moe import moe_experts_wint2, prepare_constants
from erniequant_kernels.wint2_tuning import Wint2Row, Wint2Tuning, wint2_tables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXPERTS, HIDDEN, INNER = 5, 512, 128
# 37 tokens of two choices are many, with 15 for each expert, and one token's inputs are split.
TUNING = Wint2Tuning(
    64, (Wint2Row(4, 8, 64, 16, 1, 2), Wint2Row(None, 64, 128, 64, 4, 2, warp_group=True))
)


def matrices(inputs: int, outputs: int, k_order: str, seed: int) -> Wint2Matrices:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    return Wint2Matrices(
        random(EXPERTS, inputs // 4, outputs).to(DEVICE),
        random(EXPERTS, inputs // 128, outputs).to(DEVICE),
        (torch.rand(EXPERTS, outputs, generator=generator) * 2e-4 + 1e-4).bfloat16().to(DEVICE),
        torch.full((EXPERTS, outputs), 31317.0, device=DEVICE),
        torch.full((EXPERTS, outputs), 17232.0, device=DEVICE),
        k_order,
    )


def weight(matrix: Wint2Matrices, expert: int) -> torch.Tensor:
    parts = (matrix.quant_weight, matrix.weight_scale, matrix.super_scales, matrix.code_scale,
             matrix.code_zp)  # fmt: skip
    return decode_wint2(*(part[expert] for part in parts), k_order=matrix.k_order).T


@pytest.mark.parametrize("k_order", ["plain", "mma64"])
@pytest.mark.parametrize("tokens", [0, 1, 37])
def test_equals_plain_torch(k_order: str, tokens: int) -> None:
    gate_up = matrices(HIDDEN, 2 * INNER, k_order, 1)
    down = matrices(INNER, HIDDEN, k_order, 2)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, HIDDEN, generator=generator).bfloat16().to(DEVICE)
    # Expert 3 gets no token, and one choice is of no expert.
    index = torch.randint(0, 4, (tokens, 2), generator=generator)
    index[index == 3] = 4
    if tokens > 5:
        index[5, 1] = EXPERTS
    index, routing = index.to(DEVICE), torch.rand(tokens, 2, generator=generator).to(DEVICE)
    found = moe_experts_wint2(x, index, routing, gate_up, down, TUNING)
    both: dict[str, Any] = {"gate_up_proj": gate_up, "down_proj": down}
    expected = experts_forward(
        x.float(), index, routing, EXPERTS, lambda name, e: weight(both[name], e), "silu"
    )
    assert found.dtype == torch.bfloat16 and found.shape == expected.shape
    assert (found.float() - expected).norm() <= 0.01 * expected.norm()


@pytest.mark.parametrize("table", wint2_tables().values(), ids=wint2_tables().keys())
@pytest.mark.parametrize("tokens", [1, 4, 16, 64, 256, 1024, 2048])
# Gate and up of the 21B, of one with few inputs, and of the 300B model.
@pytest.mark.parametrize(("inputs", "outputs"), [(2560, 3072), (128, 1024), (8192, 7168)])
def test_tables_fit_every_load(table: Wint2Tuning, tokens: int, inputs: int, outputs: int) -> None:
    empty = torch.empty(64, inputs // 4, outputs, dtype=torch.uint8, device="meta")
    matrix = Wint2Matrices(*[empty] * 5, "mma64")
    row = table.row(tokens * 6 / 64)
    config = table.config(row, matrix, tokens * 6)
    assert 1 <= config.splits <= inputs // 128
    assert config.splits == 1 or row.partial_dtype == torch.float32
    # Every warp has whole words of outputs in each of its lanes.
    assert config.block_n % (32 * config.warps) == 0


def test_constants_are_not_built_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = matrices(HIDDEN, 2 * INNER, "plain", 1)
    prepare_constants(matrix)
    monkeypatch.setattr(launch, "is_capturing", lambda: True)
    prepare_constants(matrix)
    with pytest.raises(ErnieQuantError, match="being captured"):
        wint2_constants(torch.device("cuda", 99))
