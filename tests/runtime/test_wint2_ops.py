"""The operator for experts in WINT2: what torch asks of one, its numbers against decoded weights in
float64, and the module that uses it."""

import pytest
import torch
from torch.nn import functional

from erniequant.ccq import decode_wint2
from erniequant.runtime.fastdeploy_experts import FastDeployExperts
from erniequant.runtime.wint2_ops import PARTS, moe_experts_wint2, run_wint2_kernels
from tests.ccq.test_moe import DEVICE, EXPERTS, HIDDEN, INNER, matrices, weight

ORDERS = ("plain", "mma64")
# Of the norm. Kernels round activations to bfloat16; sums over experts are float32 everywhere.
BOUNDS = {torch.float32: 1e-5, torch.float16: 2**-8, torch.bfloat16: 2**-6, torch.float64: 1e-6}


def layer(k_order):
    """Hidden 640 = 128 * 5, inner 128: the least that the format has."""
    return matrices(HIDDEN, 2 * INNER, k_order, 1), matrices(INNER, HIDDEN, k_order, 2)


def batch(tokens, dtype):
    """Expert 3 gets no token; some choices are of no expert, on either side."""
    index = torch.tensor([0, 1, 2, 4, -1, EXPERTS])[torch.randint(0, 6, (tokens, 2))]
    x, routing = torch.randn(tokens, HIDDEN), torch.rand(tokens, 2)
    if tokens:
        index[0] = torch.tensor([4, 0])
    return x.to(DEVICE, dtype), index.to(DEVICE), routing.to(DEVICE, dtype)


def arguments(k_order, x, index, routing):
    gate_up, down = layer(k_order)
    return x, index, routing, list(gate_up.parts), list(down.parts), k_order


def expected_output(k_order, x, index, routing):
    """One assignment after another."""
    gate_up, down = layer(k_order)
    out = torch.zeros(x.shape, dtype=torch.float64, device=DEVICE)
    for token, choices in enumerate(index.tolist()):
        for slot, expert in enumerate(choices):
            if 0 <= expert < EXPERTS:
                gate, up = (weight(gate_up, expert).double() @ x[token].double()).chunk(2)
                y = weight(down, expert).double() @ (functional.silu(gate) * up)
                out[token] += routing[token, slot].double() * y
    return out


def require_close(found, expected, dtype):
    assert (found.double() - expected).norm() <= BOUNDS[dtype] * expected.norm()


@torch.no_grad()
@pytest.mark.parametrize("k_order", ORDERS)
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("tokens", [1, 13])
def test_against_decoded_weights(tokens, dtype, k_order):
    given = batch(tokens, dtype)
    found = moe_experts_wint2(*arguments(k_order, *given))
    assert found.dtype == dtype and found.is_contiguous()
    require_close(found, expected_output(k_order, *given), dtype)


@torch.no_grad()
@pytest.mark.parametrize("k_order", ORDERS)
@pytest.mark.parametrize("tokens", [1, 37])
def test_kernels_of_a_gpu(tokens, k_order):
    given = batch(tokens, torch.bfloat16)
    found = run_wint2_kernels(*arguments(k_order, *given))
    require_close(found, expected_output(k_order, *given), torch.bfloat16)


@torch.no_grad()
@pytest.mark.parametrize(
    ("run", "dtype"),
    [
        (moe_experts_wint2, torch.bfloat16),
        (moe_experts_wint2, torch.float64),  # plain torch
        (run_wint2_kernels, torch.bfloat16),
    ],
)
def test_indexes_of_no_expert_contribute_nothing(run, dtype):
    x, index, routing = batch(6, dtype)
    index[:, 1] = torch.tensor([-1, EXPERTS, -7, EXPERTS + 9, -1, 2**31 - 1])
    index[:, 0] = torch.tensor([-1, 0, 1, 2, 4, 4])
    routing[:, 1] = torch.nan  # a router may leave anything there
    found = run(*arguments("mma64", x, index, routing))
    alone = run(*arguments("mma64", x, index[:, :1].contiguous(), routing[:, :1].contiguous()))
    assert torch.equal(found, alone) and not found[0].any() and found[1:].any(1).all()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_torch_accepts_the_operator(tokens, dtype):
    torch.library.opcheck(moe_experts_wint2, arguments("mma64", *batch(tokens, dtype)))


@torch.no_grad()
def test_inputs_may_lie_in_memory_as_they_like():
    given = batch(6, torch.bfloat16)
    expected = moe_experts_wint2(*arguments("plain", *given))
    strided = arguments("plain", *(tensor.T.contiguous().T for tensor in given))
    assert torch.equal(moe_experts_wint2(*strided), expected)
    torch.library.opcheck(moe_experts_wint2, strided)


def module(k_order="mma64"):
    names = ("up_gate_proj", "down_proj")
    # The order of a checkpoint's tensors is not that of the operator.
    parts = {
        name: dict(reversed(list(zip(PARTS, matrix.parts, strict=True))))
        for name, matrix in zip(names, layer(k_order), strict=True)
    }

    def decode(stored):
        return decode_wint2(*(stored[part] for part in PARTS), k_order=k_order).T

    return FastDeployExperts(parts, dict.fromkeys(names, decode), "silu", 0, k_order)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_module_compiles_into_one_graph(dtype):
    # With gradients on, as after loading, and for more than one number of tokens.
    torch._dynamo.reset()
    experts = module()
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    for tokens in (3, 5):
        given = batch(tokens, dtype)
        found = compiled(*given)
        assert torch.equal(found, experts(*given))
        require_close(found, expected_output("mma64", *given), dtype)


@torch.no_grad()
def test_a_compiled_module_does_not_use_kept_weights():
    torch._dynamo.reset()
    experts, given = module(), batch(3, torch.float32)
    packed = experts(*given)
    experts.keep_decoded = True
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*given), packed)
    require_close(experts(*given), packed.double(), torch.float32)


def test_a_gradient_reaches_the_inputs():
    x, index, routing = batch(3, torch.float64)
    x.requires_grad_(True)
    module()(x, index, routing).square().sum().backward()
    direction = functional.normalize(x.grad, dim=None)
    with torch.no_grad():
        up, down = (
            expected_output("mma64", x + s * 1e-4 * direction, index, routing).square().sum()
            for s in (1, -1)
        )
    torch.testing.assert_close((up - down) / 2e-4, (x.grad * direction).sum(), rtol=1e-5, atol=0)
