"""A whole layer of experts on packed weights, in every regime, against plain torch."""

import dataclasses

import pytest
import torch

from erniequant.codes import CODE_NAMES
from erniequant.packing.decoding import decode_weight, encode_scale
from erniequant.packing.rotation import pack_signs, random_signs
from erniequant.packing.schema import MatrixSpec
from erniequant_kernels.fused_gemm import FusedGemmConfig
from erniequant_kernels.matrices import PackedMatrices
from erniequant_kernels.moe import moe_experts, plan
from erniequant_kernels.tuning import FusedTile, PackedTile, Tuning, TuningRow, tables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HIDDEN, INNER, EXPERTS = 192, 96, 5


# One table per regime, small enough for the interpreter. 3 bits take fewer warps, as shipped.
def only(kernel, block_m, tile, warps_wanted=8):
    tiles = {bits: tile for bits in (2, 3, 4)}
    return Tuning(warps_wanted, (TuningRow(float("inf"), kernel, block_m, tiles),))


REGIMES = {
    "small": only("packed", 8, PackedTile(32, 1, 2)),
    "grouped": only("packed", 16, PackedTile(32, 2, 2), 64),
    "fused": only("fused", 16, FusedTile(64, 32, 4, 2)),
}


def matrices(spec, outputs, inputs, seed):
    torch.manual_seed(seed)
    code = spec.conv()
    words = (EXPERTS, outputs // spec.tile, inputs * code.words_per_sequence(spec.tile))
    packed = torch.randint(-(2**31), 2**31, words).to(torch.int32)
    scale = encode_scale(torch.rand(EXPERTS, outputs, 1) * 0.1 + 0.02)
    signs = pack_signs(random_signs(inputs, torch.Generator().manual_seed(seed)))
    return PackedMatrices(
        packed.to(DEVICE), scale.to(DEVICE), signs.to(DEVICE), code, spec.tile, spec.rotation_block
    )


def dense(matrix, spec):
    return decode_weight(matrix.packed, matrix.scale, matrix.signs, spec)


def layer(gate_up_code="cc2", down_code="cc4"):
    # 192 = 64 * 3 hidden channels: an odd number of tiles. 96 inner channels: blocks of 32.
    gate_up = MatrixSpec(gate_up_code, 12, 32, 64)
    down = MatrixSpec(down_code, 13, 64, 32)
    return (
        (matrices(gate_up, 2 * INNER, HIDDEN, 1), gate_up),
        (matrices(down, HIDDEN, INNER, 2), down),
    )


def expected_output(x, index, routing, gate_up, down):
    """float32 throughout, one assignment after another."""
    first, second = dense(*gate_up), dense(*down)
    out = torch.zeros(x.shape, device=x.device)
    for token in range(len(x)):
        for slot in range(index.shape[1]):
            expert = int(index[token, slot])
            if 0 <= expert < EXPERTS:
                gate, up = (first[expert] @ x[token].float()).chunk(2)
                y = second[expert] @ (torch.nn.functional.silu(gate) * up)
                out[token] += routing[token, slot] * y
    return out


def check(tuning, index, x=None, codes=("cc2", "cc4"), dtype=torch.bfloat16):
    gate_up, down = layer(*codes)
    torch.manual_seed(4)
    index = index.to(DEVICE)
    x = torch.randn(len(index), HIDDEN, device=DEVICE).to(dtype) if x is None else x.to(DEVICE)
    routing = torch.rand(index.shape, device=DEVICE)
    found = moe_experts(x, index, routing, gate_up[0], down[0], tuning)
    expected = expected_output(x, index, routing, gate_up, down)
    assert found.dtype == x.dtype and found.shape == x.shape
    # Inputs, results and what lies between the projections are rounded to bfloat16: 2^-9 each.
    error = found.float() - expected
    assert error.norm() <= 2**-7 * expected.norm()
    assert error.abs().max() <= 2**-6 * expected.abs().max()
    return found


ROUTINGS = {
    "one token": torch.tensor([[4, 0]]),
    "all on one expert": torch.full((19, 1), 2),
    "experts without tokens, twice the same": torch.tensor([[0, 3], [3, 3], [0, 3]]),
    "beyond the experts": torch.tensor([[5, 1], [-1, 7], [2, 5]]),
    "mixed": torch.tensor([[0, 1, 2], [3, 4, 0], [1, 2, 3], [4, 0, 1], [2, 3, 4]] * 4),
}


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_any_routing(regime, routing):
    check(REGIMES[regime], ROUTINGS[routing])


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("codes", [(name, name) for name in CODE_NAMES] + [("cc4", "cc3")])
def test_every_code(regime, codes):
    check(REGIMES[regime], torch.tensor([[0, 1], [4, 1], [3, 0]]), codes=codes)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_activation_types(regime, dtype):
    check(REGIMES[regime], torch.tensor([[0, 1], [4, 1], [3, 0]]), dtype=dtype)


@pytest.mark.parametrize("regime", REGIMES)
def test_one_large_channel(regime):
    # Massive activations of real models: one channel a thousand times the others.
    x = torch.randn(4, HIDDEN)
    x[:, 17] = 1000
    check(REGIMES[regime], torch.tensor([[0, 1], [4, 1], [3, 0], [2, 2]]), x.bfloat16())


@pytest.mark.parametrize("regime", REGIMES)
def test_the_result_of_a_token_does_not_depend_on_its_company(regime):
    # Other tokens change its place in a row tile and nothing else. 3 and 3 + 20 tokens give other
    # splits if the table says so; here both stay in one plan.
    gate_up, down = layer()
    index = torch.tensor([[0, 1], [4, 1], [3, 0]] * 2).to(DEVICE)
    x = torch.randn(6, HIDDEN, device=DEVICE).bfloat16()
    routing = torch.rand(6, 2, device=DEVICE)
    tuning = dataclasses.replace(REGIMES[regime], warps_wanted=1)
    whole = moe_experts(x, index, routing, gate_up[0], down[0], tuning)
    alone = moe_experts(x[4:5], index[4:5], routing[4:5], gate_up[0], down[0], tuning)
    assert torch.equal(whole[4:5], alone)


@pytest.mark.parametrize("regime", REGIMES)
def test_no_tokens(regime):
    gate_up, down = layer()
    empty = torch.empty(0, 2, dtype=torch.int64, device=DEVICE)
    x = torch.empty(0, HIDDEN, dtype=torch.bfloat16, device=DEVICE)
    out = moe_experts(x, empty, empty.float(), gate_up[0], down[0], REGIMES[regime])
    assert out.shape == (0, HIDDEN)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("tokens", [1, 7])
def test_the_workspace_is_what_the_plan_says(regime, tokens, monkeypatch):
    allocated = []
    real = torch.empty

    def counting(*args, **kwargs):
        out = real(*args, **kwargs)
        allocated.append(out.nbytes)
        return out

    gate_up, down = layer()
    x = torch.randn(tokens, HIDDEN, device=DEVICE).bfloat16()
    index = torch.arange(2 * tokens, device=DEVICE).view(tokens, 2) % EXPERTS
    routing = torch.rand(tokens, 2, device=DEVICE)
    tuning = REGIMES[regime]
    monkeypatch.setattr(torch, "empty", counting)
    moe_experts(x, index, routing, gate_up[0], down[0], tuning)
    stated = plan(tokens, 2, gate_up[0], down[0], tuning).workspace_bytes
    assert sum(allocated) == stated


def test_shipped_tables_use_both_kernels_and_few_variants():
    # A kernel is compiled anew for every configuration: 21B shapes, 1 to 4096 tokens.
    gate_up, down = sizes_of(3072, 2560), sizes_of(2560, 1536)
    for name, tuning in tables().items():
        found = {"packed": set(), "fused": set()}
        for tokens in range(1, 4097):
            how = plan(tokens, 6, gate_up, down, tuning)
            for matrix in (how.gate_up, how.down):
                kernel = "fused" if isinstance(matrix.config, FusedGemmConfig) else "packed"
                found[kernel].add((matrix.rotated[1], matrix.config))
        assert 1 <= len(found["packed"]) <= 8 and 1 <= len(found["fused"]) <= 6, name


def sizes_of(outputs, inputs):
    """Matrices of 64 experts at 2 bits, without memory."""
    code = MatrixSpec("cc2", 12, 256, 128).conv()
    packed = torch.empty(64, outputs // 256, inputs * 16, dtype=torch.int32, device="meta")
    return PackedMatrices(packed, packed, packed, code, 256, 128)


def test_splits_depend_on_the_row_and_not_on_the_tokens():
    # The first row is for one token: six experts must fill the card. At the least load of the
    # third, 64 x 0.75 assignments hit 48 experts.
    tuning = tables()["sm_90"]
    gate_up, down = sizes_of(3072, 2560), sizes_of(2560, 1536)
    one, two, eight, nine, more = (
        plan(t, 6, gate_up, down, tuning).gate_up.config for t in (1, 2, 8, 9, 48)
    )
    assert two == eight
    assert nine == more
    assert one.splits > nine.splits
