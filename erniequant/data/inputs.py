"""Input of a model: one sequence of tokens, with its images if it has any.

A vision-language model sends every token to one of two sets of experts. ``moe_mm_token_type_ids``
choose the set; without them a model silently sends images to the text experts. Here they are part
of the input.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from erniequant.data.token_hash import hash_token_ids
from erniequant.errors import ErnieQuantError
from erniequant.models.images import ImageSettings


@dataclass(frozen=True, eq=False)
class ImagePatches:
    """An image as the vision tower takes it: patches float32 ``[P, C * p * p]``, those of one token
    together, and time, height and width in patches."""

    patches: torch.Tensor
    grid: tuple[int, int, int]

    def tokens(self, merge: int) -> int:
        """Tokens that stand for it."""
        return self.grid[0] * self.grid[1] * self.grid[2] // merge**2


@dataclass(frozen=True, eq=False)
class ModelInput:
    """One sequence, not padded.

    Attributes:
        ids: int64 ``[T]``.
        placeholder: bool ``[T]``: image tokens, which image embeddings replace.
        vision: bool ``[T]``: tokens for the vision experts: placeholders, and the tokens that begin
            and end an image.
        positions: int64 ``[3, T]``: time, height and width.
        images: in the order of their tokens.

    All but the first are None, or empty, where the sequence has no image.
    """

    ids: torch.Tensor
    placeholder: torch.Tensor | None = None
    vision: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    images: tuple[ImagePatches, ...] = ()

    def __len__(self) -> int:
        return self.ids.numel()

    def batch(self) -> dict[str, torch.Tensor]:
        """Arguments of transformers' model for a batch of one, with both kinds of type ids."""
        ids = self.ids[None]
        arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.placeholder is None or self.vision is None:
            return arguments
        return arguments | {
            "pixel_values": torch.cat([image.patches for image in self.images]),
            "image_grid_thw": torch.tensor([image.grid for image in self.images]),
            "mm_token_type_ids": self.placeholder[None].int(),
            "moe_mm_token_type_ids": self.vision[None].int(),
        }


def input_with_images(
    ids: torch.Tensor, images: tuple[ImagePatches, ...], settings: ImageSettings
) -> ModelInput:
    """One input from token ids and the images that their image tokens stand for.

    Raises:
        ErnieQuantError: the runs of image tokens do not match the images.
    """
    if not images:
        return ModelInput(ids)
    placeholder = ids == settings.token
    vision = placeholder | (ids == settings.start_token) | (ids == settings.end_token)
    wanted = [image.tokens(settings.merge) for image in images]
    if _runs(placeholder) != wanted:
        raise ErnieQuantError(
            f"the text has runs of {_runs(placeholder)} image tokens, but its {len(images)} "
            f"images have {wanted}"
        )
    grids = [image.grid for image in images]
    return ModelInput(
        ids, placeholder, vision, image_positions(placeholder, grids, settings.merge), images
    )


