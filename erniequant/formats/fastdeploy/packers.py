"""The wint8 and wint4 layouts of FastDeploy: integers of a matrix as its CUDA products read them.

Both are what ``paddle.nn.quant.weight_quantize(w, algo, arch=80)`` returns (architectures 75 to 100
give the same bytes, 70 another layout). The forms below were derived from its output and are
compared with it, byte for byte, by tests/fastdeploy/paddle_oracle.py.

Matrices are in Paddle's orientation: one row per input, ``[K, N]``.
"""

from dataclasses import dataclass

import numpy as np
import torch

TILE_ROWS = 64
"""Rows of a tile; K has to be a multiple of it."""

N_MULTIPLE = 16
"""N has to be a multiple of it."""


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A matrix as stored: ``quant_weight`` int8, ``weight_scale`` ``[N]`` in the model's dtype."""

    quant_weight: torch.Tensor
    weight_scale: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        """By the suffixes of their keys."""
        return {"quant_weight": self.quant_weight, "weight_scale": self.weight_scale}


@dataclass(frozen=True)
class Packing:
    """One of the two layouts.

    Codes are ``-largest..largest`` and stored with ``2**(bits - 1)`` added. Tiles of `TILE_ROWS`
    rows and ``columns`` columns follow one another along K, then N; a tile is stored column by
    column. Inside a column, every ``period`` rows are reordered: a 32-bit register gets the rows
    that one thread multiplies.
    """

    bits: int
    columns: int
    period: int

    @property
    def largest(self) -> int:
        """The largest magnitude of a code."""
        return 2 ** (self.bits - 1) - 1

    @property
    def order(self) -> list[int]:
        """The row of each ``period`` at each position: wint8 0, 8, 1, 9...; wint4 0, 8, 16, 24,
        1..."""
        return [start + step for step in range(8) for start in range(0, self.period, 8)]

    def packed_shape(self, inputs: int, outputs: int) -> tuple[int, int]:
        """Shape of the packed codes of a matrix ``[inputs, outputs]``.

        Raises:
            ValueError: the layout does not cover such a matrix.
        """
        if inputs % TILE_ROWS or outputs % N_MULTIPLE or not inputs or not outputs:
            raise ValueError(
                f"wint{self.bits} needs inputs in multiples of {TILE_ROWS} and outputs in multiples"
                f" of {N_MULTIPLE}, not {inputs} and {outputs}"
            )
        return outputs * self.bits // 8, inputs

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes int8 ``[K, N]`` to bytes int8 ``[N, K]`` (wint8) or ``[N / 2, K]`` (wint4).

        Raises:
            ValueError: another shape, or a code out of range.
        """
        inputs, outputs = codes.shape
        shape = self.packed_shape(inputs, outputs)
        if codes.numel() and int(codes.int().abs().max()) > self.largest:
            raise ValueError(f"wint{self.bits} codes are at most {self.largest} in magnitude")
        stored = (codes.numpy().astype(np.int16) + 2 ** (self.bits - 1)).astype(np.uint8)
        rows = stored.reshape(-1, self.period, outputs)[:, self.order].reshape(inputs, outputs)
        tiles = rows.reshape(-1, TILE_ROWS, outputs // self.columns, self.columns)
        flat = tiles.transpose(2, 0, 3, 1).reshape(-1)
        if self.bits == 4:
            flat = flat[0::2] | flat[1::2] << 4
        return torch.from_numpy(flat.view(np.int8).reshape(shape).copy())

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """The inverse of `pack`: bytes int8 to codes int8 ``[K, N]``.

        Any byte has a meaning, so codes of foreign files may be ``-largest - 1``.
        """
        inputs, outputs = packed.shape[1], packed.shape[0] * 8 // self.bits
        self.packed_shape(inputs, outputs)
        flat = packed.contiguous().numpy().view(np.uint8).reshape(-1)
        if self.bits == 4:
            flat = np.stack((flat & 15, flat >> 4), axis=-1).reshape(-1)
        tiles = flat.reshape(outputs // self.columns, inputs // TILE_ROWS, self.columns, TILE_ROWS)
        rows = tiles.transpose(1, 3, 0, 2).reshape(-1, self.period, outputs)
        natural = np.empty_like(rows)
        natural[:, self.order] = rows
        codes = natural.reshape(inputs, outputs).astype(np.int16) - 2 ** (self.bits - 1)
        return torch.from_numpy(codes.astype(np.int8))

    def dequantize(self, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Weights float32 ``[K, N]``: codes times the scale ``[N]`` of their output, which is exact
        for scales of bfloat16 and float16."""
        return self.unpack(packed).float() * scale.float()

    def scale_of(self, weight: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """The scale ``[N]`` that `round` uses: largest magnitude over the largest code, rounded to
        ``dtype`` before anything is divided by it."""
        return (weight.float().abs().amax(0) / self.largest).to(dtype)

    def round(self, weight: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> PackedMatrix:
        """Round a weight ``[K, N]`` to the nearest codes, halves away from zero.

        Args:
            weight: rounded to ``dtype`` first, as Paddle's function takes no float32.
            dtype: type of the model, bfloat16 or float16.

        Raises:
            ValueError: the layout does not cover its shape.
        """
        weight = weight.to(dtype).float()
        scale = self.scale_of(weight, dtype)
        ratio = weight / scale.float()
        codes = (ratio.sign() * (ratio.abs() + 0.5).floor()).clamp(-self.largest, self.largest)
        # Where the scale is zero every code means zero; these are Paddle's, of conversions that C++
        # leaves open.
        codes = codes.nan_to_num(nan=self.largest)
        if self.bits == 4:
            codes[~ratio.isfinite()] = -self.largest
        return PackedMatrix(self.pack(codes.to(torch.int8)), scale)


WINT8 = Packing(bits=8, columns=2, period=16)
WINT4 = Packing(bits=4, columns=4, period=32)
