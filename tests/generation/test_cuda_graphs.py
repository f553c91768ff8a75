"""The graphs themselves where there is a GPU; on the CPU, what runs in place of them."""

import warnings

import pytest
import torch

import erniequant
from erniequant.errors import ErnieQuantWarning
from erniequant.evaluate import speed
from erniequant.generation import ChatSession, Sampling, generate
from erniequant.runtime import graphs
from tests.generation.test_graphs import SILENT, StandIn

pytestmark = pytest.mark.usefixtures("one_thread")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The kernels of a GPU take no float32. On the CPU a cache of another kind is compared, whose sums
# differ by rounding.
DTYPE = "bfloat16" if DEVICE == "cuda" else "float32"
KINDS = ("packed_ernie", "packed_vl", "packed_dense")


@pytest.fixture(scope="module", params=KINDS)
def loaded(request, micro_vl):
    from erniequant.data.tokenizers import load_tokenizer

    folder = request.getfixturevalue(request.param)
    model = erniequant.load(folder, device=DEVICE, dtype=DTYPE)[0]
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = SILENT
    return model, load_tokenizer(micro_vl)


@pytest.fixture(autouse=True)
def no_fallback():
    graphs._failed.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ErnieQuantWarning)
        yield


def with_stand_in(monkeypatch, run):
    """The result where passes run kernel by kernel in the memory of a graph."""
    stand_in = StandIn()
    with monkeypatch.context() as replaced:
        replaced.setattr(graphs, "capture_on", lambda _: stand_in)
        return run()


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.3, "seed": 5}])
def test_a_text_is_the_same(loaded, sampling, monkeypatch):
    def text():
        return generate(*loaded, "the sea, and", max_tokens=40, **sampling).text

    assert text() == with_stand_in(monkeypatch, text)


def test_a_chat_is_the_same(loaded, monkeypatch):
    def answers():
        chat = ChatSession(*loaded, sampling=Sampling(temperature=0), max_new_tokens=16)
        return [chat.say(f"and {turn}").text for turn in range(3)]

    assert answers() == with_stand_in(monkeypatch, answers)


def test_speed_takes_graphs(loaded):
    result = speed(loaded[0], prompt_tokens=9, new_tokens=8, repetitions=2)
    assert result.decode_tokens_per_second > 0


@pytest.mark.skipif(DEVICE == "cpu", reason="tests/kernels/test_host.py has the twin")
@torch.inference_mode()
def test_a_layer_is_captured_right_after_the_warm_up(loaded):
    model = loaded[0]
    layer = next(m for m in model.modules() if hasattr(m, "_spec_text"))
    top_k = 1 if layer.num_experts == 1 else 2
    erniequant.warm_up(model, top_k=top_k)
    x = torch.randn(5, layer.hidden_dim, device=DEVICE, dtype=torch.bfloat16)
    index = torch.arange(5 * top_k, device=DEVICE).view(5, top_k) % layer.num_experts
    routing = torch.rand(5, top_k, device=DEVICE).bfloat16()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # no batch of five has run
        out = layer.multiply(x, index, routing)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, layer.multiply(x, index, routing))