def image_positions(
    placeholder: torch.Tensor, grids: Iterable[tuple[int, int, int]], merge: int
) -> torch.Tensor:
    """Positions int64 ``[3, T]`` of text with images in it.

    A text token is one further in all three directions. Image tokens start where the text left off
    and count time, rows and columns of tokens; the text after an image goes on behind its longer
    side.
    """
    parts, next_position, start = [], 0, 0
    flags = placeholder.tolist()
    waiting = iter(grids)
    while start < len(flags):
        if not flags[start]:
            stop = next((i for i in range(start, len(flags)) if flags[i]), len(flags))
            parts.append(torch.arange(stop - start).expand(3, -1) + next_position)
            next_position += stop - start
            start = stop
            continue
        time, rows, columns = next(waiting)
        axes = [torch.arange(n) for n in (time, rows // merge, columns // merge)]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij")).view(3, -1)
        parts.append(grid + next_position)
        next_position += max(rows, columns) // merge
        start += grid.shape[1]
    return torch.cat(parts, dim=1)


def from_batch(
    batch: Mapping[str, Any], settings: ImageSettings | None, where: str
) -> list[ModelInput]:
    """The sequences of a batch as transformers' processors make it; padding is dropped.

    Args:
        batch: ``input_ids`` ``[B, S]``; with padding ``attention_mask``; with images
            ``pixel_values``, ``image_grid_thw`` and ``moe_mm_token_type_ids``.
        settings: how the model takes images; None for a text-only model.
        where: names the batch in messages.

    Raises:
        ErnieQuantError: something is missing, left over or contradicts the rest.
    """
    ids = _table(batch, "input_ids", where)
    mask = _table(batch, "attention_mask", where, like=ids)
    grids, patches = batch.get("image_grid_thw"), batch.get("pixel_values")
    if any(batch.get(name) is not None for name in ("pixel_values_videos", "video_grid_thw")):
        raise ErnieQuantError(f"{where} has a video; calibrate on images and text only")
    if grids is None and patches is None:
        types = batch.get("moe_mm_token_type_ids")
        if types is not None and bool(torch.as_tensor(types).any()):
            raise ErnieQuantError(f"{where} has image tokens but no pixel_values")
        return [ModelInput(row[keep]) for row, keep in zip(ids, mask.bool(), strict=True)]
    if settings is None:
        raise ErnieQuantError(f"{where} has images, but the model is text-only")
    if grids is None or patches is None:
        raise ErnieQuantError(f"{where} needs both pixel_values and image_grid_thw")
    if batch.get("moe_mm_token_type_ids") is None:
        raise ErnieQuantError(
            f"{where} has images but no moe_mm_token_type_ids, without which a model sends images "
            "to the text experts; pass all that the processor returns"
        )
    types = _table(batch, "moe_mm_token_type_ids", where, like=ids)
    images = _images(torch.as_tensor(patches), torch.as_tensor(grids), settings, where)
    inputs, used = [], 0
    for row, keep, kinds in zip(ids, mask.bool(), types.bool(), strict=True):
        count = len(_runs(row[keep] == settings.token))
        try:
            made = input_with_images(row[keep], tuple(images[used : used + count]), settings)
        except ErnieQuantError as error:
            raise ErnieQuantError(f"{where}: {error}") from error
        used += count
        marked = torch.zeros_like(kinds[keep]) if made.vision is None else made.vision
        if not torch.equal(marked, kinds[keep]):
            raise ErnieQuantError(
                f"{where}: moe_mm_token_type_ids do not mark the image tokens (id "
                f"{settings.token}, begun by {settings.start_token}, ended by {settings.end_token})"
            )
        inputs.append(made)
    if used != len(images):
        raise ErnieQuantError(f"{where} has {len(images)} images, but its text has {used}")
    return inputs


def sequences_of(member: Any, settings: ImageSettings | None, where: str) -> list[ModelInput]:
    """The sequences of a batch of `from_batch`, or of token ids alone.

    Args:
        member: a batch; integers ``[T]`` or ``[B, T]`` as a tensor, an array or lists, of which the
            rows may differ in length; or a list of one such tensor, as data loaders make it.

    Raises:
        ErnieQuantError: as `from_batch`.
    """
    if isinstance(member, ModelInput):
        return [member]
    if isinstance(member, Mapping):
        rows = _ragged(member)
        if rows is None:
            return from_batch(_two_dimensional(member), settings, where)
        return [ModelInput(_row(row, where)) for row in rows]
    if isinstance(member, list | tuple) and isinstance(member[0], torch.Tensor):
        if len(member) > 1 and member[0].dim() > 1:
            raise ErnieQuantError(
                f"{where} is a list of {len(member)} tensors; give {{'input_ids': …, "
                "'attention_mask': …}"
            )
        return [row for part in member for row in sequences_of(part, settings, where)]
    if isinstance(member, list | tuple) and not isinstance(member[0], int):
        return [ModelInput(_row(row, where)) for row in member]
    table = _integers(member, where)
    if table.dim() not in (1, 2):
        raise ErnieQuantError(
            f"{where} has shape {list(table.shape)}; expected token ids [tokens] or [batch, tokens]"
        )
    return [ModelInput(row) for row in (table if table.dim() == 2 else table[None])]


def hash_inputs(inputs: Iterable[ModelInput]) -> str:
    """SHA-256 of model inputs: `hash_token_ids` for text; with images, their patches are hashed
    too."""
    entries = list(inputs)
    ids = hash_token_ids(torch.cat([entry.ids for entry in entries]))
    images = [image for entry in entries for image in entry.images]
    if not images:
        return ids
    digest = hashlib.sha256(ids.encode())
    for image in images:
        digest.update(repr(image.grid).encode())
        digest.update(image.patches.contiguous().numpy().data)
    return digest.hexdigest()


def _ragged(batch: Mapping[str, Any]) -> list[Any] | None:
    """Rows of token ids where they are lists of different lengths, as tokenizers give them."""
    rows = batch["input_ids"]
    if not isinstance(rows, list | tuple) or batch.get("pixel_values") is not None:
        return None
    lengths = {len(row) if isinstance(row, list | tuple) else -1 for row in rows}
    return list(rows) if len(lengths) > 1 and -1 not in lengths else None


def _two_dimensional(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """The batch of one that a row of a tokenised data set is."""
    ids = batch["input_ids"]
    flat = ids.ndim == 1 if hasattr(ids, "ndim") else bool(ids) and isinstance(ids[0], int)
    if not flat:
        return batch
    tables = ("input_ids", "attention_mask", "moe_mm_token_type_ids")
    rows = {n: torch.as_tensor(batch[n])[None] for n in tables if batch.get(n) is not None}
    return {**batch, **rows}


def _row(row: Any, where: str) -> torch.Tensor:
    table = _integers(row, where)
    if table.dim() != 1:
        raise ErnieQuantError(f"{where} has a row of shape {list(table.shape)}; expected [tokens]")
    return table


def _integers(value: Any, where: str) -> torch.Tensor:
    """Token ids int64 on the CPU."""
    try:
        table = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ErnieQuantError(f"{where} has no table of token ids: {error}") from error
    if table.numel() and (table.is_floating_point() or table.dtype == torch.bool):
        raise ErnieQuantError(f"{where} has numbers of type {table.dtype}; expected token ids")
    return table.long().cpu()


def _runs(flags: torch.Tensor) -> list[int]:
    """Lengths of the runs of true values."""
    lengths, length = [], 0
    for flag in [*flags.tolist(), False]:
        if flag:
            length += 1
        elif length:
            lengths.append(length)
            length = 0
    return lengths


def _table(
    batch: Mapping[str, Any], name: str, where: str, like: torch.Tensor | None = None
) -> torch.Tensor:
    value = batch.get(name)
    if value is None:
        if like is None:
            raise ErnieQuantError(f"{where} has no {name}")
        return torch.ones_like(like)
    try:
        table = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ErnieQuantError(f"{where}: {name} is not a table of integers: {error}") from error
    sound = table.dim() == 2 and not table.is_floating_point()
    if not sound or (like is not None and table.shape != like.shape):
        wanted = "integers [batch, tokens]" if like is None else f"shape {list(like.shape)}"
        raise ErnieQuantError(f"{where}: {name} has shape {list(table.shape)}; expected {wanted}")
    return table.long().cpu()


def _images(
    patches: torch.Tensor, grids: torch.Tensor, settings: ImageSettings, where: str
) -> list[ImagePatches]:
    width = settings.channels * settings.patch**2
    if grids.dim() != 2 or grids.shape[1] != 3 or bool((grids < 1).any()):
        raise ErnieQuantError(f"{where}: image_grid_thw is not [images, 3] of positive integers")
    counts = grids.prod(-1).tolist()
    if patches.dim() != 2 or patches.shape != (sum(counts), width):
        raise ErnieQuantError(
            f"{where}: pixel_values has shape {list(patches.shape)}, but image_grid_thw asks for "
            f"{[sum(counts), width]}"
        )
    parts = patches.float().cpu().split(counts)
    images = []
    for part, grid in zip(parts, grids.tolist(), strict=True):
        if grid[0] != 1 or grid[1] % settings.merge or grid[2] % settings.merge:
            raise ErnieQuantError(
                f"{where}: image_grid_thw has {grid}; expected 1 and multiples of {settings.merge}"
            )
        if not bool(torch.isfinite(part).all()):
            raise ErnieQuantError(f"{where}: pixel_values holds numbers that are not finite")
        images.append(ImagePatches(part, (grid[0], grid[1], grid[2])))
    return images
