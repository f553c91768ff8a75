"""However a packed model was loaded and whatever was done to it, it computes what its export does.

A road is one way of use; every road is taken by every family in every dtype. What cannot work is
refused at once, with a reason.
"""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import pipeline

import erniequant
from erniequant.errors import ErnieQuantError
from erniequant.runtime.experts import PackedExperts
from testing.micro_model import add_tokenizer
from tests.runtime.families import from_pretrained, inputs

Road = Callable[[Path, torch.dtype, dict[str, torch.Tensor], Path], Any]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def ours(folder: Path, dtype: Any) -> Any:
    return erniequant.load(folder, device="cpu", dtype=dtype)[0]


def saved(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    return folder


def trained(model: Any, batch: dict[str, torch.Tensor]) -> Any:
    """Used in inference mode first, then for a gradient, as an evaluation between steps does."""
    with torch.inference_mode():
        model(**batch)
    model.get_input_embeddings().weight.requires_grad_()
    out = model(**batch)
    out.logits.float().mean().backward()
    assert model.get_input_embeddings().weight.grad.isfinite().all()
    return out


def without_grad(model: Any, batch: dict[str, torch.Tensor], mode: Any) -> Any:
    with mode():
        return model(**batch)


def used(model: Any, batch: dict[str, torch.Tensor]) -> Any:
    model(**batch)
    return model


def from_state(folder: Path, dtype: torch.dtype) -> Any:
    """Tensors of one model into another one, with whatever it kept of its own."""
    model = ours(folder, dtype)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.data.zero_()
    model.load_state_dict(tensors)
    return model


ROADS: dict[str, Road] = {
    "load": lambda f, d, b, t: ours(f, d)(**b),
    "load, as stored": lambda f, d, b, t: ours(f, "auto").to(d)(**b),
    "load, decoding each time": lambda f, d, b, t: erniequant.load(
        f, device="cpu", dtype=d, keep_decoded=False
    )[0](**b),
    "from_pretrained": lambda f, d, b, t: from_pretrained(f, dtype=d)(**b),
    "pipeline": lambda f, d, b, t: by_pipeline(f, d, t)(**b),
    "to": lambda f, d, b, t: from_pretrained(f).to(d)(**b),
    "to, after use": lambda f, d, b, t: used(ours(f, "auto"), b).to(d)(**b),
    "saved, loaded by us": lambda f, d, b, t: ours(saved(ours(f, d), t), None)(**b),
    "cast, saved, loaded by us": lambda f, d, b, t: ours(
        saved(from_pretrained(f).to(d), t), None
    )(**b),
    "cast, saved, loaded by transformers": lambda f, d, b, t: from_pretrained(
        saved(from_pretrained(f).to(d), t)
    )(**b),
    "deep copy": lambda f, d, b, t: copy.deepcopy(ours(f, d))(**b),
    "deep copy after use": lambda f, d, b, t: copy.deepcopy(used(ours(f, d), b))(**b),
    "state_dict": lambda f, d, b, t: from_state(f, d)(**b),
    "inference mode": lambda f, d, b, t: without_grad(ours(f, d), b, torch.inference_mode),
    "no_grad": lambda f, d, b, t: without_grad(from_pretrained(f, dtype=d), b, torch.no_grad),
    "loaded in inference mode": lambda f, d, b, t: _all_in_inference_mode(f, d, b),
    "grad": lambda f, d, b, t: trained(from_pretrained(f, dtype=d), b),
    "grad, weights kept": lambda f, d, b, t: trained(ours(f, d), b),
    "training mode": lambda f, d, b, t: from_pretrained(f, dtype=d).train()(**b),
    "device_map": lambda f, d, b, t: from_pretrained(f, dtype=d, device_map="cpu")(**b),
}  # fmt: skip


def _all_in_inference_mode(folder: Path, dtype: torch.dtype, batch: dict[str, torch.Tensor]) -> Any:
    with torch.inference_mode():
        return ours(folder, dtype)(**batch)


def by_pipeline(folder: Path, dtype: torch.dtype, copied: Path) -> Any:
    """The model of a pipeline that has spoken; most of the packed models have no tokenizer."""
    shutil.copytree(folder, copied)
    pipe = pipeline("text-generation", str(add_tokenizer(copied)), dtype=dtype)
    assert pipe("Hello", max_new_tokens=2)[0]["generated_text"].startswith("Hello")
    return pipe.model


def require_equal(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    if dtype == torch.float32:
        assert (found - expected).norm() <= 1e-5 * expected.norm()
        return
    p, q = found.float().log_softmax(-1), expected.float().log_softmax(-1)
    assert (q.exp() * (q - p)).sum(-1).mean() <= 1e-3


@pytest.fixture(scope="module")
def expected() -> dict[tuple[str, torch.dtype], torch.Tensor]:
    """Logits of the exports, by family and dtype, as far as they were asked for."""
    return {}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("road", ROADS)
def test_road(
    family: str, packed: Path, exported: Path, road: str, dtype: torch.dtype, tmp_path: Path,
    expected: dict[tuple[str, torch.dtype], torch.Tensor],
) -> None:  # fmt: skip
    batch = inputs(family)
    if (family, dtype) not in expected:
        with torch.no_grad():
            stock = from_pretrained(exported, dtype=dtype)
            expected[family, dtype] = stock(**batch).logits
    found = ROADS[road](packed, dtype, batch, tmp_path / "saved").logits.detach()
    assert found.dtype == dtype
    require_equal(found, expected[family, dtype], dtype)


@pytest.mark.parametrize("load", [from_pretrained, ours])
def test_compiled(packed_ernie: Path, load: Any) -> None:
    """The whole model, with gradients on as after loading, and with decoded weights kept."""
    torch._dynamo.reset()
    model = load(packed_ernie, dtype=torch.float32)
    expected = model(**inputs("text")).logits
    found = torch.compile(model, backend="eager")(**inputs("text")).logits
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_compiled_layer(family: str, packed: Path) -> None:
    """A packed layer, with its router where it has one; a whole VL model takes a minute."""
    torch._dynamo.reset()
    layer = from_pretrained(packed, dtype=torch.float32).model
    layer = getattr(layer, "language_model", layer).layers[1].mlp
    x = torch.randn(2, 5, 96, requires_grad=True)
    more = (torch.tensor([[0, 1, 1, 0, 0]] * 2),) if family == "vision-language" else ()
    expected, found = (run(x, *more) for run in (layer, torch.compile(layer, backend="eager")))
    if family != "dense":
        expected, found = (out[0] if isinstance(out, tuple) else out for out in (expected, found))
    assert torch.equal(found, expected)
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (expected, found)]
    assert torch.equal(*grads)


REFUSED: dict[str, Callable[[Path], Any]] = {
    "half": lambda f: from_pretrained(f).half(),
    "float": lambda f: from_pretrained(f).float(),
    "8-bit floats": lambda f: ours(f, torch.float8_e4m3fn),
    "integers": lambda f: from_pretrained(f, dtype=torch.int8),
    "integers, by us": lambda f: ours(f, "int8"),
}


@pytest.mark.parametrize("road", REFUSED)
def test_refused_at_once(packed: Path, road: str) -> None:
    """transformers itself refuses casts of quantised models that are not `to`."""
    with pytest.raises((ErnieQuantError, ValueError)) as caught:
        REFUSED[road](packed)
    assert any(word in str(caught.value) for word in ("not supported", "dtype"))


def test_a_cast_leaves_packed_tensors_alone(packed: Path) -> None:
    model = from_pretrained(packed)
    before = _packed_tensors(model)
    for dtype in (torch.float16, torch.float64, torch.bfloat16):
        after = _packed_tensors(model.to(dtype))
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def _packed_tensors(model: Any) -> dict[str, torch.Tensor]:
    return {
        f"{path}.{name}": parameter.clone()
        for path, module in model.named_modules()
        if isinstance(module, PackedExperts)
        for name, parameter in module.named_parameters()
    }
