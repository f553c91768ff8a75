"""The operator for one packed matrix: what torch asks of one, its numbers against decoded weights
in float64, and that nothing in it waits for a device."""

import pytest
import torch

from erniequant.errors import ErnieQuantError
from erniequant.packing.decoding import decode_weight, encode_scale
from erniequant.packing.schema import MatrixSpec, param_info
from erniequant.runtime import ops
from erniequant.runtime.packed_linear import (
    matrix_text,
    packed_linear,
    packed_linear_backward,
    run_linear_kernels,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative to the largest output. Inputs in bfloat16 are rounded once more after the rotation.
BOUNDS = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float64: 1e-12}

# 96 = 32 * 3 and 576 = 64 * 9 inputs are no powers of two, nor are three and five tiles; one tile
# is the least. Rotation blocks of 1 (signs only), 32 and 64. 80 inputs end in half a word of signs.
MATRICES = {
    "cc2": (MatrixSpec("cc2", 12, 64, 32), 192, 96),
    "cc2s": (MatrixSpec("cc2s", 16, 64, 32), 192, 160),
    "cc3": (MatrixSpec("cc3", 16, 32, 64), 160, 576),
    "cc4": (MatrixSpec("cc4", 13, 256, 1), 256, 96),
    "half a word": (MatrixSpec("cc2", 16, 32, 16), 32, 80),
}
TOKENS = (1, 3, 17, 300)


def stored(name, parts=2):
    """Packed, scale and signs of a matrix, as files have them, and its spec as a text."""
    spec, outputs, inputs = MATRICES[name]
    infos = param_info(1, outputs, inputs, spec, parts=parts)
    packed, signs = (
        torch.randint(-(2**31), 2**31, infos[key][0]).to(torch.int32) for key in ("packed", "signs")
    )
    scale = encode_scale(torch.rand(infos["scale"][0]) * 0.1 + 0.02)
    signs = signs[:, :1].repeat(1, parts, 1)
    return tuple(tensor.to(DEVICE) for tensor in (packed, scale, signs)), matrix_text(spec)


def inputs_of(name, *shape, dtype=torch.float32):
    return torch.randn(*shape, MATRICES[name][2], device=DEVICE).to(dtype)


def decoded(name, tensors):
    packed, scale, signs = tensors
    return decode_weight(packed[0], scale[0], signs[0, 0], MATRICES[name][0]).double()


def require_close(found, expected, dtype):
    bound = BOUNDS[dtype] * expected.abs().max().item()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=bound)


@torch.no_grad()
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", MATRICES)
def test_against_decoded_weights(name, tokens, dtype):
    tensors, spec = stored(name)
    x = inputs_of(name, tokens, dtype=dtype)
    found = packed_linear(x, *tensors, spec)
    assert found.dtype == dtype and found.is_contiguous()
    require_close(found, x.double() @ decoded(name, tensors).T, dtype)
    assert torch.equal(packed_linear(x, *tensors, spec), found)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ops.KERNEL_DTYPES)
@pytest.mark.parametrize("name", MATRICES)
# Few tokens take the packed product, many the fused one.
@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_kernels_of_a_gpu(name, tokens, dtype):
    tensors, spec = stored(name)
    x = inputs_of(name, tokens, dtype=dtype)
    found = run_linear_kernels(x, *tensors, spec)
    assert found.dtype == dtype and found.is_contiguous()
    # The kernels round what they rotate to bfloat16.
    require_close(found, x.double() @ decoded(name, tensors).T, torch.bfloat16)
    assert torch.equal(run_linear_kernels(x, *tensors, spec), found)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])  # kernels, and plain torch
@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (2, 3)])
def test_any_number_of_dimensions(shape, dtype):
    tensors, spec = stored("cc3")
    x = inputs_of("cc3", *shape, dtype=dtype)
    for run in (packed_linear, run_linear_kernels):
        found = run(x, *tensors, spec)
        assert found.shape == (*shape, 160) and found.dtype == dtype
    if x.numel():
        rows = packed_linear(x.reshape(-1, 576), *tensors, spec)
        assert torch.equal(packed_linear(x, *tensors, spec).reshape(-1, 160), rows)


@torch.no_grad()
def test_one_row_of_signs_and_inputs_in_any_order():
    (packed, scale, signs), spec = stored("cc2")
    x = inputs_of("cc2", 5, dtype=torch.bfloat16)
    expected = packed_linear(x, packed, scale, signs, spec)
    assert torch.equal(packed_linear(x, packed, scale, signs[0, 0], spec), expected)
    assert torch.equal(packed_linear(x.T.contiguous().T, packed, scale, signs, spec), expected)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("shape", [(0,), (1,), (2, 3)])
