"""Packed products on the CPU against decoded ones, for every code and awkward sizes, in the code of
this machine and in that of one with AVX2."""

import platform

import llvmlite.binding as llvm
import pytest
import torch

from erniequant.codes import CODE_NAMES, REGISTERED, get_code
from erniequant_kernels.cpu.machine import machine, machine_of
from erniequant_kernels.cpu.moe import BLOCK_TOKENS
from erniequant_kernels.cpu.product import (
    MOST_GROUPS,
    ProductSpec,
    group_tokens,
    most_tokens,
    product,
    product_reference,
    takes_bfloat16,
)

HERE = machine()
MACHINES = [pytest.param(HERE, id="this machine")]
if platform.machine() == "x86_64" and dict(llvm.get_host_cpu_features()).get("avx2"):
    MACHINES.append(pytest.param(machine_of("haswell", {}), id="AVX2"))


def random_words(*shape):
    return torch.randint(-(2**31), 2**31, shape).to(torch.int32)


def multiplied(x, packed, scale, code, tile, expert, first, on, grouped=None):
    """Products of blocks of as many rows as lie between two firsts, or of the rows that ``grouped``
    has for each; rows of none stay nan."""
    tokens = first[1] - first[0] if len(first) > 1 else len(x) - first[0]
    rows = [tokens] * len(first)
    if grouped is not None:
        tokens, rows = group_tokens(code, on), grouped
    bfloat16 = x.dtype == torch.bfloat16
    spec = ProductSpec(code, tile, x.shape[1], tokens, bfloat16, grouped is not None)
    outputs = packed.shape[1] * tile
    out = torch.full((len(x), outputs), torch.nan)
    counter = torch.zeros(1, dtype=torch.int64)
    tables = [torch.tensor(values, dtype=torch.int32) for values in (expert, first, rows)]
    product(spec, on)(
        counter.data_ptr(), len(expert) * packed.shape[1], packed.shape[1], packed.data_ptr(),
        packed[0].nbytes, *(table.data_ptr() for table in tables), x.data_ptr(), scale.data_ptr(),
        out.data_ptr(),
    )  # fmt: skip
    return out


def problem(code, tile, tiles, inputs, rows, bfloat16, experts=2):
    packed = random_words(experts, tiles, inputs * code.words_per_sequence(tile))
    # Scales of every size and sign, and zero.
    scale = (torch.randn(experts, tiles * tile) * 0.1).bfloat16()
    scale[0, 0] = 0
    x = torch.randn(rows, inputs).bfloat16()
    return x if bfloat16 else x.float(), packed, scale.view(torch.int16)


def assert_product(found, x, packed, scale, code, tile):
    expected = product_reference(x.double(), packed, scale, code, tile)
    bound = 2e-6 * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)


def precisions(code, tile, inputs, on):
    return [True, False] if takes_bfloat16(code, tile, inputs, on) else [False]


@pytest.mark.parametrize("on", MACHINES)
@pytest.mark.parametrize("name, length", REGISTERED)
def test_one_hot_inputs_read_every_weight(name, length, on):
    # Row i has a one at input i: the products are the weights, without any rounding. One token a
    # block, and two, whose labels of two inputs may lie side by side.
    code, tile, inputs = get_code(name, length), 64, 32
    packed = random_words(1, 3, inputs * code.words_per_sequence(tile))
    scale = torch.ones(1, 3 * tile).bfloat16().view(torch.int16)
    for bfloat16 in precisions(code, tile, inputs, on):
        x = torch.eye(inputs, dtype=torch.bfloat16 if bfloat16 else torch.float32)
        expected = product_reference(x, packed[0], scale[0], code, tile)
        for tokens in (1, 8):
            first = list(range(0, inputs, tokens))
            found = multiplied(x, packed, scale, code, tile, [0] * len(first), first, on)
            assert torch.equal(found, expected), (bfloat16, tokens)


# tile, tiles, inputs. Tiles of 32 and 64 fill a vector with several inputs; 96 inputs are no
# multiple of the block of inputs, 200 end in the middle of one, 36 leave lanes free (four inputs at
# a time at most), 17 is odd: one input at a time, and no two side by side.
SIZES = [(32, 3, 96), (64, 1, 200), (64, 2, 36), (128, 3, 64), (256, 1, 160), (256, 2, 17)]


