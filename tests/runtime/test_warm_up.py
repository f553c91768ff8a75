"""What `warm_up` compiles, and for which experts; tests/kernels/test_host sees that it is all."""

import pytest
import torch
from torch import nn

import erniequant
from erniequant.errors import ErnieQuantError
from erniequant.packing.schema import LayerSpec, MatrixSpec
from erniequant.runtime import warm_up as module
from erniequant.runtime.experts import PackedExperts
from erniequant_kernels import launch, moe

SPEC = LayerSpec(MatrixSpec("cc2", 12, 32, 32), MatrixSpec("cc4", 13, 32, 64))
OTHER = LayerSpec(MatrixSpec("cc3", 13, 32, 32), MatrixSpec("cc4", 13, 32, 64))


@pytest.fixture
def compiled(monkeypatch):
    """Batches for which kernels were compiled, as (experts, tokens, experts of a token)."""
    seen = []
    monkeypatch.setattr(launch, "compile_all", lambda rehearse: rehearse())
    monkeypatch.setattr(PackedExperts, "launches_kernels", lambda *_: True)
    monkeypatch.setattr(
        PackedExperts, "rehearse", lambda self, tokens, top_k, _: seen.append((self, tokens, top_k))
    )
    monkeypatch.setattr(PackedExperts, "multiply", lambda self, *_: seen.append((self, "run")))
    monkeypatch.setattr(module, "_ready", set())
    return seen


def experts(spec=SPEC, count=4):
    return PackedExperts(count, 96, 64, spec, "silu", "layer 1")


def test_layers_that_are_alike_compile_once(compiled):
    layers = nn.ModuleList([experts(), experts(), experts(OTHER), experts()])
    module.warm_up(layers, (1, 8), top_k=2)
    # Which of the layers that are alike stands for them does not matter.
    kinds = [(layer.spec is OTHER, *rest) for layer, *rest in compiled]
    assert kinds == [
        (False, 1, 2), (False, 8, 2), (False, "run"), (True, 1, 2), (True, 8, 2), (True, "run"),
    ]  # fmt: skip
    compiled.clear()
    module.warm_up(layers, (8, 1), top_k=2)
    assert compiled == []
    module.warm_up(layers, (1, 9), top_k=2)
    assert [rest[0] for _, *rest in compiled] == [9, "run"] * 2


def test_a_model_says_how_many_experts_a_token_has(compiled, packed_ernie, packed_dense):
    for folder, top_k in ((packed_ernie, 2), (packed_dense, 1)):
        model = erniequant.load(folder, device="cpu", keep_decoded=False)[0]
        compiled.clear()
        erniequant.warm_up(model, [3])
        assert len(compiled) == 4  # two layers that differ, and one token of each
        assert {found[2] for found in compiled if len(found) == 3} == {top_k}


def test_experts_alone_have_to_be_told(compiled):
    with pytest.raises(ErnieQuantError, match="top_k"):
        module.warm_up(experts(), [1])


def test_what_does_not_run_on_kernels_is_left_alone(compiled, monkeypatch):
    kept = experts()
    kept.keep_decoded = True
    module.warm_up(kept, top_k=2)
    monkeypatch.setattr(PackedExperts, "launches_kernels", lambda *_: False)
    module.warm_up(experts(), top_k=2)
    assert compiled == []


def test_a_capture_refuses_to_warm_up(monkeypatch):
    monkeypatch.setattr(launch, "is_capturing", lambda: True)
    with pytest.raises(ErnieQuantError, match="before the capture"):
        launch.compile_all(lambda: None)


def test_constants_are_there_before_the_first_batch(packed_ernie, monkeypatch):
    asked = []
    monkeypatch.setattr(PackedExperts, "launches_kernels", lambda *_: True)
    monkeypatch.setattr(moe, "constants_on", asked.append)
    layer = experts()
    layer.to(torch.device("cpu"))
    assert asked == [torch.device("cpu")]
    asked.clear()
    erniequant.load(packed_ernie, device="cpu")
    assert len(asked) >= 2  # one of each layer
