"""Train the byte-fallback BPE tokenizer of the embedded model and save it in Hugging Face form.

    python calib_data/build/train_tokenizer.py [--cache DIR] [--vocab 4352]

Same conventions as ERNIE 4.5: spaces become U+2581 without a prefix space, unknown characters fall
back to bytes, pad is <unk> (0), <s> 1, </s> 2, and the usual cls/sep/mask names.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fetch_texts import DATA, DEFAULT_CACHE
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.tokenization_utils_tokenizers import TokenizersBackend

SPECIALS = ("<unk>", "<s>", "</s>", "<|begin_of_sentence|>", "<|end_of_sentence|>", "<mask:1>")
# Characters of the training texts that get a token of their own; 2300 cover more than 99 %.
ALPHABET = 2300
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + message['content'] + eos_token + '\\n' }}"
    "{% else %}{{ message['content'] + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)


def build(texts: list[str], vocabulary: int) -> Tokenizer:
    """Train on the given texts; ids 0-5 are the specials, 6-261 the bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([])
    # Punctuation and line ends stand alone, so Chinese clauses merge the same way in every context.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n|[^\w\s]"), "isolated"),
            pre_tokenizers.Metaspace(prepend_scheme="never"),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[*SPECIALS, *(f"<0x{b:02X}>" for b in range(256))],
        limit_alphabet=ALPHABET,
        max_token_length=16,
        show_progress=False,
    )
    tokenizer.train_from_iterator((p for t in texts for p in t.split("\n\n")), trainer)
    return tokenizer


def plain_bytes(tokenizer: Tokenizer) -> Tokenizer:
    """The byte tokens are ordinary vocabulary: only the six specials are skipped or split off."""
    import json

    raw = json.loads(tokenizer.to_str())
    raw["added_tokens"] = [t for t in raw["added_tokens"] if t["content"] in SPECIALS]
    return Tokenizer.from_str(json.dumps(raw, ensure_ascii=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--vocab", type=int, default=4352)
    parser.add_argument("--out", type=Path, default=DATA / "tiny_model")
    args = parser.parse_args()
    texts = [p.read_text("utf-8") for p in sorted((args.cache / "train").glob("*.txt"))]
    wrapped = TokenizersBackend(
        tokenizer_object=plain_bytes(build(texts, args.vocab)),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        cls_token="<|begin_of_sentence|>",
        sep_token="<|end_of_sentence|>",
        mask_token="<mask:1>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    wrapped.save_pretrained(args.out)
    print(f"{len(wrapped)} tokens -> {args.out.name}")


if __name__ == "__main__":
    main()
