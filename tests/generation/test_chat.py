"""A chat on random micro models against a plain loop without any cache."""

from pathlib import Path

import pytest
import torch
from tokenizers import decoders

import erniequant
from erniequant.data.image_inputs import reader_for
from erniequant.data.inputs import ModelInput, input_with_images
from erniequant.errors import ErnieQuantError
from erniequant.generation import ChatSession, Sampling, generate
from erniequant.generation.prefix_cache import PrefixCache
from tests.micro_vl import CHAT_TEMPLATE, write_image

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("text", "vl", "dense")
END = 1
MAX = 9
SILENT = [0, *range(96, 128)]
"""Tokens without text: a random model would say nothing else, and all answers would be alike."""
SYSTEM = {"role": "system", "content": "be kind"}


@pytest.fixture(scope="module")
def models(packed_ernie, packed_vl, packed_dense, micro_vl):
    """Float32, so that rounding does not decide between tokens; all with one template."""
    from erniequant.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(micro_vl)
    # Without spaces between letters, so that an answer is read back as the tokens that it was.
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    # And named as where it is asked for.
    role = "{{ m.role }}"
    assert role in CHAT_TEMPLATE
    tokenizer.chat_template = CHAT_TEMPLATE.replace(
        role, "{{ 'bot' if m.role == 'assistant' else m.role }}"
    )
    folders = dict(zip(KINDS, (packed_ernie, packed_vl, packed_dense), strict=True))
    made = {}
    for kind, folder in folders.items():
        model = erniequant.load(folder, device="cpu", dtype="float32")[0]
        model.generation_config.suppress_tokens = SILENT
        model.generation_config.eos_token_id = END
        made[kind] = (model, tokenizer)
    return made


@pytest.fixture(params=KINDS)
def loaded(request, models):
    return models[request.param]


@pytest.fixture
def images(tmp_path):
    """Wide, tall, and square."""
    shapes = ((32, 16), (16, 40), (24, 24))
    return [write_image(tmp_path / f"{i}.png", *shape, seed=i) for i, shape in enumerate(shapes)]


def user(text, *images):
    if not images:
        return {"role": "user", "content": text}
    parts = [{"type": "image", "image": str(image)} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def bot(text):
    return {"role": "assistant", "content": text}


def by_hand(loaded, messages, count=MAX):
    """The likeliest answer; every token costs a pass over everything, images included."""
    model, tokenizer = loaded
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    entry = ModelInput(torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]))
    paths = [
        part["image"] for message in messages if not isinstance(message["content"], str)
        for part in message["content"] if part["type"] == "image"
    ]  # fmt: skip
    if paths:
        reader = reader_for(model, tokenizer)
        patches = [reader.image_reader.read(Path(path)) for path in paths]
        waiting = iter(patches)
        ids = []
        for token in entry.ids.tolist():
            is_image = token == reader.settings.token
            ids += [token] * (next(waiting).tokens(reader.settings.merge) if is_image else 1)
        entry = input_with_images(torch.tensor(ids), tuple(patches), reader.settings)
    batch, answer = entry.batch(), []
    for _ in range(count):
        with torch.no_grad():
            logits = model(**batch, use_cache=False).logits[0, -1]
        logits[SILENT] = -torch.inf
        answer.append(int(logits.argmax()))
        if answer[-1] == END:
            break
        more = {"input_ids": answer[-1], "attention_mask": 1, "mm_token_type_ids": 0,
                "moe_mm_token_type_ids": 0}  # fmt: skip
        for name in more.keys() & batch.keys():
            new = torch.tensor([[more[name]]], dtype=batch[name].dtype)
            batch[name] = torch.cat([batch[name], new], dim=1)
    return tokenizer.decode(answer, skip_special_tokens=True)


def read_by(model, work):
    """What `work` gives, and how many tokens each pass of the model read meanwhile."""
    passes = []
    watch = model.get_input_embeddings().register_forward_pre_hook(
        lambda module, arguments: passes.append(arguments[0].shape[-1])
    )
    try:
        return work(), passes
    finally:
        watch.remove()


