"""From a name or a folder to its format. A row of `rows.py` is imported when it is first used."""

import importlib
from pathlib import Path

from erniequant.checkpoint.config import CONFIG_FILE, read_json
from erniequant.errors import ErnieQuantError
from erniequant.formats.base import Format
from erniequant.formats.plan import QuantizeOptions
from erniequant.formats.rows import NATIVE, ROWS
from erniequant.paths import expanded


def get_format(name: str) -> Format:
    """The format of a name.

    Raises:
        ErnieQuantError: there is none.
    """
    if name not in ROWS:
        raise ErnieQuantError(f"no format {name!r}; use {' or '.join(ROWS)}")
    row: Format = importlib.import_module(ROWS[name]).FORMAT
    return row


def format_of(source: str | Path) -> Format:
    """The format of a local folder or of a model on Hugging Face; for the latter always the native
    one, which covers plain checkpoints too.

    Raises:
        ErnieQuantError: its config.json cannot be read.
    """
    path = expanded(source) / CONFIG_FILE
    if path.is_file():
        config = read_json(path)
        others = (get_format(name) for name in ROWS if name != NATIVE)
        for candidate in others:
            if candidate.recognises(config):
                return candidate
    return get_format(NATIVE)


def check_options(options: QuantizeOptions) -> Format:
    """The requested format, once it is known to have all the options.

    Raises:
        ErnieQuantError: it lacks one of them.
    """
    requested = get_format(options.format)
    for name in options.own:
        if name not in requested.own_options:
            owner = next((f for f in map(get_format, ROWS) if name in f.own_options), None)
            if owner is None:
                raise ErnieQuantError(f"no format has the option {name}")
            names = " and ".join(option.replace("_", "-") for option in owner.own_options)
            are, them = ("are", "them") if len(owner.own_options) > 1 else ("is", "it")
            raise ErnieQuantError(f"{names} {are} of the format {owner.name}; leave {them} out")
    requested.check(options)
    return requested
