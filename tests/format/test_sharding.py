"""Shares of ranks against decoded matrices: a share decodes to that part of the whole."""

import pytest
import torch

from erniequant.errors import ErnieQuantError
from erniequant.packing.decoding import decode_weight
from erniequant.packing.schema import LayerSpec, MatrixSpec, layer_params
from erniequant.packing.sharding import (
    CUT_DIMENSION,
    WHOLE,
    Share,
    bytes_of,
    max_ranks,
    require_divisible,
    share_params,
    take_share,
)

# Tiles of gate and up, and blocks of down, that are unequal, and three parts of each size.
LAYER = LayerSpec(MatrixSpec("cc3", 10, 32, 32), MatrixSpec("cc2", 10, 64, 64))
EXPERTS, HIDDEN, INNER = 3, 192, 384


def stored() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    found = {}
    for name in CUT_DIMENSION:
        shape, dtype = layer_params(EXPERTS, HIDDEN, INNER, LAYER)[name]
        # Scales are bit patterns of bfloat16, here those between 1 and 2.
        low, high = (0x3F80, 0x4000) if dtype == torch.int16 else (-(2**31), 2**31)
        found[name] = torch.randint(low, high, shape, generator=generator).to(dtype)
    gate_up = found["gate_up_proj_signs"]
    gate_up[:, 1] = gate_up[:, 0]
    return found


def decoded(tensors: dict[str, torch.Tensor], projection: str, expert: int) -> torch.Tensor:
    packed, scale, signs = (tensors[f"{projection}_{s}"] for s in ("packed", "scale", "signs"))
    return decode_weight(packed[expert], scale[expert], signs[0, 0], LAYER.projection(projection))


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_a_share_is_that_part_of_the_matrices(ranks: int) -> None:
    whole, part = stored(), INNER // ranks
    for rank in range(ranks):
        share = Share(rank, ranks, experts=(2, 0))
        tensors = {name: take_share(name, tensor, share) for name, tensor in whole.items()}
        infos = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
        assert infos == share_params(EXPERTS, HIDDEN, INNER, LAYER, share)
        taken = slice(rank * part, (rank + 1) * part)
        for local, expert in enumerate((2, 0)):
            gate, up = decoded(whole, "gate_up_proj", expert).chunk(2)
            wanted = torch.cat([gate[taken], up[taken]])
            assert torch.equal(decoded(tensors, "gate_up_proj", local), wanted)
            down = decoded(whole, "down_proj", expert)[:, taken]
            assert torch.equal(decoded(tensors, "down_proj", local), down)


def test_a_whole_share_is_what_is_stored() -> None:
    for name, tensor in stored().items():
        assert take_share(name, tensor, WHOLE) is tensor


@pytest.mark.parametrize(
    ("inner", "layer", "ranks", "said"),
    [
        (384, LAYER, 4, r"down_proj has rotation blocks of 64 inputs, so 384 .* --max-tp 4"),
        (
            1536,
            LayerSpec(MatrixSpec("cc2", 12, 256, 128), MatrixSpec("cc2", 12, 256, 128)),
            4,
            "gate_up_proj has tiles of 256",
        ),
        (
            96,
            LayerSpec(MatrixSpec("cc2", 12, 32, 128), MatrixSpec("cc2", 12, 32, 16)),
            2,
            "tiles of 32 outputs, so 96",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused(inner: int, layer: LayerSpec, ranks: int, said: str) -> None:
    require_divisible(inner, 1, layer, "layer 1")
    with pytest.raises(ErnieQuantError, match=f"^layer 1: .*{said}"):
        require_divisible(inner, ranks, layer, "layer 1")
    assert max_ranks(inner, layer) < ranks


def test_ranks_of_the_published_models() -> None:
    # Inner sizes of the 21B and of the 300B: 6 and 14 tiles of 256, 12 and 28 blocks of 128.
    of_256 = LayerSpec(MatrixSpec("cc2", 12, 256, 128), MatrixSpec("cc2", 12, 256, 128))
    of_128 = LayerSpec(MatrixSpec("cc2", 12, 128, 128), MatrixSpec("cc2", 12, 256, 128))
    found = [max_ranks(inner, layer) for inner in (1536, 3584) for layer in (of_256, of_128)]
    assert found == [2, 4, 2, 4]


def test_bytes_of_two_ranks_are_those_of_one_and_what_both_have() -> None:
    one, half = (bytes_of(share_params(EXPERTS, HIDDEN, INNER, LAYER, Share(0, n))) for n in (1, 2))
    twice = EXPERTS * HIDDEN * 2 + 2 * HIDDEN // 8  # scales of down, signs of gate_up
    assert 2 * half == one + twice
