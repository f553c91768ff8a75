"""`PackedExperts` alone: the sum over experts against explicit loops, rotation, kept weights."""

import pytest
import torch

from erniequant.packing.decoding import encode_scale
from erniequant.packing.rotation import pack_signs, random_signs, rotate
from erniequant.packing.schema import LayerSpec, MatrixSpec
from erniequant.runtime.experts import PackedExperts

EXPERTS, HIDDEN, INNER = 5, 96, 32
# Least tile, no size a power of two but one, rotation blocks 32 and 1 (signs only).
SPEC = LayerSpec(MatrixSpec("cc3", 12, 32, 32), MatrixSpec("cc2", 10, 32, 1))


@pytest.fixture
def experts() -> PackedExperts:
    module = PackedExperts(EXPERTS, HIDDEN, INNER, SPEC, "silu", "layer 1")
    generator = torch.Generator().manual_seed(11)
    for name, parameter in module.named_parameters():
        if name.endswith("_scale"):
            parameter.data = encode_scale(torch.rand(parameter.shape, generator=generator) * 0.1)
        elif name.endswith("_signs"):
            words = pack_signs(random_signs(parameter.shape[-1] * 32, generator))
            parameter.data = words.expand(parameter.shape).clone()
        elif name.endswith("_packed"):
            words = torch.randint(-(2**31), 2**31, parameter.shape, generator=generator)
            parameter.data = words.to(torch.int32)
    return module


def routed(tokens: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    scores = torch.rand(tokens, EXPERTS, generator=generator)
    weight, index = scores.topk(k, dim=-1)
    return x, index, (weight / weight.sum(-1, keepdim=True)).to(dtype)


# No token at all (a modality may have none), one, and more than experts; k = 1 and k = all.
@pytest.mark.parametrize(("tokens", "k"), [(0, 2), (1, 1), (23, 2), (4, EXPERTS)])
@torch.no_grad()
def test_weighted_sum_token_by_token(experts: PackedExperts, tokens: int, k: int) -> None:
    x, index, weight = routed(tokens, k, torch.float32)
    expected = torch.zeros(tokens, HIDDEN, dtype=torch.float64)
    for t in range(tokens):
        for slot in range(k):
            e = int(index[t, slot])
            gate_up = experts.weight("gate_up_proj", e, torch.float32).double()
            down = experts.weight("down_proj", e, torch.float32).double()
            gate, up = gate_up[:INNER] @ x[t].double(), gate_up[INNER:] @ x[t].double()
            y = down @ (gate * torch.sigmoid(gate) * up)
            expected[t] += weight[t, slot].double() * y
    got = experts(x, index, weight)
    assert got.shape == (tokens, HIDDEN) and got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_rotating_the_inputs_is_the_same(experts: PackedExperts) -> None:
    """What kernels do: rotate the activations and multiply by scaled labels."""
    from erniequant.codes.reference import decode
    from erniequant.packing.decoding import decode_scale
    from erniequant.packing.rotation import unpack_signs

    x = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(1))
    spec = SPEC.gate_up_proj
    labels = decode(experts.gate_up_proj_packed[3], spec.conv(), spec.tile)
    signs = unpack_signs(experts.gate_up_proj_signs[0, 1], HIDDEN)
    rotated = rotate(x, signs, spec.rotation_block) @ labels.T
    expected = rotated * decode_scale(experts.gate_up_proj_scale[3]).T
    got = x @ experts.weight("gate_up_proj", 3, torch.float32).T
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_sentinel_of_expert_parallelism_is_skipped(experts: PackedExperts) -> None:
    x, index, weight = routed(6, 2, torch.float32)
    alone = experts(x, index[:, :1], weight[:, :1])
    index[:, 1] = EXPERTS
    assert torch.equal(experts(x, index, weight), alone)


@torch.no_grad()
def test_bfloat16_sums_in_float32(experts: PackedExperts) -> None:
    x, index, weight = routed(9, 4, torch.bfloat16)
    got = experts(x, index, weight)
    assert got.dtype == torch.bfloat16
    one_by_one = [experts(x, index[:, s : s + 1], weight[:, s : s + 1]).float() for s in range(4)]
    # Adding rounded terms may be off by their rounding; the sum itself is rounded once.
    bound = sum(term.abs() for term in one_by_one) * 2**-8 + got.float().abs() * 2**-8
    assert ((got.float() - sum(one_by_one)).abs() <= bound).all()


@torch.no_grad()
def test_keeping_decoded_weights(experts: PackedExperts) -> None:
    x, index, weight = routed(5, 2, torch.float32)
    plain = experts(x, index, weight)
    first = experts.weight("down_proj", 0, torch.float32)
    assert experts.weight("down_proj", 0, torch.float32) is not first
    experts.keep_decoded = True
    # Decoded weights are not multiplied in the order of packed ones.
    error = (experts(x, index, weight) - plain).abs().max()
    assert error <= 1e-5 * plain.abs().max()
    kept = experts.weight("down_proj", 0, torch.float32)
    assert experts.weight("down_proj", 0, torch.float32) is kept
    assert experts.weight("down_proj", 0, torch.bfloat16).dtype == torch.bfloat16
    # New contents, through the one door there is for them, must not meet old weights.
    experts.load_state_dict({n: torch.zeros_like(p) for n, p in experts.state_dict().items()})
    assert not experts.weight("down_proj", 0, torch.float32).any()
    experts.keep_decoded = False
    assert experts.weight("down_proj", 0, torch.float32) is not kept
