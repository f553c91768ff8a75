"""Passes in a CUDA graph, on the CPU: the capture is a stand-in, everything around it is not."""

import contextlib
import warnings

import pytest
import torch

import erniequant
from erniequant.errors import ErnieQuantWarning
from erniequant.evaluate import speed
from erniequant.generation import ChatSession, Sampling, generate, prefix_cache
from erniequant.runtime import graphs
from tests.micro_vl import write_image

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("text", "vl", "dense")
SILENT = [0, *range(96, 128)]
"""Tokens without text: a random model would say nothing else."""
HOST_VALUES = ("item", "tolist", "__bool__", "__int__", "__index__", "__float__", "cpu", "nonzero")
"""What a capture cannot give: the device has computed nothing yet."""


@pytest.fixture(scope="module")
def models(packed_ernie, packed_vl, packed_dense, micro_vl):
    """In float32, so that rounding does not decide between tokens: masks change the sums."""
    from erniequant.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(micro_vl)
    made = {}
    for kind, folder in zip(KINDS, (packed_ernie, packed_vl, packed_dense), strict=True):
        model = erniequant.load(folder, device="cpu", dtype="float32")[0]
        model.generation_config.eos_token_id = None
        model.generation_config.suppress_tokens = SILENT
        made[kind] = (model, tokenizer)
    return made


@pytest.fixture(params=KINDS)
def loaded(request, models):
    return models[request.param]


class StandIn:
    """A capture whose results lie in the same memory each time, as those of a graph do."""

    def __init__(self):
        self.captured = self.replayed = 0

    def __call__(self, run):
        self.captured += 1
        kept = []

        def replay():
            self.replayed += 1
            fresh = run()
            if kept:
                kept[0].logits.copy_(fresh.logits)
            else:
                kept.append(fresh)
            return kept[0]

        return replay


@pytest.fixture
def capture(monkeypatch):
    stand_in = StandIn()
    monkeypatch.setattr(graphs, "capture_on", lambda _: stand_in)
    return stand_in


@pytest.fixture(autouse=True)
def forget_failures():
    yield
    graphs._failed.clear()


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.3, "seed": 5}])
def test_a_text_is_the_same(loaded, sampling, monkeypatch):
    plain = generate(*loaded, "the sea, and", max_tokens=20, **sampling)
    stand_in = StandIn()
    monkeypatch.setattr(graphs, "capture_on", lambda _: stand_in)
    pieces = []
    found = generate(*loaded, "the sea, and", max_tokens=20, on_text=pieces.append, **sampling)
    assert found.text == plain.text == "".join(pieces)
    # All but the prompt's pass and the first one after it.
    assert (stand_in.captured, stand_in.replayed) == (1, 18)
    assert "forward" not in vars(loaded[0])


def test_a_prompt_of_one_token(loaded, capture):
    plain_capture, capture.captured = capture.captured, 0
    found = generate(*loaded, "t", max_tokens=9, chat_template="none")
    assert found.prompt_tokens == 1 and capture.captured == 1 and plain_capture == 0
    ids = loaded[1]("t", add_special_tokens=False)["input_ids"]
    for _ in range(9):
        with torch.no_grad():
            logits = loaded[0](input_ids=torch.tensor([ids])).logits[0, -1]
        logits[SILENT] = -torch.inf
        ids.append(logits.argmax().item())
    assert found.text == loaded[1].decode(ids[1:], skip_special_tokens=True)


def test_images_are_seen_once(models, tmp_path, monkeypatch):
    images = [write_image(tmp_path / "a.png", 32, 16)]
    plain = generate(*models["vl"], "look", images=images, max_tokens=12)
    stand_in = StandIn()
    monkeypatch.setattr(graphs, "capture_on", lambda _: stand_in)
    assert generate(*models["vl"], "look", images=images, max_tokens=12).text == plain.text
    assert stand_in.replayed == 10


