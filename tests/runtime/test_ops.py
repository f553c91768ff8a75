"""The operator: what torch asks of one, compilation, and the kernels behind it."""

import pytest
import torch

from erniequant.errors import ErnieQuantWarning
from erniequant.packing.decoding import encode_scale
from erniequant.packing.schema import LayerSpec, MatrixSpec
from erniequant.runtime import cards, ops
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


def transposed(x):
    """The same values, columns first in memory."""
    return x.t().contiguous().t()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])  # kernels, and plain torch
def test_inputs_may_lie_in_memory_as_they_like(experts, dtype):
    x, index, routing = batch(6, dtype)
    expected = ops.moe_experts(*arguments(experts, x, index, routing))
    strided = arguments(experts, transposed(x), transposed(index), transposed(routing))
    found = ops.moe_experts(*strided)
    assert torch.equal(found, expected)
    assert found.is_contiguous()  # as torch.compile is told
    torch.library.opcheck(ops.moe_experts, strided)


def test_the_gradient_of_strided_inputs_is_contiguous(experts):
    x, index, routing = batch(6, torch.float32)
    given = arguments(experts, transposed(x), transposed(index), transposed(routing))
    *tensors, _activation = given
    grad = torch.randn_like(x)
    found = ops.moe_experts_backward(grad, *tensors)
    assert [g.is_contiguous() for g in found] == [True, True]
    torch.library.opcheck(ops.moe_experts_backward, (grad, *tensors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_decides_about_the_dtype(experts, dtype):
    # As for a linear layer; float32 would leave the kernels of a GPU and wait for it.
    x, index, routing = batch(6, torch.float32)
    expected = ops.moe_experts(*arguments(experts, x.to(dtype), index, routing))
    with torch.autocast(DEVICE, dtype=dtype):
        found = ops.moe_experts(*arguments(experts, x.requires_grad_(True), index, routing))
        double = ops.moe_experts(*arguments(experts, x.detach().double(), index, routing))
    assert found.dtype == dtype and torch.equal(found, expected)
    assert double.dtype == torch.float64
    found.float().sum().backward()
    assert x.grad.dtype == torch.float32 and x.grad.abs().sum() > 0


class Card:
    """What torch says of a GPU."""

    def __init__(self, monkeypatch, name, capability, hip=None):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        cards.runs_kernels.cache_clear()


@pytest.fixture
def forget_cards():
    yield
    cards.runs_kernels.cache_clear()


@pytest.mark.usefixtures("forget_cards")
@pytest.mark.parametrize(
    "card", [("Tesla T4", (7, 5), None), ("AMD Instinct MI250X", (9, 0), "6.4")]
)
def test_other_cards_decode_in_plain_torch_and_say_so_once(card, monkeypatch):
    Card(monkeypatch, *card)
    device = torch.device("cuda", 0)
    with pytest.warns(ErnieQuantWarning, match=f"{card[0]}.*device='cpu'.*keep_decoded") as said:
        assert not any(ops.takes(device, dtype) for dtype in ops.KERNEL_DTYPES)
        assert not ops.takes(device, torch.bfloat16)
    assert len(said) == 1


@pytest.mark.usefixtures("forget_cards")
def test_cards_from_ampere_on_run_the_kernels(monkeypatch, recwarn):
    for capability in ((8, 0), (8, 9), (9, 0), (12, 0)):
        Card(monkeypatch, "card", capability)
        assert ops.takes(torch.device("cuda", 0), torch.bfloat16)
        assert not ops.takes(torch.device("cuda", 0), torch.float32)
        assert not ops.takes(torch.device("cuda", 0), torch.bfloat16, "gelu")
    assert not [w for w in recwarn if issubclass(w.category, ErnieQuantWarning)]


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
    from erniequant_kernels import combine, fused_gemm, packed_gemm, prepare, rotation

    launches = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            launches.append((self.kernel, grid))
            return lambda *_, **__: None

    for module in (combine, fused_gemm, packed_gemm, prepare, rotation):
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
    # Both layers: all codes, tiles of 32 and 64, rotation blocks 64, 32 and none at all.
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
