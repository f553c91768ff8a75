"""Shares of packed experts for tensor and expert parallelism (docs/format.md, splitting).

Ranks of tensor parallelism take outputs of gate and of up, and the matching inputs of down. A tile
is one circular bit sequence and a rotation block one transform, so neither can be cut, nor can a
word of signs. Ranks of expert parallelism take whole experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from erniequant.errors import ErnieQuantError
from erniequant.packing.schema import SIGN_BITS, LayerSpec, TensorInfo, layer_params

CUT_DIMENSION = {
    "gate_up_proj_packed": 1,
    "gate_up_proj_scale": 1,
    "gate_up_proj_signs": None,
    "down_proj_packed": 2,
    "down_proj_scale": None,
    "down_proj_signs": 2,
}
"""The dimension of each stored tensor that tensor parallelism cuts; None: each rank has it all."""


@dataclass(frozen=True)
class Share:
    """One rank's part.

    Attributes:
        rank, ranks: in tensor parallelism.
        experts: global indices of the experts it owns, in its own order; None for all.
    """

    rank: int = 0
    ranks: int = 1
    experts: tuple[int, ...] | None = None


WHOLE = Share()


def require_divisible(inner: int, ranks: int, layer: LayerSpec, where: str) -> None:
    """Refuse a number of ranks of tensor parallelism that would cut what cannot be cut.

    inner: size I of an expert, or of the MLP of a dense model.

    Raises:
        ErnieQuantError: names ``where``, the sizes, and the ways out.
    """
    if ranks == 1:
        return
    down = layer.down_proj
    units = {
        f"gate_up_proj has tiles of {layer.gate_up_proj.tile} outputs": layer.gate_up_proj.tile,
        f"down_proj has rotation blocks of {down.rotation_block} inputs": down.rotation_block,
        f"down_proj has words of {SIGN_BITS} signs": SIGN_BITS,
    }
    for what, unit in units.items():
        if inner % (unit * ranks):
            raise ErnieQuantError(
                f"{where}: {what}, so {inner} cannot be divided among {ranks} ranks; quantise with "
                f"--max-tp {ranks}, use fewer ranks, or divide whole experts (expert parallelism)"
            )


def max_ranks(inner: int, layer: LayerSpec) -> int:
    """The largest power of two of ranks that `require_divisible` accepts."""
    unit = max(layer.gate_up_proj.tile, layer.down_proj.rotation_block, SIGN_BITS)
    parts = inner // unit
    return parts & -parts


def share_params(
    experts: int, hidden: int, inner: int, layer: LayerSpec, share: Share, where: str = "experts"
) -> dict[str, TensorInfo]:
    """Shapes and dtypes of one rank's tensors, by name after the prefix, without the guard.

    experts, hidden, inner: of the whole layer.

    Raises:
        ErnieQuantError: the layer cannot be divided so.
    """
    require_divisible(inner, share.ranks, layer, where)
    owned = experts if share.experts is None else len(share.experts)
    whole = layer_params(owned, hidden, inner // share.ranks, layer, where)
    return {name: info for name, info in whole.items() if name in CUT_DIMENSION}


def take_share(name: str, stored: torch.Tensor, share: Share) -> torch.Tensor:
    """One rank's part of one stored tensor, of any dtype; a view where it is contiguous.

    name: after the prefix, as in `CUT_DIMENSION`. stored: as in the file, all experts.
    """
    dimension = CUT_DIMENSION[name]
    if share.experts is not None and not name.endswith("_signs"):  # shared by all experts
        stored = stored[list(share.experts)]
    if dimension is None or share.ranks == 1:
        return stored
    halves = stored.chunk(2, dimension) if name.startswith("gate_up_proj") else (stored,)
    parts = [half.chunk(share.ranks, dimension)[share.rank] for half in halves]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dimension)


def bytes_of(params: Mapping[str, TensorInfo]) -> int:
    """Bytes that tensors of these shapes and dtypes take."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in params.values())