def test_a_captured_pass_asks_for_no_value(loaded, models, tmp_path, monkeypatch):
    # On a GPU experts are kernels; here they would sort their tokens on the host.
    def experts(self, x, index, routing):
        return x * routing.sum(-1, keepdim=True)

    monkeypatch.setattr(erniequant.runtime.experts.PackedExperts, "multiply", experts)
    asked = []

    def strict(run):
        with monkeypatch.context() as refusing:
            for name in HOST_VALUES:
                real = getattr(torch.Tensor, name)
                refusing.setattr(
                    torch.Tensor, name,
                    lambda *a, name=name, real=real, **k: (asked.append(name), real(*a, **k))[1],
                )  # fmt: skip
            run()
        return run

    stand_in = StandIn()
    monkeypatch.setattr(graphs, "capture_on", lambda _: lambda run: stand_in(strict(run)))
    # With images, the model asks of a prompt's tokens whether they are text.
    seen = loaded is models["vl"] and [write_image(tmp_path / "a.png", 32, 16)]
    generate(*loaded, "the sea", images=seen or (), max_tokens=8)
    assert stand_in.captured == 1 and asked == []
    speed(loaded[0], prompt_tokens=3, new_tokens=3, repetitions=1)
    assert stand_in.captured == 3 and asked == []


def test_what_cannot_be_captured_runs_as_before_with_one_warning(loaded, monkeypatch):
    plain = generate(*loaded, "the sea", max_tokens=12)

    def refuse(run):
        raise RuntimeError("operation not permitted\n when stream is capturing")

    monkeypatch.setattr(graphs, "capture_on", lambda _: refuse)
    with pytest.warns(ErnieQuantWarning, match="not permitted when stream is capturing") as said:
        found = generate(*loaded, "the sea", max_tokens=12)
        again = generate(*loaded, "the sea", max_tokens=12)
    assert found.text == again.text == plain.text
    assert len(said) == 1


@pytest.mark.parametrize("places", [{"a": 0, "b": 1}, {"a": 0, "b": "cpu"}, {"a": "disk"}])
def test_models_in_several_places_are_not_captured(loaded, capture, places, monkeypatch):
    monkeypatch.setattr(loaded[0], "hf_device_map", places, raising=False)
    with pytest.warns(ErnieQuantWarning, match="spread over") as said:
        generate(*loaded, "the sea", max_tokens=12)
        generate(*loaded, "the sea", max_tokens=12)
    assert len(said) == 1 and capture.captured == 0


def test_a_cache_that_forgets_is_not_captured(models, capture, monkeypatch):
    # Layers with a window count tokens on the host, where a graph does not see it.
    model, tokenizer = models["text"]
    config = model.config.get_text_config()
    kinds = ["sliding_attention"] * config.num_hidden_layers
    monkeypatch.setattr(config, "layer_types", kinds, raising=False)
    monkeypatch.setattr(config, "sliding_window", 8, raising=False)
    with pytest.warns(ErnieQuantWarning, match="keys and values of all tokens"):
        generate(model, tokenizer, "the sea", max_tokens=12)
    assert capture.captured == 0


