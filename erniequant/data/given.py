"""Data given as Python objects: its kind, and a plain refusal of anything else.

A list, a data set, a `DataLoader`, a generator: any iterable of texts, chats, records, paths, token
ids or batches. All members are of one kind.
"""

import io
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from erniequant.data.inputs import ModelInput
from erniequant.errors import ErnieQuantError

TEXTS, CHATS, RECORDS, FILES, BATCHES = "texts", "chats", "records", "files", "batches"

_ADVICE = "give texts, chats, records, token ids, batches, or the path of a file"
_LONGEST_NAME = 255
# Methods of polars, pyarrow and pandas.
_ROWS = {"to_dicts": "to_dicts()", "to_pylist": "to_pylist()", "to_dict": "to_dict('records')"}


@dataclass(frozen=True)
class Given:
    """An iterable of members and its name in messages.

    ``once``: iterating uses the members up. ``sized``: all of them exist already.
    """

    members: Iterable[Any]
    name: str

    @property
    def once(self) -> bool:
        return iter(self.members) is self.members

    @property
    def sized(self) -> bool:
        return isinstance(self.members, list | tuple)


def given(value: Any, name: str, none: str) -> str | Given:
    """A source that is named by a text or a path, or members.

    Args:
        name: name of the argument, for messages.
        none: what to do instead of giving None.

    Raises:
        ErnieQuantError: it is neither.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, Path):
        return str(value)
    if value is None:
        raise ErnieQuantError(f"{name} is None; {none}")
    if isinstance(value, torch.Tensor | ModelInput) or _is_array(value):
        return Given([value], name)
    if isinstance(value, Mapping):
        if "input_ids" in value:
            return Given([value], name)
        if value and all(type(part).__name__.endswith("Dataset") for part in value.values()):
            raise ErnieQuantError(
                f"{name} has several splits; give one, such as {name}[{next(iter(value))!r}]"
            )
        raise ErnieQuantError(f"{name} is {_type_of(value)}; give a list of records")
    for method in _ROWS:
        # Iterating over a table gives the names of its columns, or the columns.
        if hasattr(value, method) and type(value).__name__ in ("DataFrame", "Table"):
            raise ErnieQuantError(f"{name} is a table; give its rows, {name}.{_ROWS[method]}")
    if isinstance(value, io.IOBase):
        raise ErnieQuantError(f"{name} is an open file; give its path, a pathlib.Path")
    if isinstance(value, bytes | bytearray | Set) or not _can_be_gone_through(value):
        raise ErnieQuantError(f"{name} is {_type_of(value)}; {_ADVICE}")
    return Given(value, name)


def kind_of_members(data: Given) -> tuple[str, Given]:
    """The kind of the first member that is not None, and data that still has it.

    Raises:
        ErnieQuantError: there is none, or it is of no kind.
    """
    waiting = iter(data.members)
    looked_at = []
    for number, member in enumerate(waiting):
        looked_at.append(member)
        if member is None:
            continue
        kind = _kind(member, f"{data.name}[{number}]")
        if not data.sized:
            return kind, Given(chain(looked_at, waiting), data.name)
        return kind, data
    raise ErnieQuantError(f"{data.name} is empty; {_ADVICE}")


def members(data: Given, kind: str) -> Iterator[tuple[Any, str]]:
    """All members, each with its name. None stands for an empty text or record.

    Raises:
        ErnieQuantError: one is of another kind.
    """
    for number, member in enumerate(data.members):
        where = f"{data.name}[{number}]"
        if member is None and kind in (TEXTS, CHATS, RECORDS):
            yield member, where
            continue
        own_kind = _kind(member, where)
        if own_kind != kind:
            raise ErnieQuantError(
                f"{where} is {_type_of(member)} ({own_kind}), but the first is of {kind}; give one "
                "kind at a time"
            )
        yield member, where


def records_of(data: Given, kind: str) -> Iterator[tuple[Any, str]]:
    """Members that are texts, chats or records, as records.

    Raises:
        ErnieQuantError: as `members`.
    """
    for member, where in members(data, kind):
        if kind == TEXTS and not isinstance(member, str | None):
            yield from ((text, where) for text in member)
        elif kind == TEXTS and isinstance(member, str) and _names_a_file(member):
            raise ErnieQuantError(
                f"{where} is {member!r}, the name of a file; give pathlib.Path({member!r}) to read "
                "it"
            )
        else:
            yield member, where


def _kind(member: Any, where: str) -> str:
    if isinstance(member, str):
        return TEXTS
    if isinstance(member, Path):
        return FILES
    if isinstance(member, torch.Tensor | ModelInput) or _is_array(member):
        return BATCHES
    if isinstance(member, Mapping):
        if "input_ids" in member:
            return BATCHES
        if "role" in member and "content" in member:
            raise ErnieQuantError(
                f"{where} is a single message; a chat is a list of messages, so give a list of "
                "such lists"
            )
        return RECORDS
    if isinstance(member, list | tuple) and member:
        parts = {_part_kind(part) for part in member}
        if len(parts) == 1 and (kind := parts.pop()) is not None:
            return kind
        raise ErnieQuantError(f"{where} is {_type_of(member)} of {_types_in(member)}; {_ADVICE}")
    raise ErnieQuantError(f"{where} is {_type_of(member)}; {_ADVICE}")


def _part_kind(part: Any) -> str | None:
    """The kind of a list of such parts; None if it is of no kind."""
    if isinstance(part, str):
        return TEXTS
    if isinstance(part, Mapping):
        return CHATS
    integers = isinstance(part, list | tuple) and all(type(i) is int for i in part)
    if type(part) is int or integers or isinstance(part, torch.Tensor) or _is_array(part):
        return BATCHES
    return None


def _is_array(value: Any) -> bool:
    return type(value).__module__ == "numpy" and hasattr(value, "dtype")


def _names_a_file(text: str) -> bool:
    short = len(text.encode("utf-8", "replace")) <= _LONGEST_NAME and text.isprintable()
    return short and "." in text and Path(text).is_file()


def _can_be_gone_through(value: Any) -> bool:
    try:
        iter(value)
    except TypeError:
        return False
    return True


def _type_of(value: Any) -> str:
    name = "None" if value is None else type(value).__name__
    if value is None:
        return name
    return f"an {name}" if name[0].lower() in "aeiou" else f"a {name}"


def _types_in(value: Iterable[Any]) -> str:
    return " and ".join(sorted({type(part).__name__ for part in value}))
