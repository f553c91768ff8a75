"""WINT2 in a few lines of numpy, and experts of any codes at all with the weights that they mean.

Written from the description of the format (docs/fastdeploy.md), apart from the library.
"""

from typing import Any

import numpy as np
import torch

from erniequant.formats.fastdeploy.packers import WINT4

# Stored position 16 a + 2 b + c of a group of 64 inputs holds input 8 b + 2 a + c.
MMA64 = [8 * b + 2 * a + c for a in range(4) for b in range(8) for c in range(2)]


def decode_wint2(
    quant_weight: torch.Tensor,
    weight_scale: torch.Tensor,
    super_scales: torch.Tensor,
    code_scale: torch.Tensor,
    code_zp: torch.Tensor,
    *,
    k_order: str = "plain",
    rounding: str = "exact",
) -> torch.Tensor:
    """Float32 ``[K, N]``; see `erniequant.ccq`."""
    assert rounding == "exact"
    code = np.floor(quant_weight.numpy() * code_scale.numpy() + code_zp.numpy() + np.float32(0.5))
    code = code.astype(np.int64)
    value = np.stack([(code >> shift & 63) - 32 for shift in (9, 6, 3, 0)], axis=1)
    inputs, outputs = 4 * len(code), code.shape[1]
    value = value.reshape(inputs, outputs).astype(np.float32)
    # The high nibble is the scale of the even group of 64 inputs.
    nibbles = np.stack([weight_scale.numpy() >> 4, weight_scale.numpy() & 15], axis=1)
    scale = nibbles.reshape(-1, outputs).repeat(64, 0) * super_scales.float().numpy()
    stored = (value * scale).reshape(-1, 64, outputs)
    if k_order == "mma64":
        natural = np.empty_like(stored)
        natural[:, MMA64] = stored
        stored = natural
    return torch.from_numpy(stored.reshape(inputs, outputs).astype(np.float32))


class MadeUpExperts:
    """Codes drawn at random, the same for the same matrix, and their weights."""

    def __init__(self, config: dict[str, Any], w4_end: int):
        self._hidden, self._inner = config["hidden_size"], config["moe_intermediate_size"]
        self._w4_end = w4_end

    def encoded(self, layer: int, expert: int, projection: str) -> dict[str, torch.Tensor]:
        """For `write_fastdeploy`."""
        return self._make(layer, expert, projection)[0]

    def weight(self, layer: int, expert: int, projection: str, k_order: str) -> torch.Tensor:
        """Float32 ``[N, K]``, as in ``nn.Linear``."""
        encoded, wint4 = self._make(layer, expert, projection)
        decoded = decode_wint2(**encoded, k_order=k_order) if wint4 is None else wint4
        return decoded.T

    def _make(
        self, layer: int, expert: int, projection: str
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        up_gate = projection == "up_gate_proj"
        inputs = self._hidden if up_gate else self._inner
        outputs = 2 * self._inner if up_gate else self._hidden
        draw = torch.Generator().manual_seed(1000 * layer + 10 * expert + up_gate)
        scale = torch.rand(outputs, generator=draw) + 0.5
        if layer <= self._w4_end:
            codes = torch.randint(-7, 8, (inputs, outputs), generator=draw, dtype=torch.int8)
            scale = (0.02 * scale).bfloat16()
            tensors = {"quant_weight": WINT4.pack(codes), "weight_scale": scale}
            return tensors, codes.float() * scale.float()

        def some_bytes(rows: int) -> torch.Tensor:
            return torch.randint(256, (rows, outputs), generator=draw).to(torch.uint8)

        return {
            "quant_weight": some_bytes(inputs // 4),
            "weight_scale": some_bytes(inputs // 128),
            "super_scales": (0.0005 * scale).bfloat16(),
            # On a grid of 1/256, so that products are exact.
            "code_scale": (torch.randint(20000, 32000, (outputs,), generator=draw) / 256),
            "code_zp": (torch.randint(0, 8000, (outputs,), generator=draw) / 256),
        }, None


def rounded_wint8(weight: torch.Tensor) -> torch.Tensor:
    """What wint8 makes of bf16 ``[N, K]``: float32, one scale per row."""
    exact = weight.double()
    scale = (exact.abs().amax(1, keepdim=True).float() / 127).bfloat16().double()
    ratio = exact / scale
    codes = torch.where(ratio < 0, -(-ratio + 0.5).floor(), (ratio + 0.5).floor())
    return (codes.clamp(-127, 127) * scale).float()


def encode_wint2(weight: torch.Tensor, k_order: str) -> dict[str, torch.Tensor]:
    """The nearest codes of one poor code book for ``[K, N]``: enough to tell orders apart."""
    inputs, outputs = weight.shape
    rows = weight.float().reshape(-1, 64, outputs)
    if k_order == "mma64":
        rows = rows[:, MMA64]
    scale = rows.abs().amax(1) / 28
    super_scales = (scale.amax(0) / 15).bfloat16()
    nibble = (scale / super_scales.float()).ceil().clamp(1, 15)
    target = rows / (nibble * super_scales.float())[:, None]
    byte = torch.arange(256.0)
    code = (byte * 127.5 + 0.5).floor().long()
    book = torch.stack([(code >> shift & 63) - 32 for shift in (9, 6, 3, 0)]).float()
    vectors = target.reshape(-1, 4, outputs).transpose(1, 2)
    nearest = (book.square().sum(0) - 2 * vectors @ book).argmin(-1)
    pairs = nibble.to(torch.uint8).reshape(-1, 2, outputs)
    return {
        "quant_weight": nearest.to(torch.uint8),
        "weight_scale": pairs[:, 0] << 4 | pairs[:, 1],
        "super_scales": super_scales,
        "code_scale": torch.full((outputs,), 127.5),
        "code_zp": torch.zeros(outputs),
    }
