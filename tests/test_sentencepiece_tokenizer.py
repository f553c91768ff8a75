"""Tokenizers of original vision-language checkpoints against the sentencepiece library itself."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from erniequant.data.companions import write_companions
from erniequant.data.tokenizers import load_tokenizer
from erniequant.errors import ErnieQuantError
from tests.micro_original import (
    CHAT_TEMPLATE,
    SPECIAL,
    train_sentencepiece,
    write_original_tokenizer,
)

TEXTS = [
    "The quick brown fox", " leading and trailing  ", "a\nb\n\n\tc\r\n", "12345 and 007",
    "敏捷的狐狸 jumps 过了", "nothing unknown: é ß 😀 𠀀 \u00a0 ½ ａ", "", " ", "      ",
    "▁", "the▁▁the", "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>Picture 1: what is it?",
    "<|begin_of_sentence|>User: hi\nAssistant: <|end_of_sentence|>", "<|IMAGE_STAR", "<0x41>",
    "-----", "........", "ththththe", "xq", "<think> further",
]  # fmt: skip
PARTS = ["The", " the", "t", "h", "e", " ", "  ", "\n", "7", "42", "狐狸", "合久", "必", "é", "😀",
         "½", "ａ", "<", "|>", *SPECIAL, "▁", "-", ".", "ing", "there", "ther", "<think>",
         "\t"]  # fmt: skip


def many_texts() -> list[str]:
    draw = random.Random(5)
    return TEXTS + ["".join(draw.choices(PARTS, k=draw.randint(1, 25))) for _ in range(800)]


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return write_original_tokenizer(tmp_path / "original")


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def ids_of(tokenizer: Any) -> list[list[int]]:
    return tokenizer(many_texts())["input_ids"]


def reference(folder: Path) -> list[list[int]]:
    model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return [model.encode(text) for text in many_texts()]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"normalization_rule_name": "nfkc"},
        {"remove_extra_whitespaces": True},
        # No text makes a control piece, although others could be merged to it.
        {"control_symbols": ["xq"]},
        {"byte_fallback": False, "vocab_size": 250, "character_coverage": 0.99},
    ],
)
def test_ids_are_those_of_sentencepiece(original: Path, changes: dict[str, Any]) -> None:
    (original / "tokenizer.model").write_bytes(train_sentencepiece(**changes))
    (original / "added_tokens.json").unlink()
    assert ids_of(load_tokenizer(original)) == reference(original)


def test_decodes_what_sentencepiece_decodes(original: Path) -> None:
    tokenizer = load_tokenizer(original)
    model = SentencePieceProcessor(model_file=str(original / "tokenizer.model"))
    for text, ids in zip(many_texts(), reference(original), strict=True):
        assert tokenizer.decode(ids) == model.decode(ids) == text.replace("▁", " ")
    ids = tokenizer("a<|IMAGE_START|>7<mask:1>b")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a7b"


def test_special_tokens(original: Path) -> None:
    tokenizer = load_tokenizer(original)
    model = SentencePieceProcessor(model_file=str(original / "tokenizer.model"))
    named = {
        "unk": "<unk>", "pad": "<unk>", "bos": "<s>", "eos": "</s>",
        "cls": "<|begin_of_sentence|>", "sep": "<|end_of_sentence|>", "mask": "<mask:1>",
        "image": "<|IMAGE_PLACEHOLDER|>", "image_start": "<|IMAGE_START|>",
        "image_end": "<|IMAGE_END|>", "video_start": "<|VIDEO_START|>",
        "video_end": "<|VIDEO_END|>",
    }  # fmt: skip
    for name, token in named.items():
        assert getattr(tokenizer, f"{name}_token") == token
        assert getattr(tokenizer, f"{name}_token_id") == model.piece_to_id(token)
        # Control pieces too, unlike in sentencepiece, which encodes text alone.
        assert tokenizer(f"x{token}y")["input_ids"][-2] == model.piece_to_id(token)
    # Of added_tokens.json; the model has 500 pieces.
    assert tokenizer.video_token == "<|VIDEO_PLACEHOLDER|>" and tokenizer.video_token_id == 500
    assert tokenizer("x<|VIDEO_PLACEHOLDER|>")["input_ids"][-1] == 500
    assert set(tokenizer("x")) == {"input_ids", "attention_mask"}
    assert tokenizer.model_max_length == 2048


def test_tokens_of_videos_that_have_no_id_come_last(original: Path) -> None:
    (original / "added_tokens.json").unlink()
    assert load_tokenizer(original).video_token_id == 500


def test_tokens_that_tokenizer_config_lists(original: Path) -> None:
    (original / "added_tokens.json").unlink()
    listed = {"500": {"content": "<x>", "special": False}, "0": {"content": "<unk>"},
              "501": {"content": "<y>", "special": True}}  # fmt: skip
    rewrite(original / "tokenizer_config.json", added_tokens_decoder=listed)
    tokenizer = load_tokenizer(original)
    ids = tokenizer("a<x><y>")["input_ids"]
    assert ids[-2:] == [500, 501] and tokenizer.video_token_id == 502
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<x>"


def test_a_control_piece_that_no_file_names_is_text(original: Path) -> None:
    (original / "tokenizer.model").write_bytes(train_sentencepiece(control_symbols=["<mask:7>"]))
    tokenizer = load_tokenizer(original)
    model = SentencePieceProcessor(model_file=str(original / "tokenizer.model"))
    assert tokenizer("a<mask:7>")["input_ids"] == model.encode("a<mask:7>")
    rewrite(original / "tokenizer_config.json", additional_special_tokens=["<mask:7>"])
    found = load_tokenizer(original)("a<mask:7>")["input_ids"]
    assert found == [*model.encode("a"), model.piece_to_id("<mask:7>")]


def test_the_chat_template_writes_tokens(original: Path) -> None:
    # Baidu's processor puts the image token in place of a name that is no token.
    tokenizer = load_tokenizer(original)
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "User", "content": content}]
    found = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert found == (
        "<|begin_of_sentence|>User: <|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"
        "What is it?\nAssistant: "
    )
    assert tokenizer(found)["input_ids"].count(tokenizer.image_token_id) == 1
    (original / "chat_template.jinja").write_text("of the file")
    assert load_tokenizer(original).chat_template == "of the file"


def test_what_is_written_needs_no_code(original: Path, tmp_path: Path) -> None:
    (original / "LICENSE").write_text("Apache")
    result = tmp_path / "result"
    result.mkdir()
    write_companions(original, result)
    (result / "config.json").write_text('{"model_type": "ernie4_5_vl_moe"}')
    names = {path.name for path in result.iterdir()} - {"chat_template.jinja"}
    assert names == {"tokenizer.json", "tokenizer_config.json", "tokenizer.model", "LICENSE",
                     "preprocessor_config.json", "config.json"}  # fmt: skip
    for path in result.glob("*.json"):
        assert "auto_map" not in path.read_text()
        assert str(tmp_path) not in path.read_text()
    assert json.loads((result / "preprocessor_config.json").read_text()) == {
        "patch_size": 4, "merge_size": 2, "min_pixels": 64, "max_pixels": 4096
    }  # fmt: skip
    before = load_tokenizer(original)
    for again in (
        AutoTokenizer.from_pretrained(result, trust_remote_code=False),
        load_tokenizer(result),
    ):
        assert ids_of(again) == reference(original)
        assert again.special_tokens_map == before.special_tokens_map
        assert again.video_token_id == before.video_token_id == 500
        assert again.chat_template == CHAT_TEMPLATE.replace(
            "<|image@placeholder|>", "<|IMAGE_PLACEHOLDER|>"
        )
        assert set(again("x")) == {"input_ids", "attention_mask"}
    assert not list(tmp_path.rglob("EXECUTED"))


def test_classes_of_transformers_stay(original: Path, tmp_path: Path) -> None:
    path = original / "preprocessor_config.json"
    rewrite(path, image_processor_type="Ernie4_5_VLMoeImageProcessor")
    write_companions(original, tmp_path)
    found = json.loads((tmp_path / path.name).read_text())
    assert found["image_processor_type"] == "Ernie4_5_VLMoeImageProcessor"
    path.write_text('{"image_processor_type":  "Anything"}')
    write_companions(original, tmp_path)
    assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_other_tokenizers_are_copied_to_the_byte(micro_source: Path, tmp_path: Path) -> None:
    write_companions(micro_source, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (micro_source / name).read_bytes()


def test_a_missing_package_is_named(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ErnieQuantError, match="pip install sentencepiece") as caught:
        load_tokenizer(original)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "unigram", "vocab_size": 360}, "is of kind 1, not BPE"),
        ({"add_dummy_prefix": True}, "puts a space before every text"),
        ({"treat_whitespace_as_suffix": True}, "puts spaces behind words"),
        ({"vocab_size": 499}, "gives token '<|VIDEO_PLACEHOLDER|>' the id 500, .* leads to 499"),
    ],
)
def test_other_models_are_refused(original: Path, changes: dict[str, Any], message: str) -> None:
    (original / "tokenizer.model").write_bytes(train_sentencepiece(**changes))
    with pytest.raises(ErnieQuantError, match=message.replace("|", r"\|")):
        load_tokenizer(original)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.model", "no model", "tokenizer.model cannot be read"),
        ("tokenizer.model", "", "tokenizer.model is of kind"),
        ("added_tokens.json", '{"<|VIDEO_PLACEHOLDER|>": 502}', "do not belong together"),
        ("added_tokens.json", '{"<s>": 7}', "the id 7, but its tokenizer.model leads to 1"),
        ("added_tokens.json", '{"<x>": "500.5"}', "with id '500.5'; damaged"),
        ("added_tokens.json", '{"": 500}', "the token '' with id '500'; damaged"),
        ("tokenizer_config.json", {"chat_template": ["x"]}, "chat_template that is not a text"),
        ("tokenizer_config.json", {"additional_special_tokens": 5}, "special_tokens 5"),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "damaged added_tokens_decoder"),
        ("tokenizer_config.json", {"vocab_file": "../other"}, "not in its folder"),
    ],
)
def test_damage_is_one_line(original: Path, name: str, content: Any, message: str) -> None:
    if isinstance(content, dict):
        rewrite(original / name, **content)
    else:
        (original / name).write_text(content)
    with pytest.raises(ErnieQuantError, match=message):
        load_tokenizer(original)
