"""The operator: what torch asks of one, compilation, and the kernels behind it."""

import pytest
import torch

from erniequant.packing.decoding import encode_scale
from erniequant.packing.schema import LayerSpec, MatrixSpec
from erniequant.runtime import ops
from erniequant.runtime.experts import PackedExperts

EXPERTS, HIDDEN, INNER = 5, 96, 64
SPEC = LayerSpec(MatrixSpec("cc2", 12, 32, 32), MatrixSpec("cc4", 13, 32, 64))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def experts():
    module = PackedExperts(EXPERTS, HIDDEN, INNER, SPEC, "silu", "layer 1")
    for name, parameter in module.named_parameters():
        if name.endswith("_scale"):
            parameter.data = encode_scale(torch.rand(parameter.shape) * 0.1 + 0.02)
        elif name.endswith(("_signs", "_packed")):
            words = torch.randint(-(2**31), 2**31, parameter.shape).to(torch.int32)
            words = words[:, :1].repeat(1, parameter.shape[1], 1) if "_signs" in name else words
            parameter.data = words
    return module.to(DEVICE)


def batch(tokens, dtype=torch.bfloat16):
    scores = torch.rand(tokens, EXPERTS, device=DEVICE)
    routing, index = scores.topk(2)
    return torch.randn(tokens, HIDDEN, device=DEVICE).to(dtype), index, routing.to(dtype)


def arguments(module, x, index, routing):
    return (
        x, index, routing,
        module.gate_up_proj_packed, module.gate_up_proj_scale, module.gate_up_proj_signs[0, 0],
        module.down_proj_packed, module.down_proj_scale, module.down_proj_signs[0, 0],
        ops.spec_text(SPEC), "silu",
    )  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_torch_accepts_the_operator(experts, tokens):
    torch.library.opcheck(ops.moe_experts, arguments(experts, *batch(tokens)))


@torch.no_grad()
def test_compiles_into_one_graph(experts):
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    for tokens in (3, 5):  # another number of tokens compiles again and must not break the graph
        x = batch(tokens)
        assert torch.equal(compiled(*x), experts(*x))


@torch.no_grad()
def test_a_compiled_module_does_not_use_kept_weights(experts):
    x = batch(3)
    expected = experts(*x)
    experts.keep_decoded = True
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*x), expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ops.KERNEL_DTYPES)
def test_kernels_and_plain_torch_agree(experts, dtype):
    x, index, routing = batch(9, dtype)
    index[4, 1] = EXPERTS  # the sentinel of expert parallelism
    reference = ops.experts_forward(
        x.float(), index, routing.float(), EXPERTS,
        lambda projection, e: experts.weight(projection, e, torch.float32), "silu",
    )  # fmt: skip
    _, _, _, *tensors, _spec, _act = arguments(experts, x, index, routing)
    found = ops.run_kernels(x, index, routing, tuple(tensors[:3]), tuple(tensors[3:]), SPEC)
    bound = 2**-7 * reference.abs().max().item()
    torch.testing.assert_close(found.float(), reference, rtol=0, atol=bound)


def test_a_gradient_reaches_the_inputs(experts):
    x, index, routing = batch(3, torch.float32)
    x.requires_grad_(True)
    experts(x, index, routing).square().sum().backward()
    step = 1e-2 * torch.nn.functional.normalize(x.grad, dim=None)
    with torch.no_grad():
        up, down = (experts(x + s * step, index, routing).square().sum() for s in (1, -1))
    torch.testing.assert_close(up - down, 2 * (x.grad * step).sum(), rtol=1e-2, atol=1e-4)


def test_arguments_restore_the_spec():
    assert ops.parse_spec(ops.spec_text(SPEC)) == SPEC


@pytest.mark.skipif(DEVICE == "cpu", reason="a CUDA graph; the shapes of launches are tested below")
@torch.no_grad()
def test_captured_in_a_cuda_graph(experts):
    static = batch(4)
    experts(*static)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = experts(*static)
    fresh = batch(4)
    for target, source in zip(static, fresh, strict=True):
        target.copy_(source)
    graph.replay()
    assert torch.equal(out, experts(*fresh))


@torch.no_grad()
def test_launches_do_not_depend_on_the_routing(experts, monkeypatch):
    # What a CUDA graph needs, without a GPU: equal kernels and grids for any routing, and no value
    # of a tensor is asked for on the way.
    from erniequant_kernels import combine, dense_gemm, expand, packed_gemm, prepare, rotation

    launches = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            launches.append((self.kernel, grid))
            return lambda *_, **__: None

    for module in (combine, dense_gemm, expand, packed_gemm, prepare, rotation):
        for name in dir(module):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Recorder(name))
    for name in ("item", "tolist", "__bool__", "__int__", "cpu", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, _refuse)
    _, _, _, *tensors, _spec, _act = arguments(experts, *batch(4))
    seen = []
    for index in (torch.zeros(4, 2), torch.full((4, 2), EXPERTS), torch.arange(8).view(4, 2) % 5):
        x, _, weights = batch(4)
        chosen = index.to(torch.int64).to(DEVICE)
        ops.run_kernels(x, chosen, weights, tuple(tensors[:3]), tuple(tensors[3:]), SPEC)
        seen.append(list(launches))
        launches.clear()
    assert len(seen[0]) == 5 and seen[0] == seen[1] == seen[2]


def _refuse(*_):
    raise AssertionError("the host waits for the device")


@torch.no_grad()
def test_a_whole_model_on_the_kernels(packed_ernie, monkeypatch):
    # Both layers: three codes, tiles of 32 and 64, rotation blocks 64, 32 and none at all.
    from erniequant import load
    from erniequant.runtime import experts as module

    model, _ = load(packed_ernie, device=DEVICE, dtype="bfloat16", keep_decoded=False)
    ids = torch.randint(0, 128, (2, 9), device=DEVICE)
    with monkeypatch.context() as plain:
        plain.setattr(module, "moe_experts", ops._in_plain_torch)
        expected = model(input_ids=ids).logits.float()
    calls = []

    def on_kernels(x, index, routing, *rest):
        calls.append(len(x))
        *tensors, spec, _ = rest
        layer = ops.parse_spec(spec)
        return ops.run_kernels(x, index, routing, tuple(tensors[:3]), tuple(tensors[3:]), layer)

    monkeypatch.setattr(module, "moe_experts", on_kernels)
    found = model(input_ids=ids).logits.float()
    assert calls == [18, 18]
    divergence = torch.nn.functional.kl_div(
        found.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert divergence.mean() < 5e-4