@pytest.mark.parametrize(
    "settings", [{"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "dynamic"}]
)
def test_a_model_that_is_generated_from_otherwise_is_left_alone(
    loaded, capture, settings, monkeypatch
):
    for name, value in settings.items():
        monkeypatch.setattr(loaded[0].generation_config, name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ErnieQuantWarning)
        generate(*loaded, "the sea", max_tokens=12)
    assert capture.captured == 0


def test_a_few_tokens_are_not_worth_it(loaded, capture):
    generate(*loaded, "the sea", max_tokens=3)
    assert capture.captured == 0


def test_the_forward_function_comes_back_whatever_happens(loaded, capture):
    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(*loaded, "the sea", max_tokens=12, on_text=stop)
    assert "forward" not in vars(loaded[0])
    own = loaded[0].forward = loaded[0].forward  # as hooks of accelerate do
    with pytest.raises(KeyboardInterrupt):
        generate(*loaded, "the sea", max_tokens=12, on_text=stop)
    assert vars(loaded[0]).pop("forward") is own


def talk(loaded, images=(), turns=4):
    """Answers of a chat whose second message asks about images; tokens that were read before."""
    model, tokenizer = loaded
    session = ChatSession(model, tokenizer, sampling=Sampling(temperature=0), max_new_tokens=9)
    said = []
    for turn in range(turns):
        for image in images if turn == 1 else ():
            session.attach(image)
        said.append(session.say(f"and {turn}"))
    return [answer.text for answer in said], [answer.reused_tokens for answer in said]


@pytest.mark.parametrize("least", [4, 4096])  # moved to more memory at every turn, or never
def test_a_chat_says_the_same(loaded, least, monkeypatch):
    plain = talk(loaded)
    stand_in = StandIn()
    monkeypatch.setattr(graphs, "capture_on", lambda _: stand_in)
    monkeypatch.setattr(prefix_cache, "LEAST_CAPACITY", least)
    assert talk(loaded) == plain
    assert plain[1][-1] > 0
    # All passes of an answer but the first, which reads the prompt's last token.
    assert (stand_in.captured, stand_in.replayed) == (4, 4 * 8)


def test_a_chat_about_images_says_the_same(models, tmp_path, monkeypatch):
    images = [write_image(tmp_path / "a.png", 32, 16), write_image(tmp_path / "b.png", 16, 24)]
    plain = talk(models["vl"], images)
    stand_in = StandIn()
    monkeypatch.setattr(graphs, "capture_on", lambda _: stand_in)
    assert talk(models["vl"], images) == plain
    assert stand_in.captured == 4


def test_a_chat_goes_on_where_captures_begin_to_fail(loaded, monkeypatch):
    # What was read lies in memory that cannot grow, and is read again.
    plain = talk(loaded)
    stand_in = StandIn()

    def twice(run):
        if stand_in.captured == 2:
            raise RuntimeError("no more")
        return stand_in(run)

    monkeypatch.setattr(graphs, "capture_on", lambda _: twice)
    monkeypatch.setattr(prefix_cache, "LEAST_CAPACITY", 4)
    with pytest.warns(ErnieQuantWarning, match="no more"):
        found = talk(loaded)
    assert found[0] == plain[0]


def test_speed_times_captured_passes(loaded, capture):
    result = speed(loaded[0], prompt_tokens=5, new_tokens=6, repetitions=1)
    assert result.new_tokens == 6
    # Two turns, each captured before it is timed.
    assert (capture.captured, capture.replayed) == (2, 2 * (1 + 6))


def test_a_graph_is_captured_on_the_device_of_the_model(monkeypatch):
    # Launches go to the current stream of the device that they are on, not to another's.
    done, now = [], {"device": 0}

    class Graph:
        def replay(self):
            done.append("replay")

    @contextlib.contextmanager
    def on(device):
        before, now["device"] = now["device"], device.index
        yield
        now["device"] = before

    @contextlib.contextmanager
    def capturing(graph, stream, capture_error_mode):
        done.append((now["device"], stream, capture_error_mode))
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    replay = graphs.capture_on(torch.device("cuda", 1))(lambda: done.append("run") or 7)
    assert done == [(1, "stream of cuda:1", "thread_local"), "run"]
    assert replay() == replay() == 7
    assert done[2:] == ["replay", "replay"] and now["device"] == 0


def test_on_the_cpu_nothing_is_captured(loaded):
    assert graphs.capture_on(torch.device("cpu")) is None
    assert graphs.static_cache(loaded[0], 8) is None
    with graphs.captured_steps(loaded[0], None):
        assert "forward" not in vars(loaded[0])
