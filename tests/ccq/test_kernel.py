"""The product on packed WINT2 in Triton against the torch reference: every weight bit for bit, and
routed tokens.

Inputs are small integers where weights are compared bit for bit: all sums are then integers below
2^24, exact in any order, and a weight that is off by one shows in most of the tokens.
"""

from dataclasses import replace

import pytest
import torch

from erniequant.codes.ccq.decode import decode_wint2
from erniequant.errors import ErnieQuantError
from erniequant.formats.fastdeploy.ccq.books import BOOKS
from erniequant_kernels.matrices import Wint2Matrices
from erniequant_kernels.routing import row_tiles
from erniequant_kernels.wint2_gemm import Wint2GemmConfig, wint2_gemm, wint2_gemm_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

FEW = Wint2GemmConfig(block_m=8, block_n=64, block_k=16, splits=2, warps=1, stages=2)
# Two words of outputs in each lane, four warps, the other order of inputs.
MANY = Wint2GemmConfig(
    block_m=64, block_n=256, block_k=64, splits=1, warps=4, stages=2, warp_group=True
)
CONFIGS = pytest.mark.parametrize("config", [FEW, MANY], ids=["few", "many"])
K_ORDERS = pytest.mark.parametrize("k_order", ["plain", "mma64"])


def random_experts(
    experts: int, inputs: int, outputs: int, k_order: str, book: str = "generators"
) -> Wint2Matrices:
    generator = torch.Generator().manual_seed(inputs)

    def byte(rows: int) -> torch.Tensor:
        shape = (experts, rows, outputs)
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(experts, outputs, generator=generator) * (high - low) + low

    if book == "generators":
        chosen = torch.randint(0, len(BOOKS), (experts, outputs), generator=generator)
        code_scale, code_zp = torch.tensor(BOOKS, dtype=torch.float32)[chosen].unbind(-1)
    else:
        # Words of any sign, and products and sums that float32 rounds.
        code_scale, code_zp = uniform(-130, 130), uniform(-3000, 3000)
    supers = uniform(-1, 1).bfloat16()
    tensors = [byte(inputs // 4), byte(inputs // 128), supers, code_scale, code_zp]
    return Wint2Matrices(*(tensor.contiguous().to(DEVICE) for tensor in tensors), k_order)


def scaled_labels(matrix: Wint2Matrices, expert: int) -> torch.Tensor:
    """Labels times local scales, rounded to bfloat16: ``[K, N]``."""
    codes, scales, supers, code_scale, code_zp = (part[expert] for part in matrix.parts)
    one = torch.ones_like(supers)
    return decode_wint2(codes, scales, one, code_scale, code_zp, k_order=matrix.k_order).bfloat16()


def products(
    x: torch.Tensor, matrix: Wint2Matrices, expert_index: torch.Tensor, config: Wint2GemmConfig
) -> torch.Tensor:
    """``[splits, A, N]``, NaN where nothing was written."""
    top_k = expert_index.shape[1]
    tiles = row_tiles(expert_index, matrix.experts, config.block_m)
    shape = (config.splits, expert_index.numel(), matrix.outputs)
    out = torch.full(shape, torch.nan, device=DEVICE)
    wint2_gemm(x, matrix, tiles, top_k, out, config)
    return out


def assert_bit_exact(matrix: Wint2Matrices, config: Wint2GemmConfig, x: torch.Tensor) -> None:
    """Products of ``x`` with every expert are those of `scaled_labels`, to the last bit."""
    for expert in range(matrix.experts):
        index = torch.full((x.shape[0], 1), expert, device=DEVICE)
        found = products(x, matrix, index, config).sum(0)
        assert torch.equal(found, x.float() @ scaled_labels(matrix, expert).float())


def integers(tokens: int, inputs: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(-7, 8, (tokens, inputs), generator=generator).bfloat16().to(DEVICE)


@K_ORDERS
@CONFIGS
@pytest.mark.parametrize("book", ["generators", "affine"])
# Outputs that fill a program and part of the next one, and part of one alone.
@pytest.mark.parametrize(("experts", "inputs", "outputs"), [(1, 256, 288), (2, 384, 64)])
def test_every_weight_is_bit_exact(
    experts: int, inputs: int, outputs: int, book: str, config: Wint2GemmConfig, k_order: str
) -> None:
    matrix = random_experts(experts, inputs, outputs, k_order, book)
    assert_bit_exact(matrix, config, integers(8, inputs))


@K_ORDERS
@pytest.mark.parametrize("warp_group", [False, True])
def test_one_input_at_a_time(k_order: str, warp_group: bool) -> None:
    matrix = random_experts(1, 128, 32, k_order)
    config = replace(MANY, block_n=128, block_k=32, warp_group=warp_group)
    assert_bit_exact(matrix, config, torch.eye(128, dtype=torch.bfloat16, device=DEVICE))


def test_every_byte_of_every_book() -> None:
    books = torch.tensor(BOOKS, dtype=torch.float32, device=DEVICE)
    everything = torch.arange(256, dtype=torch.uint8, device=DEVICE)[:, None]
    # Every nibble from 0 to 15.
    nibbles = torch.arange(8, dtype=torch.uint8, device=DEVICE)[:, None] * 34 + 1
    matrix = Wint2Matrices(
        everything.expand(-1, len(BOOKS))[None].contiguous(),
        nibbles.expand(-1, len(BOOKS))[None].contiguous(),
        torch.ones(1, len(BOOKS), dtype=torch.bfloat16, device=DEVICE),
        *(column[None].contiguous() for column in books.T), "plain",
    )  # fmt: skip
    assert_bit_exact(matrix, FEW, integers(8, 1024))


def test_words_at_the_ends_of_int32() -> None:
    matrix = random_experts(1, 128, 32, "plain")
    zero = torch.full_like(matrix.code_zp, -(2.0**31))
    zero[0, 8:] = 2.0**31 - 2.0**24
    scale = torch.full_like(matrix.code_scale, 2.0**15 + 129)
    matrix = replace(matrix, code_scale=scale, code_zp=zero)
    assert_bit_exact(matrix, replace(FEW, splits=1), integers(8, 128))


@K_ORDERS
# Two splits share the three turns unequally.
@CONFIGS
def test_routed_tokens(config: Wint2GemmConfig, k_order: str) -> None:
    matrix = random_experts(4, 384, 96, k_order)
    generator = torch.Generator().manual_seed(5)
    tokens = 13  # more than a row tile of one expert
    x = torch.randn(tokens, 384, generator=generator).bfloat16().to(DEVICE)
    # Expert 2 gets no token, experts -1 and 4 are none, token 7 chooses one expert twice.
    index = torch.tensor([0, 0, 0, 1, 3, -1, 4])[
        torch.randint(0, 7, (tokens, 2), generator=generator)
    ].to(DEVICE)
    index[7] = 1
    found = products(x, matrix, index, config)
    chosen = index.flatten()
    some = (chosen >= 0) & (chosen < 4)
    assert found[:, ~some].isnan().all()
    expected = wint2_gemm_reference(x, matrix, chosen, 2)[some]
    error = (found.sum(0)[some] - expected).norm() / expected.norm()
    # Scaled labels above 256 are rounded to bfloat16, which a wrong order of inputs is far beyond.
    assert error < 2e-3


def test_outputs_must_be_loaded_whole() -> None:
    matrix = random_experts(1, 128, 48, "plain")
    x = torch.zeros(1, 128, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(ErnieQuantError, match="multiple of 32"):
        products(x, matrix, torch.zeros(1, 1, dtype=torch.int64, device=DEVICE), FEW)