def test_every_turn_is_what_a_fresh_pass_says(loaded):
    model, tokenizer = loaded
    session = ChatSession(model, tokenizer, system=SYSTEM["content"], max_new_tokens=MAX)
    messages, reused = [SYSTEM], []
    for question in ("hello there", "why?", "and what is that"):
        messages.append(user(question))
        pieces = []
        answer, passes = read_by(model, lambda q=question, p=pieces: session.say(q, p.append))
        assert answer.text == "".join(pieces) == by_hand(loaded, messages)
        messages.append(bot(answer.text))
        assert session.messages == messages
        # The last token of the prompt is read by the first step of decoding.
        assert passes[0] == answer.prompt_tokens - answer.reused_tokens - 1
        assert len(passes) == 1 + answer.tokens and set(passes[1:]) == {1}
        reused.append(answer.reused_tokens)
        # A stranger to the session, between its turns.
        generate(model, tokenizer, "something else", max_tokens=2)
    # "system: be kind;user: hello there;bot: " has 39 tokens; the answer's last one was chosen,
    # but never read.
    assert reused[:2] == [0, 39 + MAX - 1] and reused[2] > reused[1]


def test_images_at_any_turn(models, images):
    model, tokenizer = loaded = models["vl"]
    session = ChatSession(model, tokenizer, max_new_tokens=MAX)
    messages, reused = [], []
    for question, shown in (("what is it", images[:2]), ("why", []), ("and this", images[2:]),
                            ("and this again", images[2:])):  # fmt: skip
        for image in shown:
            session.attach(image)
        messages.append(user(question, *shown))
        answer, passes = read_by(model, lambda q=question: session.say(q))
        assert answer.text == by_hand(loaded, messages)
        messages.append(bot(answer.text))
        assert passes[0] == answer.prompt_tokens - answer.reused_tokens - 1
        reused.append(answer.reused_tokens)
        # Another text with an image leaves its positions behind in the model.
        generate(model, tokenizer, "x", images=[images[1]], max_tokens=1)
    assert reused[0] == 0 and min(reused[1:]) > 30 and reused == sorted(reused)


def test_another_image_of_the_same_size_is_not_taken_for_the_first(models, tmp_path):
    model, tokenizer = loaded = models["vl"]
    session = ChatSession(model, tokenizer, max_new_tokens=MAX)
    answers = []
    for seed in (1, 2):
        image = write_image(tmp_path / "same.png", 24, 24, seed=seed)
        session.attach(image)
        answers.append(session.say("what").text)
        assert answers[-1] == by_hand(loaded, [user("what", image)])
        session.reset()
    assert session.messages == []


class Stop(Exception):
    pass


@pytest.mark.parametrize("where", ["prefill", "decoding"])
def test_an_answer_may_be_stopped_within_any_layer(loaded, where):
    model, tokenizer = loaded
    session = ChatSession(model, tokenizer, max_new_tokens=MAX)
    first = session.say("hello there")
    layers = getattr(model.model, "language_model", model.model).layers
    left = 1 if where == "prefill" else 4

    def stop(module, arguments, output):
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    watch = layers[1].self_attn.register_forward_hook(stop)
    pieces = []
    with pytest.raises(KeyboardInterrupt):
        session.say("why?", pieces.append)
    watch.remove()
    messages = [user("hello there"), bot(first.text)]
    if where == "decoding":
        assert len("".join(pieces)) > 0
        messages += [user("why?"), bot("".join(pieces))]
    assert session.messages == messages
    assert session.say("so?").text == by_hand(loaded, [*messages, user("so?")])


def test_an_observer_may_stop_the_answer(loaded):
    model, tokenizer = loaded
    session = ChatSession(model, tokenizer, max_new_tokens=MAX)
    pieces = []

    def take(piece):
        pieces.append(piece)
        if len(pieces) == 3:
            raise Stop

    with pytest.raises(Stop):
        session.say("hello", take)
    messages = [user("hello"), bot("".join(pieces))]
    assert session.messages == messages
    messages.append(user("go on"))
    answer = session.say("go on")
    assert answer.text == by_hand(loaded, messages) and answer.reused_tokens > 10


def test_the_oldest_exchanges_make_room(loaded, monkeypatch):
    model, tokenizer = loaded
    monkeypatch.setattr(model.config.get_text_config(), "max_position_embeddings", 128)
    session = ChatSession(model, tokenizer, system=SYSTEM["content"], max_new_tokens=5)
    messages, drops = [SYSTEM], []
    for number in range(12):
        question = f"question {number}" + "?" * (5 * number % 17)
        answer = session.say(question)
        drops.append(answer.dropped)
        del messages[1 : 1 + 2 * answer.dropped]
        messages.append(user(question))
        assert answer.text == by_hand(loaded, messages, 5)
        messages.append(bot(answer.text))
        assert session.messages == messages
        assert answer.prompt_tokens + answer.tokens <= 128
        # Else only "system: be kind;user: question " is common.
        assert (answer.reused_tokens > 31) == (answer.dropped == 0 and number > 0)
    # Several at once, so that the turns behind them are read anew now and then only.
    assert max(drops) > 1 and sum(map(bool, drops)) < 8


