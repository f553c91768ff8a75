"""Row tiles against a brute-force list, for routings that break counting code."""

import pytest
import torch

from erniequant_kernels.routing import most_row_tiles, row_tiles, row_tiles_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_choice(tokens, top_k, experts):
    return torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])


ROUTINGS = {
    "one token": (torch.tensor([[5, 2, 0]]), 7),
    "all on one expert": (torch.full((37, 1), 3), 5),
    "the same expert twice for a token": (torch.tensor([[1, 1], [0, 1], [1, 1]]), 2),
    "some experts without tokens": (torch.tensor([[0, 6], [6, 0], [6, 3]]), 9),
    "indices beyond the experts": (torch.tensor([[0, 4], [9, 1], [-1, 2]]), 4),
    "nothing for anyone": (torch.full((3, 2), 8), 8),
    "random, more than one block": (random_choice(400, 3, 66), 66),
}


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("block_m", [1, 8, 16])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_equal_to_the_reference(name, block_m, dtype):
    index, experts = ROUTINGS[name]
    expected = row_tiles_reference(index, experts, block_m)
    found = row_tiles(index.to(dtype).to(DEVICE), experts, block_m)
    assert found.starts.tolist() == expected.starts.tolist()
    assert found.expert.tolist() == expected.expert.tolist()
    used = expected.starts[-1]
    assert found.first[:used].tolist() == expected.first[:used].tolist()
    assert found.end[:used].tolist() == expected.end[:used].tolist()
    routed = int(((index >= 0) & (index < experts)).sum())
    assert found.order[:routed].tolist() == expected.order[:routed].tolist()


def test_the_reference_lists_every_assignment_once_under_its_expert():
    index, experts = ROUTINGS["random, more than one block"]
    tiles = row_tiles_reference(index, experts, 8)
    seen = []
    for expert, first, end in zip(tiles.expert, tiles.first, tiles.end, strict=True):
        if expert >= 0:
            assert 0 < end - first <= 8
            mine = tiles.order[first:end].tolist()
            assert (index.flatten()[mine] == expert).all()
            seen += mine
    assert sorted(seen) == list(range(index.numel()))


@pytest.mark.parametrize("counts", [(0, 0, 1), (1, 1, 1), (8, 9, 1), (7, 0, 17), (1, 0, 0)])
def test_no_routing_needs_more_row_tiles_than_there_is_room_for(counts):
    needed = sum(-(-count // 8) for count in counts)
    assert needed <= most_row_tiles(sum(counts), len(counts), 8)
