"""Generation on a random tiny ERNIE 4.5 MoE: greedy choice, chat template, seeds."""

import pytest
import torch
import transformers

import erniequant_data
from erniequant.errors import ErnieQuantError
from erniequant.generation import generate


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(erniequant_data.tiny_model_dir())


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = transformers.Ernie4_5_MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        moe_num_experts=4,
        moe_k=2,
        moe_num_shared_experts=1,
        eos_token_id=None,
    )
    return transformers.Ernie4_5_MoeForCausalLM(config).eval()


def test_greedy_text_is_the_argmax_of_every_step(model, tokenizer):
    found = generate(model, tokenizer, "the sea", max_tokens=6, chat_template="none")
    ids = tokenizer("the sea", add_special_tokens=False)["input_ids"]
    assert (found.prompt, found.prompt_tokens, found.tokens) == ("the sea", len(ids), 6)
    for _ in range(6):
        with torch.no_grad():
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    assert found.text == tokenizer.decode(ids[found.prompt_tokens :], skip_special_tokens=True)


def test_chat_template_is_applied_where_there_is_one(model, tokenizer, monkeypatch):
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}>"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    assert generate(model, tokenizer, "hi", max_tokens=1).prompt == "[user] hi>"
    assert generate(model, tokenizer, "hi", max_tokens=1, chat_template="none").prompt == "hi"
    monkeypatch.setattr(tokenizer, "chat_template", None)
    assert generate(model, tokenizer, "hi", max_tokens=1).prompt == "hi"


def test_equal_seeds_give_equal_texts(model, tokenizer):
    def text(seed):
        return generate(model, tokenizer, "the", max_tokens=12, temperature=1.5, seed=seed).text

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_empty_prompt_is_refused(model, tokenizer):
    with pytest.raises(ErnieQuantError, match="prompt is empty"):
        generate(model, tokenizer, "", chat_template="none")


def test_pieces_come_with_their_tokens_and_are_the_text(model, tokenizer):
    done = []
    watch = model.register_forward_hook(lambda *_: done.append("token"))
    found = generate(model, tokenizer, "the sea", max_tokens=12, on_text=done.append)
    watch.remove()
    pieces = [piece for piece in done if piece != "token"]
    assert "".join(pieces) == found.text and len(pieces) > 4
    assert found.text == generate(model, tokenizer, "the sea", max_tokens=12).text
    # The first piece is there before most tokens are.
    assert done.index(pieces[0]) < 6 < len(done) - 6


def test_a_search_of_beams_comes_in_one_piece(model, tokenizer, monkeypatch):
    monkeypatch.setattr(model.generation_config, "num_beams", 2)
    pieces = []
    found = generate(model, tokenizer, "the sea", max_tokens=6, on_text=pieces.append)
    assert pieces == [found.text]


def test_an_observer_may_end_it(model, tokenizer):
    class Enough(Exception):
        pass

    def take(piece):
        raise Enough

    with pytest.raises(Enough):
        generate(model, tokenizer, "the sea", max_tokens=12, on_text=take)
