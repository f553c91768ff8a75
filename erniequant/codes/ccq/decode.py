"""Decoders of CCQ's three formats, in plain torch: the truth that encoder and kernels are tested
against.

Tensors have axes ``[expert..., in, out]`` as in Baidu's checkpoints. Formats: FastDeploy's
``winx_unzip`` and WINT2 kernels (docs/ccq.md), codes: arXiv 2507.07145.
"""

from collections.abc import Sequence

import torch

from erniequant.codes.ccq.codes import WINT2, WINT25, WINT275
from erniequant.codes.ccq.order import check_order, to_natural
from erniequant.codes.reference import decode_words
from erniequant.codes.spec import ConvolutionalCode
from erniequant.errors import ErnieQuantError

GROUP = 64
"""Input rows that share a local scale, in all three formats."""

BYTE_WEIGHTS = 4
"""Weights of one byte of WINT2."""

_WORDS_25, _SCALE_BITS_25 = 10, 0x1FFF
_WORDS_275, _SCALE_BITS_275 = 22, 0xF
_INT32 = torch.iinfo(torch.int32)


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
    """Weights of a WINT2 tensor.

    Args:
        quant_weight: uint8 ``[..., K / 4, N]``, one code of four rows a byte.
        weight_scale: uint8 ``[..., K / 128, N]``: local scales of two groups of 64 rows, the even
            group in the high nibble.
        super_scales: bfloat16 ``[..., N]``.
        code_scale, code_zp: float32 ``[..., N]``.
        k_order: ``plain`` or ``mma64``, see `erniequant.codes.ccq.order`.
        rounding: ``exact``, float32 step by step as in FastDeploy's reference: the word is
            ``floor(byte * code_scale + code_zp + 0.5)``, and no product of a weight rounds.
            ``served``, what FastDeploy's matrix product uses: the word from a fused multiply-add,
            scale and weight each rounded to bfloat16.

    Returns:
        float32 ``[..., K, N]``.

    Raises:
        ErnieQuantError: shapes or types that do not belong together, a ``code_scale`` or
            ``code_zp`` that is not finite, an unknown order or rounding.
    """
    check_order(k_order)
    if rounding not in ("exact", "served"):
        raise ErnieQuantError(f"rounding must be exact or served, not {rounding!r}")
    _check_type("quant_weight", quant_weight, torch.uint8)
    if quant_weight.dim() < 2 or quant_weight.shape[-2] % (2 * GROUP // BYTE_WEIGHTS):
        raise ErnieQuantError(
            f"WINT2 quant_weight must be [..., K / 4, N] with K a multiple of {2 * GROUP}, not "
            f"{list(quant_weight.shape)}"
        )
    *experts, quarter, outputs = quant_weight.shape
    rows = quarter * BYTE_WEIGHTS
    scale_shape = [*experts, rows // (2 * GROUP), outputs]
    _check("weight_scale", weight_scale, torch.uint8, scale_shape)
    _check("super_scales", super_scales, torch.bfloat16, [*experts, outputs])
    _check("code_scale", code_scale, torch.float32, [*experts, outputs])
    _check("code_zp", code_zp, torch.float32, [*experts, outputs])
    words = wint2_words(quant_weight, code_scale, code_zp, fused=rounding == "served")
    labels = decode_words(words, WINT2).transpose(-1, -2).flatten(-3, -2)
    nibbles = torch.stack([weight_scale >> 4, weight_scale & 0xF], -2).flatten(-3, -2)
    if rounding == "exact":
        scale = nibbles.float() * super_scales.float()[..., None, :]
        weight = labels * scale.repeat_interleave(GROUP, -2)
    else:
        scale = nibbles.bfloat16() * super_scales[..., None, :]
        weight = (labels.bfloat16() * scale.repeat_interleave(GROUP, -2)).float()
    return to_natural(weight, k_order)


def wint2_words(
    quant_weight: torch.Tensor, code_scale: torch.Tensor, code_zp: torch.Tensor, *, fused: bool
) -> torch.Tensor:
    """Words whose low 15 bits are the codes of bytes: int32 of the shape of ``quant_weight``.

    Nothing bounds a word to 15 bits: registers are windows of its low ones, so a map may go round.
    Beyond int32 it saturates, as the conversion of a GPU does.

    Raises:
        ErnieQuantError: a parameter that is not finite.
    """
    if not bool(torch.isfinite(code_scale).all() and torch.isfinite(code_zp).all()):
        raise ErnieQuantError("WINT2 code_scale and code_zp must be finite")
    byte, scale, zero = quant_weight.float(), code_scale[..., None, :], code_zp[..., None, :]
    # Every step rounds to float32 on its own; a compiler must not contract them.
    value = _fused_multiply_add(byte, scale, zero + 0.5) if fused else byte * scale + zero + 0.5
    return value.floor_().double().clamp_(_INT32.min, _INT32.max).to(torch.int32)


def _fused_multiply_add(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """``a * b + c`` in float32 with one rounding, for ``a`` of at most 8 significant bits.

    The product is exact in float64. Their sum is rounded to odd there, after which rounding to
    float32 is right (Boldo and Melquiond, 2008).
    """
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    back = total - product
    lost = (product - (total - back)) + (addend - back)
    even = (total.view(torch.int64) & 1) == 0
    toward = torch.where(lost > 0, torch.inf, -torch.inf).to(total.dtype)
    odd = torch.where((lost != 0) & even, torch.nextafter(total, toward), total)
    return odd.float()


def decode_wint25(quant_weight: torch.Tensor, super_scales: torch.Tensor) -> torch.Tensor:
    """Weights of a WINT2.5 tensor.

    Args:
        quant_weight: uint16, or int16 with the same bits, ``[..., 10 * K / 64, N]``: ten words for
            64 rows, seven rows a word. Of the last word the highest three bits are row 63, the low
            13 bits the local scale.
        super_scales: bfloat16 ``[..., N]``.

    Returns:
        float32 ``[..., K, N]``; no product rounds.

    Raises:
        ErnieQuantError: shapes or types that do not belong together.
    """
    if quant_weight.dtype not in (torch.int16, torch.uint16):
        raise ErnieQuantError(
            f"WINT2.5 quant_weight must be uint16 or int16, not {_name(quant_weight.dtype)}"
        )
    words = quant_weight.view(torch.int16).to(torch.int32)
    return _decode_plain(words, super_scales, WINT25, _WORDS_25, _SCALE_BITS_25)


def decode_wint275(quant_weight: torch.Tensor, super_scales: torch.Tensor) -> torch.Tensor:
    """Weights of a WINT2.75 tensor.

    Args:
        quant_weight: uint8 ``[..., 22 * K / 64, N]``: 22 bytes for 64 rows, three rows a byte. Of
            the last byte the high nibble is row 63, the low nibble the local scale.
        super_scales: bfloat16 ``[..., N]``.

    Returns:
        float32 ``[..., K, N]``; no product rounds.

    Raises:
        ErnieQuantError: shapes or types that do not belong together.
    """
    _check_type("quant_weight", quant_weight, torch.uint8)
    words = quant_weight.to(torch.int32)
    return _decode_plain(words, super_scales, WINT275, _WORDS_275, _SCALE_BITS_275)


def _decode_plain(
    words: torch.Tensor,
    super_scales: torch.Tensor,
    code: ConvolutionalCode,
    per_group: int,
    scale_bits: int,
) -> torch.Tensor:
    """Words int32 ``[..., K / 64 * per_group, N]`` whose last of a group holds the scale."""
    if words.dim() < 2 or words.shape[-2] % per_group:
        raise ErnieQuantError(
            f"{code.name.upper()} quant_weight must be [..., K / {GROUP} * {per_group}, N], not "
            f"{list(words.shape)}"
        )
    *experts, _, outputs = words.shape
    _check("super_scales", super_scales, torch.bfloat16, [*experts, outputs])
    groups = words.unflatten(-2, (-1, per_group))
    labels = decode_words(groups, code).transpose(-1, -2).flatten(-3, -2)[..., :GROUP, :]
    local = (groups[..., -1:, :] & scale_bits).float()
    scale = local * super_scales.float()[..., None, None, :]
    return (labels * scale).flatten(-3, -2)


def _check(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: Sequence[int]) -> None:
    _check_type(name, tensor, dtype)
    if list(tensor.shape) != list(shape):
        raise ErnieQuantError(f"{name} must be {list(shape)}, not {list(tensor.shape)}")


def _check_type(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise ErnieQuantError(f"{name} must be {_name(dtype)}, not {_name(tensor.dtype)}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
