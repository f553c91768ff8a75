"""Image settings of a model: token ids, and sizes in pixels and patches."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ImageSettings:
    """A square of ``merge`` x ``merge`` patches of ``patch`` x ``patch`` pixels is one token."""

    start_token: int
    token: int
    end_token: int
    patch: int
    merge: int
    channels: int
