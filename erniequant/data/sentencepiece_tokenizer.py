"""The tokenizer of Baidu's own vision-language checkpoints, which comes as a sentencepiece model
with Python code: made from the model only, without that code.

Ids are those of the sentencepiece library. transformers' conversions are not used: they leave out
the model's normalisation, take every control piece that a text spells for the piece, and differ
between its versions.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE

from erniequant.checkpoint.reader import read_json
from erniequant.checkpoint.strict_json import read_bounded
from erniequant.errors import ErnieQuantError, wrap_errors

MODEL_FILE = "tokenizer.model"
SETTINGS_FILE = "tokenizer_config.json"
ADDED_FILE = "added_tokens.json"
TEMPLATE_FILE = "chat_template.jinja"

IMAGE_TOKENS = {
    "image_token": "<|IMAGE_PLACEHOLDER|>",
    "image_start_token": "<|IMAGE_START|>",
    "image_end_token": "<|IMAGE_END|>",
    "video_token": "<|VIDEO_PLACEHOLDER|>",
    "video_start_token": "<|VIDEO_START|>",
    "video_end_token": "<|VIDEO_END|>",
}
"""Special tokens around and in place of images and videos, by what transformers calls them."""

# Tokens of the released checkpoints, unless tokenizer_config.json says otherwise.
_ROLES = {
    "unk_token": "<unk>",
    "pad_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "cls_token": "<|begin_of_sentence|>",
    "sep_token": "<|end_of_sentence|>",
    "mask_token": "<mask:1>",
}
# Baidu's code replaces these in what a chat template renders; no token has these names.
_RENDERED = {
    "<|image@placeholder|>": IMAGE_TOKENS["image_token"],
    "<|video@placeholder|>": IMAGE_TOKENS["video_token"],
}
_KEPT = {"model_max_length": int, "padding_side": str}
_MAX_BYTES = 100_000_000
# sentencepiece trains pieces of at most 16 letters, and every way to split one is looked at.
_MAX_PIECE = 1000
_BPE = 2
_NORMAL, _UNKNOWN, _USER_DEFINED = 1, 2, 4


def sentencepiece_tokenizer(folder: Path) -> Any:
    """A transformers tokenizer of ``folder``'s sentencepiece model, special tokens and template.

    Special tokens that neither the model nor ``added_tokens.json`` has an id for are left out, but
    for those of images and videos, which come after all others, as in transformers' conversion of
    the released checkpoints.

    Raises:
        ErnieQuantError: the sentencepiece package is missing, a file is damaged, or the model is
            not of the kind that ERNIE 4.5 has.
    """
    settings = read_json(folder / SETTINGS_FILE)
    tokenizer, user_defined = _tokenizer(folder / MODEL_FILE)
    vocabulary = tokenizer.get_vocab()
    added = sorted(_added(folder, settings), key=lambda entry: entry[1])
    for token, number, _ in added:
        if vocabulary.setdefault(token, len(vocabulary)) != number:
            raise ErnieQuantError(
                f"{folder} gives token {token!r} the id {number}, but its {MODEL_FILE} leads to "
                f"{vocabulary[token]}; its files do not belong together"
            )
    roles = {role: token for role, token in _roles(settings).items() if token in vocabulary}
    more = settings.get("additional_special_tokens") or []
    if not isinstance(more, list):
        raise ErnieQuantError(f"{folder / SETTINGS_FILE} has additional_special_tokens {more!r}")
    named = {*roles.values(), *map(_text, more), *IMAGE_TOKENS.values()}
    named |= {token for token, _, special in added if special}
    whole = {token for token in named if token in vocabulary} | {token for token, _, _ in added}
    # By id: a new token gets the next one.
    order = sorted(whole | user_defined, key=lambda token: vocabulary[token])
    order += [token for token in IMAGE_TOKENS.values() if token not in vocabulary]
    tokenizer.add_tokens(
        [
            # sentencepiece looks for user-defined pieces, such as single digits, after normalising.
            AddedToken(token, special=token in named, normalized=token in user_defined)
            for token in order
        ]
    )
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **roles,
        extra_special_tokens=dict(IMAGE_TOKENS),
        chat_template=_chat_template(folder, settings),
        add_bos_token=False,
        add_eos_token=False,
        add_prefix_space=False,
        clean_up_tokenization_spaces=False,
        **{"padding_side": "left"}
        | {n: settings[n] for n, kind in _KEPT.items() if type(settings.get(n)) is kind},
    )


def _tokenizer(path: Path) -> tuple[Tokenizer, set[str]]:
    """The sentencepiece model without special tokens, and its user-defined pieces."""
    model = _parsed(path)
    spec = model.normalizer_spec
    # The problems below would need steps that no ERNIE has.
    kind = model.trainer_spec.model_type
    for wrong, what in (
        (kind != _BPE, f"is of kind {kind}, not BPE"),
        (spec.add_dummy_prefix, "puts a space before every text"),
        (model.trainer_spec.treat_whitespace_as_suffix, "puts spaces behind words"),
        (not spec.escape_whitespaces, "does not escape spaces"),
    ):
        if wrong:
            raise ErnieQuantError(f"{path} {what}; no ERNIE 4.5 has such a tokenizer")
    pieces = list(model.pieces)
    vocabulary = {piece.piece: number for number, piece in enumerate(pieces)}
    unknown = [piece.piece for piece in pieces if piece.type == _UNKNOWN]
    longest = max((len(piece.piece) for piece in pieces), default=0)
    if len(vocabulary) != len(pieces) or len(unknown) != 1 or longest > _MAX_PIECE:
        raise ErnieQuantError(
            f"{path} is damaged: {len(pieces)} pieces, {len(vocabulary)} different, of up to "
            f"{longest} letters, {len(unknown)} for what is unknown"
        )
    tokenizer = Tokenizer(
        BPE(
            vocab=vocabulary,
            merges=_merges(pieces),
            unk_token=unknown[0],
            fuse_unk=True,
            byte_fallback=model.trainer_spec.byte_fallback,
        )
    )
    tokenizer.normalizer = _normalizer(spec)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer, {piece.piece for piece in pieces if piece.type == _USER_DEFINED}


def _parsed(path: Path) -> Any:
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise ErnieQuantError(
            f"{path} is a sentencepiece model, which needs two more packages; "
            "pip install sentencepiece protobuf"
        ) from error
    model = sentencepiece_model_pb2.ModelProto()
    with wrap_errors(f"{path} cannot be read"):
        model.ParseFromString(read_bounded(path, _MAX_BYTES))
    return model


def _merges(pieces: list[Any]) -> list[tuple[str, str]]:
    """Every way to put a normal piece together from two others, those of better score first."""
    normal = {p.piece: (-p.score, i) for i, p in enumerate(pieces) if p.type == _NORMAL}
    ranked = [
        (rank, -cut, piece[:cut], piece[cut:])
        for piece, rank in normal.items()
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    return [(left, right) for _, _, left, right in sorted(ranked)]


def _normalizer(spec: Any) -> Any:
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    spaces = normalizers.Replace(" ", "▁")
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" +"), " ")]
        steps += [spaces, normalizers.Replace(Regex(r"▁+\z"), "")]
    else:
        steps.append(spaces)
    return normalizers.Sequence(steps)


def _added(folder: Path, settings: dict[str, Any]) -> Iterator[tuple[str, int, bool]]:
    """Tokens that files beside the model list, with their ids and whether they are special."""
    listed = settings.get("added_tokens_decoder") or {}
    if not isinstance(listed, dict):
        raise ErnieQuantError(f"{folder / SETTINGS_FILE} has a damaged added_tokens_decoder")
    tokens = {_text(t): (n, isinstance(t, dict) and t.get("special") is True)
             for n, t in listed.items()}  # fmt: skip
    if (folder / ADDED_FILE).is_file():
        for token, number in read_json(folder / ADDED_FILE).items():
            tokens.setdefault(token, (str(number), False))
    for text, (number, special) in tokens.items():
        if not text or not number.isdecimal():
            raise ErnieQuantError(f"{folder} lists the token {text!r} with id {number!r}; damaged")
        yield text, int(number), special


def _roles(settings: dict[str, Any]) -> dict[str, str | None]:
    return {
        role: _text(settings[role]) if settings.get(role) is not None else default
        for role, default in _ROLES.items()
    }


def _text(token: Any) -> str | None:
    """A token's text, which files give as it is or in an object with its properties."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """The chat template with the tokens that Baidu's code would put in."""
    template = settings.get("chat_template")
    path = folder / TEMPLATE_FILE
    if path.is_file():
        with wrap_errors(f"{path} cannot be read"):
            template = read_bounded(path, _MAX_BYTES).decode("utf-8")
    if template is not None and not isinstance(template, str):
        raise ErnieQuantError(f"{folder / SETTINGS_FILE} has a chat_template that is not a text")
    for rendered, token in _RENDERED.items():
        template = template.replace(rendered, token) if template else template
    return template
