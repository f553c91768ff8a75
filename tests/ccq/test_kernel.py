"""The WINT2 decoder in Triton against the torch reference, bit for bit."""

import pytest
import torch

from erniequant.formats.fastdeploy.ccq.books import BOOKS
from erniequant_kernels.wint2 import expand_wint2, expand_wint2_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_experts(experts: int, inputs: int, outputs: int, book: str) -> list[torch.Tensor]:
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
    return [tensor.contiguous().to(DEVICE) for tensor in tensors]


@pytest.mark.parametrize("k_order", ["plain", "mma64"])
@pytest.mark.parametrize("book", ["generators", "affine"])
# Outputs that do not fill a program, fill several, and one alone.
@pytest.mark.parametrize(
    ("experts", "inputs", "outputs"), [(3, 256, 40), (1, 384, 129), (2, 128, 1)]
)
def test_every_weight_is_bit_exact(
    experts: int, inputs: int, outputs: int, book: str, k_order: str
) -> None:
    tensors = random_experts(experts, inputs, outputs, book)
    expected = expand_wint2_reference(*tensors, k_order=k_order)
    out = torch.full((experts, outputs, inputs), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    expand_wint2(*tensors, out, k_order=k_order)
    assert torch.equal(out.view(torch.int16), expected.view(torch.int16))


def test_every_byte_of_every_book() -> None:
    books = torch.tensor(BOOKS, dtype=torch.float32, device=DEVICE)
    everything = torch.arange(256, dtype=torch.uint8, device=DEVICE)[:, None]
    tensors = [
        everything.expand(-1, len(BOOKS))[None].contiguous(),
        torch.full((1, 8, len(BOOKS)), 0x3F, dtype=torch.uint8, device=DEVICE),
        torch.full((1, len(BOOKS)), 0.75, dtype=torch.bfloat16, device=DEVICE),
        *(column[None].contiguous() for column in books.T),
    ]
    out = torch.empty(1, len(BOOKS), 1024, dtype=torch.bfloat16, device=DEVICE)
    expand_wint2(*tensors, out, k_order="plain", block_n=16)
    assert torch.equal(out, expand_wint2_reference(*tensors, k_order="plain"))
