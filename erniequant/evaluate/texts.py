"""The text a model is evaluated on: a file, a Hugging Face data set, or the built-in held-out
text."""

from pathlib import Path

from erniequant.data.files import no_text, read_text, text_blocks
from erniequant.errors import ErnieQuantError
from erniequant.paths import expanded


def evaluation_text(*, file: Path | None = None, dataset: str | None = None) -> str:
    """The text of `file`, of `dataset` ("NAME[:SPLIT[:COLUMN]]"), or the built-in one, in that
    order.

    Raises ErnieQuantError if it cannot be read or holds no text.
    """
    if file is not None:
        return read_text(expanded(file))
    if dataset is not None:
        return _read_dataset(dataset)
    from erniequant_data import heldout_text

    return heldout_text()


def require_text(file: Path) -> None:
    """Read a file to its end, a block at a time, as `perplexity` will.

    Raises:
        ErnieQuantError: as `read_text`.
    """
    if not sum(bool(block.strip()) for block in text_blocks(expanded(file))):
        raise no_text(file)


def _read_dataset(name: str) -> str:
    """Rows of the text column joined by a blank line, in the order of the data set."""
    repository, _, rest = name.partition(":")
    split, _, column = rest.partition(":")
    import datasets

    try:
        rows = datasets.load_dataset(repository, split=split or "test")
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ErnieQuantError(
            f"cannot load data set {repository} (split {split or 'test'}): {reason}; "
            "check name, split and network, or use --text FILE"
        ) from error
    column = column or "text"
    if column not in rows.column_names:
        raise ErnieQuantError(
            f"data set {repository} has no column {column!r} but {', '.join(rows.column_names)}: "
            "name one as NAME:SPLIT:COLUMN"
        )
    text = "\n\n".join(str(row) for row in rows[column] if row is not None and str(row).strip())
    if not text:
        raise ErnieQuantError(
            f"data set {repository} holds no text in {column!r}: use another column"
        )
    return text
