"""Pieces of text against the text of all tokens at once, by tokenizers that write bytes, and
spaces, in their own ways."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import erniequant_data
from erniequant.data.companions import write_companions
from erniequant.data.tokenizers import load_tokenizer
from erniequant.generation.streaming import TextStream
from tests.micro_original import write_original_tokenizer

WORDS = ["Hello", " world", " 你好", "，", " café", "😀", "\n", " .", "  ", " 's", "e\u0301", "ﷺ",
         "\ufffd"]  # fmt: skip


def byte_level():
    """As GPT-2: a token is any bytes, parts of a character too."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(alphabet)} | {"Ġt": 256, "<s>": 257}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ġ", "t")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def byte_fallback():
    """As Llama: a leading space is cut, and bytes stand for characters without a token."""
    pieces = ["<s>", *(f"<0x{i:02X}>" for i in range(256)), "▁Hello", "▁wor", "ld", "▁", "你", ".",
              "▁'", "s", "<", "\n"]  # fmt: skip
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def cleaning():
    """As BERT's: spaces before punctuation are taken away."""
    pieces = ["<s>", "Hello", "##s", "world", ".", "'", "s", "n't", "not", ",", "!", "a"]
    tokenizer = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=True)
    assert made.decode([1, 4]) == "Hello." and made.decode([1, 3]) == "Hello world"
    return made


def embedded():
    return AutoTokenizer.from_pretrained(erniequant_data.tiny_model_dir())


@pytest.fixture
def tokenizers(tmp_path):
    original = write_original_tokenizer(tmp_path / "original")
    (tmp_path / "written").mkdir()
    write_companions(original, tmp_path / "written")
    made = {f.__name__: f() for f in (byte_level, byte_fallback, cleaning, embedded)}
    return made | {"sentencepiece": load_tokenizer(tmp_path / "written")}


def stream(tokenizer, ids):
    """The pieces, the last one being what was left at the end, and the whole text."""
    made = TextStream(tokenizer)
    pieces = [made.push(token) for token in ids]
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    pieces.append(made.finish(whole))
    assert made.text == "".join(pieces) and made.ids == ids
    return pieces, whole


def test_pieces_are_the_whole_text(tokenizers):
    draw = random.Random(3)
    for name, tokenizer in tokenizers.items():
        for _ in range(30):
            # Up to four times the window, of words that are text and of tokens that need not be.
            words = "".join(draw.choices(WORDS, k=draw.randint(1, 40)))
            ids = tokenizer(words, add_special_tokens=False)["input_ids"]
            ids = ids + draw.choices(range(min(len(tokenizer), 258)), k=draw.randint(0, 200))
            draw.shuffle(noise := ids[len(ids) // 2 :])
            ids = (ids[: len(ids) // 2] + noise)[:256]
            pieces, whole = stream(tokenizer, ids)
            assert "".join(pieces) == whole, (name, ids)


def test_text_does_not_wait_for_the_end(tokenizers):
    for name, tokenizer in tokenizers.items():
        ids = tokenizer("Hello world. " * 40, add_special_tokens=False)["input_ids"]
        pieces, whole = stream(tokenizer, ids)
        assert len(pieces[-1]) <= 8 and len(list(filter(None, pieces))) > 40, name
        assert len(whole) > 400


def test_a_character_comes_whole():
    tokenizer = byte_level()
    ids = tokenizer("a你", add_special_tokens=False)["input_ids"]
    assert stream(tokenizer, ids)[0] == ["a", "", "", "你", ""]
    # Half a character and then text: the half is shown as the tokenizer does, but not before.
    broken = [*ids[:2], *tokenizer("b", add_special_tokens=False)["input_ids"]]
    assert stream(tokenizer, broken)[0] == ["a", "", "\ufffdb", ""]
    assert stream(tokenizer, ids[:2])[0] == ["a", "", "\ufffd"]


def test_bytes_are_not_shown_before_the_run_of_them_ends():
    tokenizer = byte_fallback()
    sound = tokenizer.convert_tokens_to_ids(["<0xC3>", "<0xA9>"])
    ids = [*sound, *tokenizer.convert_tokens_to_ids(["<0xC3>", "ld"])]
    # The second half-character makes the first, sound one unreadable to this tokenizer.
    pieces, whole = stream(tokenizer, ids)
    assert pieces == ["", "", "", whole, ""] and "é" not in whole
    assert stream(tokenizer, [*sound, ids[-1]])[0] == ["", "", "éld", ""]


def test_a_long_answer_does_not_cost_its_square():
    tokenizer = byte_level()
    decoded = 0

    class Counting:
        clean_up_tokenization_spaces = False
        convert_ids_to_tokens = tokenizer.convert_ids_to_tokens

        def decode(self, ids, **options):
            nonlocal decoded
            decoded += len(ids)
            return tokenizer.decode(ids, **options)

    made = TextStream(Counting())
    for _ in range(2000):
        made.push(70)
    assert decoded < 2000 * 70