def test_a_message_that_is_too_long_changes_nothing(models, monkeypatch):
    model, tokenizer = models["text"]
    monkeypatch.setattr(model.config, "max_position_embeddings", 64)
    session = ChatSession(model, tokenizer, max_new_tokens=5)
    session.say("hi")
    before = session.messages
    with pytest.raises(ErnieQuantError, match=r"takes \d+ of the model's 64 positions"):
        session.say("x" * 64)
    assert session.messages == before and session.say("hi").dropped == 0
    # "user: ", ";" and "bot: " are 12 tokens; two positions are left for an answer.
    answer = session.say("x" * 50)
    assert (answer.prompt_tokens, answer.tokens, answer.finish) == (62, 2, "length")


def test_an_answer_ends_where_the_model_says_so(models, monkeypatch):
    model, tokenizer = models["text"]
    session = ChatSession(model, tokenizer, max_new_tokens=MAX)
    free = session.say("hello")
    assert (free.finish, free.tokens) == ("length", MAX)
    third = tokenizer(free.text)["input_ids"][2]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [third])
    session.reset()
    ended = session.say("hello")
    assert ended.finish == "end" and ended.tokens <= 3


def test_sampling_is_the_models_own_unless_it_is_given(models, monkeypatch):
    model, tokenizer = models["text"]

    def texts(**sampling):
        session = ChatSession(model, tokenizer, sampling=Sampling(**sampling), max_new_tokens=MAX)
        return [session.say("hello").text for _ in range(2)]

    greedy = texts()
    assert texts(temperature=0.0) == greedy
    hot = texts(temperature=5.0, seed=1)
    assert hot == texts(temperature=5.0, seed=1) != texts(temperature=5.0, seed=2)
    assert texts(temperature=5.0, top_p=1e-9) == greedy
    monkeypatch.setattr(model.generation_config, "do_sample", True)
    monkeypatch.setattr(model.generation_config, "temperature", 5.0)
    assert texts(seed=1) != greedy and texts(temperature=0.0) == greedy
    assert texts(top_p=1e-9) == greedy


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_p": 0.0}, "top-p 0.0"),
        ({"top_p": 1.1}, "top-p 1.1"),
    ],
)
def test_impossible_samplings_are_refused(given, says):
    with pytest.raises(ErnieQuantError, match=says):
        Sampling(**given)


def test_what_cannot_be_a_chat_is_refused_at_once(models, monkeypatch, images):
    model, tokenizer = models["text"]
    with pytest.raises(ErnieQuantError, match="max_new_tokens 0"):
        ChatSession(model, tokenizer, max_new_tokens=0)
    session = ChatSession(model, tokenizer)
    with pytest.raises(ErnieQuantError, match="text-only"):
        session.attach(images[0])
    with pytest.raises(ErnieQuantError, match="character 2 of the message"):
        session.say("a\udcff")
    with pytest.raises(ErnieQuantError, match="there is no image"):
        ChatSession(*models["vl"]).attach("none.png")
    refusing = "{{ raise_exception('no system') if messages[0].role == 'system' }}" + CHAT_TEMPLATE
    monkeypatch.setattr(tokenizer, "chat_template", refusing)
    ChatSession(model, tokenizer)
    with pytest.raises(ErnieQuantError, match="no system"):
        ChatSession(model, tokenizer, system="be kind")
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(ErnieQuantError, match=r"chat_template\.jinja"):
        ChatSession(model, tokenizer)


def test_images_can_be_taken_back(models, images):
    model, tokenizer = loaded = models["vl"]
    session = ChatSession(model, tokenizer, max_new_tokens=3)
    session.attach(images[0])
    session.detach()
    assert session.say("hi").text == by_hand(loaded, [user("hi")], 3)


def test_an_input_that_ends_with_an_image_is_refused(models, images):
    model, tokenizer = models["vl"]
    reader = reader_for(model, tokenizer, chat_template="none")
    entry = reader.chat([user("", images[0])])
    stop = int(entry.vision.nonzero().max()) + 1
    cut = ModelInput(entry.ids[:stop], entry.placeholder[:stop], entry.vision[:stop],
                     entry.positions[:, :stop], entry.images)  # fmt: skip
    with pytest.raises(ErnieQuantError, match="ends with an image"):
        PrefixCache(model).generate(cut, None, {})
