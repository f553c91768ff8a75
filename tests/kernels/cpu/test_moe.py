"""A layer of experts on the CPU against float32 products with decoded weights."""

import threading

import pytest
import torch

from erniequant.codes import CODE_NAMES, get_code
from erniequant.packing.decoding import decode_weight
from erniequant.packing.products import experts_forward
from erniequant.packing.schema import MatrixSpec
from erniequant_kernels.cpu.machine import machine
from erniequant_kernels.cpu.moe import cut_into_blocks, moe_experts_cpu
from erniequant_kernels.cpu.product import MOST_GROUPS, most_tokens
from erniequant_kernels.matrices import PackedMatrices

# Hidden 320 = 64 x 5, inner 192 = 64 x 3: odd multiples of the tile.
EXPERTS, HIDDEN, INNER, TILE, BLOCK = 5, 320, 192, 64, 64
BOUNDS = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5}


def matrices(name, outputs, inputs):
    code = get_code(name, 12)
    words = inputs * code.words_per_sequence(TILE)
    packed = torch.randint(-(2**31), 2**31, (EXPERTS, outputs // TILE, words)).to(torch.int32)
    scale = (torch.rand(EXPERTS, outputs, 1) * 0.05 + 0.01).bfloat16().view(torch.int16)
    signs = torch.randint(-(2**31), 2**31, (-(-inputs // 32),)).to(torch.int32)
    return PackedMatrices(packed, scale, signs, code, TILE, BLOCK)


def layer(name):
    return matrices(name, 2 * INNER, HIDDEN), matrices(name, HIDDEN, INNER)


def reference(x, index, routing, gate_up, down):
    both = {"gate_up_proj": gate_up, "down_proj": down}

    def weight(projection, expert):
        m = both[projection]
        spec = MatrixSpec(m.code.name, m.code.register_length, m.tile, m.rotation_block)
        return decode_weight(m.packed[expert], m.scale[expert], m.signs, spec)

    return experts_forward(x.float(), index, routing.float(), EXPERTS, weight, "silu")


def batch(tokens, dtype, top_k=2):
    # Nobody chooses expert 1; expert 2 is chosen often; -1 and 5 are no experts.
    index = torch.tensor([0, 2, 2, 3, 4, 2, -1, EXPERTS])[torch.randint(0, 8, (tokens, top_k))]
    return torch.randn(tokens, HIDDEN).to(dtype), index, torch.rand(tokens, top_k).to(dtype)


def assert_close(found, expected, bound):
    scale = max(float(expected.abs().max()), 1e-30)
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=bound * scale)


@pytest.mark.parametrize("name", CODE_NAMES)
@pytest.mark.parametrize("dtype", BOUNDS)
# Every size of block: 67 tokens give the favourite more rows than the largest.
@pytest.mark.parametrize("tokens", [0, 1, 2, 9, 67])
def test_against_decoded_weights(name, dtype, tokens):
    x, index, routing = batch(tokens, dtype)
    gate_up, down = layer(name)
    found = moe_experts_cpu(x, index, routing, gate_up, down)
    assert found.shape == x.shape and found.dtype == dtype and found.is_contiguous()
    if tokens:
        assert_close(found, reference(x, index, routing, gate_up, down), BOUNDS[dtype])


def test_nobody_is_chosen():
    x, _, routing = batch(3, torch.bfloat16)
    index = torch.full((3, 2), EXPERTS)
    assert not moe_experts_cpu(x, index, routing, *layer("cc2")).any()


def test_strides_and_index_types():
    # A transposed input, 32-bit indices, routing weights of another type than the inputs.
    x, index, routing = batch(6, torch.float32)
    gate_up, down = layer("cc4")
    expected = moe_experts_cpu(x, index, routing, gate_up, down)
    strided = x.T.contiguous().T
    found = moe_experts_cpu(strided, index.int(), routing.double(), gate_up, down)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_threads_do_not_change_a_bit(dtype):
    x, index, routing = batch(40, dtype)
    both = layer("cc3")
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(moe_experts_cpu(x, index, routing, *both))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_callers_at_the_same_time():
    # More callers than helpers: each gets its own result, and none waits for ever.
    both = layer("cc2")
    batches = [batch(5, torch.float32) for _ in range(6)]
    expected = [moe_experts_cpu(*some, *both) for some in batches]
    found = [None] * len(batches)

    def call(i):
        for _ in range(20):
            found[i] = moe_experts_cpu(*batches[i], *both)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_blocks_hold_every_row_once():
    most, group = most_tokens(get_code("cc4", 13), machine()), 12
    # 18 leaves half a group, 17 less; 200 are more than the largest block.
    for counts in ([0, 1, 0, 5, 67], [0], [most], [most + 1, 0, 2], [17, 18], [200, 12, 11]):
        rows = []
        for blocks in cut_into_blocks(counts, most, group):
            tables = (blocks.expert, blocks.first, blocks.rows)
            for expert, first, count in zip(*(t.tolist() for t in tables), strict=True):
                limit = MOST_GROUPS * blocks.tokens if blocks.grouped else blocks.tokens
                assert blocks.tokens <= count <= limit
                rows += [(row, expert) for row in range(first, first + count)]
        owners = [expert for expert, count in enumerate(counts) for _ in range(count)]
        assert sorted(rows) == list(enumerate(owners))
    assert [b.rows.tolist() for b in cut_into_blocks([18], most, group)] == [[18]]
    assert [b.rows.tolist() for b in cut_into_blocks([17], most, group)] == [[12], [4], [1]]
    assert not any(blocks.grouped for blocks in cut_into_blocks([40], most))
