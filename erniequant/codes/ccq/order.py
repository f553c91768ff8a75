"""The two orders in which a WINT2 file may keep the input rows; nothing in a checkpoint says which.

``plain`` (FastDeploy 2.0): stored row ``p`` is row ``p``. ``mma64`` (its pull request 2990, July
2025, and what it serves now): inside every 64 rows, stored position ``16 a + 2 b + c`` holds row
``8 b + 2 a + c`` (a < 4, b < 8, c < 2), as the matrix instruction wants them. Four rows share a
byte, so the order has to be chosen before encoding. Groups stay what they are.
"""

import torch

from erniequant.errors import ErnieQuantError

K_ORDERS = ("plain", "mma64")

_A, _B, _C = 4, 8, 2


def check_order(k_order: str) -> None:
    """Raises ErnieQuantError unless ``k_order`` is one of `K_ORDERS`."""
    if k_order not in K_ORDERS:
        raise ErnieQuantError(f"k_order must be {' or '.join(K_ORDERS)}, not {k_order!r}")


def stored_rows(inputs: int, k_order: str) -> torch.Tensor:
    """Which row each stored position holds: int64 ``[K]``, for ``K`` a multiple of 64.

    Raises:
        ErnieQuantError: no such order.
    """
    check_order(k_order)
    rows = torch.arange(inputs)
    if k_order == "plain":
        return rows
    return rows.unflatten(0, (-1, _B, _A, _C)).transpose(1, 2).flatten()


def to_natural(stored: torch.Tensor, k_order: str) -> torch.Tensor:
    """Rows ``[..., K, N]`` from the stored to the model's order."""
    check_order(k_order)
    if k_order == "plain":
        return stored
    return stored.unflatten(-2, (-1, _A, _B, _C)).transpose(-4, -3).flatten(-5, -2)
