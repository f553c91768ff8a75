"""A whole layer of experts on packed weights, in every regime, against plain torch."""

import contextlib
import dataclasses

import pytest
import torch

from erniequant.packing.decoding import decode_weight, encode_scale
from erniequant.packing.rotation import pack_signs, random_signs
from erniequant.packing.schema import MatrixSpec
from erniequant_kernels import moe
from erniequant_kernels.dense_gemm import DenseGemmConfig
from erniequant_kernels.matrices import PackedMatrices
from erniequant_kernels.moe import moe_experts, plan
from erniequant_kernels.tuning import PackedRow, Tuning, tables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HIDDEN, INNER, EXPERTS = 192, 96, 5

# One table per regime, small enough for the interpreter.
DENSE = DenseGemmConfig(16, 64, 32, 4, 2, 8)
SMALL = Tuning(8, (PackedRow(1e9, 8, 32, 1, 2),), DENSE, 2**20)
GROUPED = Tuning(64, (PackedRow(1e9, 16, 32, 2, 2),), DENSE, 2**20)
ONCE = Tuning(8, (), DENSE, 2 * 2 * 2 * HIDDEN * INNER * 2)  # two experts' gate and up at a time
REGIMES = {"small": SMALL, "grouped": GROUPED, "decode once": ONCE}


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
    bound = 2**-7 * expected.abs().max().item()
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=bound)
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
@pytest.mark.parametrize("codes", [("cc2", "cc2"), ("cc3", "cc3"), ("cc4", "cc4"), ("cc4", "cc3")])
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


def test_wider_row_tiles_are_for_layers_of_four_bits_throughout():
    loads = (1, 40, 100, 10**4)
    found = {}
    for codes in (("cc4", "cc4"), ("cc2", "cc4"), ("cc3", "cc3")):
        gate_up, down = layer(*codes)
        plans = [plan(tokens, 2, gate_up[0], down[0], tables()["sm_90"]) for tokens in loads]
        found[codes] = [None if p.gate_up.config is None else p.block_m for p in plans]
    assert found[("cc4", "cc4")] == [8, 32, 32, None]
    assert found[("cc2", "cc4")] == found[("cc3", "cc3")] == [8, 16, 16, None]


def test_shipped_tables_use_every_regime():
    gate_up, down = layer()
    for tuning in tables().values():
        kinds = {
            None if how.gate_up.config is None else how.block_m
            for how in (plan(tokens, 2, gate_up[0], down[0], tuning) for tokens in (1, 40, 10**4))
        }
        assert kinds == {8, 16, None}


class FakeStream:
    """Launches in order; an event stands for all launches so far and what they waited for."""

    def __init__(self):
        self.before = set()

    def launch(self, name):
        done = set(self.before)
        self.before.add(name)
        return done

    def record_event(self):
        return set(self.before)

    def wait_event(self, event):
        self.before |= event

    def wait_stream(self, other):
        self.before |= other.before


def test_decoding_beside_products_never_overtakes_them(monkeypatch):
    # The twin of the streams on a GPU: what has surely finished when each launch starts.
    main, side = FakeStream(), FakeStream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: main)
    monkeypatch.setattr(moe, "_side_stream", lambda _: side)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    main.launch("rotation")
    overlap = moe._Overlap(torch.device("cuda"))
    for turn in range(5):
        with overlap.decoding(turn):
            finished = side.launch(f"labels {turn}")
        assert "rotation" in finished
        if turn >= 2:  # the half that it writes
            assert f"product {turn - 2}" in finished
            assert f"product {turn - 1}" not in finished  # or nothing would overlap
        overlap.wait_for_labels()
        assert f"labels {turn}" in main.launch(f"product {turn}")
        overlap.multiplied()
    assert {f"labels {turn}" for turn in range(5)} <= main.before, "joined at the end"