def test_torch_accepts_the_operator(shape, trained):
    tensors, spec = stored("cc2")
    x = inputs_of("cc2", *shape).requires_grad_(trained)
    torch.library.opcheck(packed_linear, (x, *tensors, spec))
    grad = torch.randn(*shape, 192, device=DEVICE)
    torch.library.opcheck(packed_linear_backward, (grad, *tensors, spec))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_compiles_into_one_graph(dtype):
    torch._dynamo.reset()
    tensors, spec = stored("cc4")

    def twice(x):
        return torch.relu(packed_linear(x, *tensors, spec)) + 1

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    for tokens in (3, 5, 1):  # another number of tokens compiles again and must not break the graph
        x = inputs_of("cc4", tokens, dtype=dtype)
        assert torch.equal(compiled(x), twice(x))


def test_the_gradient_is_that_of_the_decoded_product():
    tensors, spec = stored("cc3")
    weight = decoded("cc3", tensors)
    x = inputs_of("cc3", 2, 3, dtype=torch.float64).requires_grad_(True)
    factors = torch.randn(2, 3, 160, dtype=torch.float64, device=DEVICE)
    (packed_linear(x, *tensors, spec) * factors).sum().backward()
    torch.testing.assert_close(x.grad, factors @ weight)


def test_what_does_not_fit_is_refused():
    (packed, scale, signs), spec = stored("cc2")
    narrow = torch.zeros(2, 64, device=DEVICE)
    for run in (packed_linear, run_linear_kernels):
        with pytest.raises(ErnieQuantError, match="has 96 inputs, x has 64 channels"):
            run(narrow, packed, scale, signs, spec)
        with pytest.raises(ErnieQuantError, match="one matrix, not 2"):
            run(inputs_of("cc2", 2), packed.repeat(2, 1, 1), scale, signs, spec)


def _refuse(*_, **__):
    raise AssertionError("the host waits for the device")


@torch.no_grad()
def test_plain_torch_can_be_captured(monkeypatch):
    # A tensor without memory has no value to ask for, and only the first call may copy to a device.
    tensors, spec = stored("cc3")
    expected = packed_linear(inputs_of("cc3", 4, dtype=torch.float64), *tensors, spec)
    elsewhere = [tensor.to("meta") for tensor in tensors]
    x = torch.empty(4, 576, dtype=torch.float64, device="meta")
    plain = packed_linear._init_fn  # a tensor on meta would take the fake
    assert plain(x, *elsewhere, spec).shape == expected.shape
    for name in ("from_numpy", "tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, _refuse)
    assert plain(x, *elsewhere, spec).shape == expected.shape


@torch.no_grad()
@pytest.mark.parametrize("tokens", [2, 70])
def test_launches_do_not_depend_on_values(tokens, monkeypatch):
    # What a CUDA graph needs, without a GPU: no value of a tensor is asked for on the way.
    tensors, spec = stored("cc2")
    run_linear_kernels(inputs_of("cc2", tokens), *tensors, spec)  # builds constants
    from erniequant_kernels import combine, fused_gemm, packed_gemm, prepare

    launches = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            launches.append((self.kernel, grid))
            return lambda *_, **__: None

    for module in (combine, fused_gemm, packed_gemm, prepare):
        for name in dir(module):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Recorder(name))
    for name in ("item", "tolist", "__bool__", "__int__", "cpu", "nonzero", "to"):
        monkeypatch.setattr(torch.Tensor, name, _refuse)
    for name in ("zeros", "ones", "tensor", "arange"):
        monkeypatch.setattr(torch, name, _refuse)
    x = torch.empty(tokens, 96, dtype=torch.bfloat16, device=DEVICE)
    run_linear_kernels(x, *tensors, spec)
    kernels = [kernel for kernel, _ in launches]
    few = ["prepare_kernel", "packed_gemm_kernel", "combine_kernel"]
    assert kernels == (few if tokens == 2 else ["prepare_kernel", "fused_gemm_kernel"])


@pytest.mark.skipif(DEVICE == "cpu", reason="a CUDA graph; what it needs is tested above")
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_captured_in_a_cuda_graph(dtype):
    tensors, spec = stored("cc2")
    static = inputs_of("cc2", 4, dtype=dtype)
    packed_linear(static, *tensors, spec)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = packed_linear(static, *tensors, spec)
    fresh = inputs_of("cc2", 4, dtype=dtype)
    static.copy_(fresh)
    graph.replay()
    assert torch.equal(out, packed_linear(fresh, *tensors, spec))