@pytest.mark.parametrize("on", MACHINES)
@pytest.mark.parametrize("name", CODE_NAMES)
@pytest.mark.parametrize("tile, tiles, inputs", SIZES)
def test_sizes(name, tile, tiles, inputs, on):
    code = get_code(name, 13)
    for bfloat16 in precisions(code, tile, inputs, on):
        x, packed, scale = problem(code, tile, tiles, inputs, 7, bfloat16)
        # Two blocks of three rows, of different experts; row 6 belongs to none.
        found = multiplied(x, packed, scale, code, tile, [1, 0], [0, 3], on)
        assert_product(found[:3], x[:3], packed[1], scale[1], code, tile)
        assert_product(found[3:6], x[3:6], packed[0], scale[0], code, tile)
        assert found[6].isnan().all()


@pytest.mark.parametrize("name", CODE_NAMES)
def test_every_size_of_block(name):
    code, tile, inputs = get_code(name, 12), 256, 96
    for bfloat16 in precisions(code, tile, inputs, HERE):
        for tokens in (t for t in BLOCK_TOKENS if t <= most_tokens(code, HERE)):
            x, packed, scale = problem(code, tile, 1, inputs, tokens, bfloat16)
            found = multiplied(x, packed, scale, code, tile, [1], [0], HERE)
            assert_product(found, x, packed[1], scale[1], code, tile)


@pytest.mark.parametrize("on", MACHINES)
@pytest.mark.parametrize("name", CODE_NAMES)
@pytest.mark.parametrize("tile, tiles, inputs", SIZES)
def test_groups(name, tile, tiles, inputs, on):
    # One group alone, one and a row, which is done with rows of the first, as many as there can be;
    # rows before, between and after belong to none.
    code = get_code(name, 13)
    group = group_tokens(code, on)
    rows = [group, group + 1, MOST_GROUPS * group]
    first = [1, group + 2, 2 * group + 3]
    for bfloat16 in precisions(code, tile, inputs, on):
        total = first[-1] + rows[-1] + 1
        x, packed, scale = problem(code, tile, tiles, inputs, total, bfloat16)
        found = multiplied(x, packed, scale, code, tile, [1, 0, 1], first, on, grouped=rows)
        for expert, start, count in zip([1, 0, 1], first, rows, strict=True):
            part = slice(start, start + count)
            assert_product(found[part], x[part], packed[expert], scale[expert], code, tile)
        covered = {row for s, c in zip(first, rows, strict=True) for row in range(s, s + c)}
        assert found[[row for row in range(total) if row not in covered]].isnan().all()


@pytest.mark.parametrize("on", MACHINES)
@pytest.mark.parametrize("name", CODE_NAMES)
def test_adversarial_inputs(name, on):
    # Huge values that cancel, a row that is zero but for one tiny value, one near the largest
    # number, infinity, nan: sums must carry them as float32 sums do.
    code, tile, inputs = get_code(name, 16), 64, 64
    for bfloat16 in precisions(code, tile, inputs, on):
        x, packed, scale = problem(code, tile, 1, inputs, 5, bfloat16)
        x[0, 1::2] = -x[0, ::2]
        x[0] *= 1e4
        x[1] = 0
        x[1, 7] = 1e-20
        x[2] *= 2.0**110
        x[3, 5], x[4, 9] = torch.inf, torch.nan
        found = multiplied(x, packed, scale, code, tile, [1], [0], on)
        for row in range(3):
            assert_product(found[row : row + 1], x[row : row + 1], packed[1], scale[1], code, tile)
        assert not found[3].isfinite().any()
        assert found[4].isnan().all()


@pytest.mark.parametrize("name", CODE_NAMES)
def test_the_first_register_reaches_back_to_the_end_of_its_own_sequence(name):
    # Only the last bit of row 1 is set: of all weights, only row 1's first and last may change.
    code, tile, inputs = get_code(name, 16), 64, 8
    words = code.words_per_sequence(tile)
    packed = torch.zeros(1, 1, inputs * words, dtype=torch.int32)
    scale = torch.ones(1, tile).bfloat16().view(torch.int16)
    x, blocks = torch.eye(inputs), list(range(inputs))
    before = multiplied(x, packed, scale, code, tile, [0] * inputs, blocks, HERE)
    packed[..., 2 * words - 1] = 1
    changed = multiplied(x, packed, scale, code, tile, [0] * inputs, blocks, HERE) != before
    assert changed.any(1).tolist() == [row == 1 for row in range(inputs)]
    assert changed[1, 0] and changed[1, -1] and not changed[1, 16:48].any()
