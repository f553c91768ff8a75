"""Tokens in chunks are all tokens, in their order, with their weights."""

import pytest
import torch

from erniequant.quantization.token_batches import CHUNK, TableTokens, TokenBatch, Tokens

TABLE = 3 * CHUNK


@pytest.fixture(scope="module")
def table() -> TokenBatch:
    """Tables of which no two rows are the same, nor the same row of two tables."""
    row = torch.arange(TABLE, dtype=torch.float32)
    x = row[:, None].expand(-1, 3)
    return TokenBatch(x, x + 0.25, x + 0.5, row + 0.75)


# Nothing, one, and around the borders of chunks.
@pytest.mark.parametrize("count", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1])
@pytest.mark.parametrize("kind", ["in memory", "by row"])
def test_chunks_are_all_tokens_in_order(table: TokenBatch, count: int, kind: str) -> None:
    # Rows in no order, some of them twice.
    rows = torch.randint(0, TABLE, (count,))
    weights = torch.rand(count)
    asked = []

    def read(part: torch.Tensor, part_weights: torch.Tensor) -> TokenBatch:
        asked.append(len(part))
        held = table.rows(part)
        return TokenBatch(held.x, held.original, held.drift, part_weights)

    tokens: Tokens = TableTokens(read, rows, weights)
    if kind == "in memory":
        tokens = read(rows, weights)
    chunks = list(tokens.chunks())
    sizes = [chunk.weights.numel() for chunk in chunks]
    # All full but the last, none empty.
    assert all(size == CHUNK for size in sizes[:-1]) and all(0 < size <= CHUNK for size in sizes)
    assert sum(sizes) == count == tokens.weights.numel()
    if kind == "by row":
        assert asked == sizes  # nothing is read that is not asked for
    if not count:
        return
    place = rows.float()[:, None].expand(-1, 3)
    assert torch.equal(torch.cat([chunk.x for chunk in chunks]), place)
    assert torch.equal(torch.cat([chunk.original for chunk in chunks]), place + 0.25)
    assert torch.equal(torch.cat([chunk.drift for chunk in chunks]), place + 0.5)
    assert torch.equal(torch.cat([chunk.weights for chunk in chunks]), weights)


def test_table_tokens_are_read_only_when_their_chunk_is_due() -> None:
    asked = []

    def read(rows: torch.Tensor, weights: torch.Tensor) -> TokenBatch:
        asked.append(rows.tolist())
        return TokenBatch(weights, weights, weights, weights)

    chunks = TableTokens(read, torch.arange(CHUNK + 2), torch.ones(CHUNK + 2)).chunks()
    assert asked == []
    next(chunks)
    assert asked == [list(range(CHUNK))]
    next(chunks)
    assert asked[1:] == [[CHUNK, CHUNK + 1]]
