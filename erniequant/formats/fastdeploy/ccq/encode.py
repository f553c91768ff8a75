"""The WINT2 encoder: scales from a dry run, a race of code books under error feedback, then
coordinate descent.

Outputs do not share a byte, a scale or a code book, so they are encoded independently, some at a
time. docs/ccq.md says what each part is worth.
"""

from dataclasses import dataclass

import torch

from erniequant.codes.ccq.decode import BYTE_WEIGHTS, GROUP, decode_wint2
from erniequant.codes.ccq.order import check_order, stored_rows
from erniequant.encoding.hessian import ROW_BLOCK, all_finite
from erniequant.errors import ErnieQuantError
from erniequant.formats.fastdeploy.ccq.books import BOOKS, Book, book_labels
from erniequant.formats.fastdeploy.ccq.candidates import Candidates, Plan, dry_run, race
from erniequant.formats.fastdeploy.ccq.factor import (
    diagonal_blocks,
    encoding_order,
    factorise_blocks,
    roots,
)
from erniequant.formats.fastdeploy.ccq.search import improve_group

CHUNK = 128
"""Outputs encoded together; each has as many rows of errors as there are code books."""

DRY_TRIES, TRIES = 3, 3
"""Nibbles that a group tries in the dry run and afterwards."""

SWEEPS = 4
"""Rounds of coordinate descent; on correlated inputs each of the first four gains 1 to 4 %."""

_MOST_NIBBLES = torch.linspace(8.0, 15.4, 32)
_SMALLEST_UNIT = torch.finfo(torch.bfloat16).tiny
_LARGEST_WEIGHT = torch.finfo(torch.bfloat16).max / 4


Stored = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""``quant_weight``, ``weight_scale``, ``super_scales``, ``code_scale``, ``code_zp``."""


@dataclass(frozen=True)
class Settings:
    """Settings of the encoder; values other than the defaults are for comparison."""

    books: tuple[Book, ...] = BOOKS
    dry_tries: int = DRY_TRIES
    tries: int = TRIES
    sweeps: int = SWEEPS
    feedback: bool = True


@dataclass(frozen=True, eq=False)
class EncodedWint2:
    """A WINT2 matrix and its error.

    Attributes:
        quant_weight: uint8 ``[K / 4, N]``.
        weight_scale: uint8 ``[K / 128, N]``.
        super_scales: bfloat16 ``[N]``.
        code_scale, code_zp: float32 ``[N]``.
        effective: float32 ``[N, K]``: the weights that these stand for, to the last bit.
        error: ``tr(E H E^T) / tr(W H W^T)``, with the identity where the Hessian is not finite or
            has no energy; 0 for a zero matrix.
        damping: damping of the Hessian, as a fraction of the mean energy of ordinary inputs.
        fallback: the reason why there was no feedback, or None.
    """

    quant_weight: torch.Tensor
    weight_scale: torch.Tensor
    super_scales: torch.Tensor
    code_scale: torch.Tensor
    code_zp: torch.Tensor
    effective: torch.Tensor
    error: float
    damping: float
    fallback: str | None

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of a checkpoint, by name."""
        names = ("quant_weight", "weight_scale", "super_scales", "code_scale", "code_zp")
        return {name: getattr(self, name) for name in names}


def encode_wint2(
    weight: torch.Tensor, hessian: torch.Tensor | None = None, *, k_order: str = "plain"
) -> dict[str, torch.Tensor]:
    """Encode one matrix as WINT2.

    Args:
        weight: ``[K, N]``, any floating type.
        hessian: ``[K, K]``, second moments of the inputs; None for the identity.
        k_order: ``plain`` or ``mma64``, see `erniequant.codes.ccq.order`.

    Returns:
        ``quant_weight``, ``weight_scale``, ``super_scales``, ``code_scale`` and ``code_zp`` as
        `decode_wint2` takes them.

    Raises:
        ErnieQuantError: as `encode_matrix`.
    """
    if weight.dim() != 2:
        raise ErnieQuantError(f"WINT2 encodes one matrix, not a tensor {list(weight.shape)}")
    moments = torch.eye(weight.shape[0]) if hessian is None else hessian
    return encode_matrix(weight.T, moments, k_order=k_order).tensors()


def encode_matrix(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    importance: torch.Tensor | None = None,
    k_order: str = "plain",
    settings: Settings | None = None,
) -> EncodedWint2:
    """Encode the weight of a linear layer as WINT2.

    Deterministic; one thread besides those of torch's products. Memory beside the inputs: three
    copies of the Hessian in float64, two of the weights, and the errors of `CHUNK` outputs per code
    book.

    Args:
        weight: ``[N, K]`` as in ``nn.Linear``, any floating type; ``K`` a multiple of 128.
        hessian: ``[K, K]``, second moments of the inputs; not changed.
        importance: ``[N]``, how much the error of each output counts. Outputs share nothing, so
            there is no error to shift between them, and this changes nothing.
        k_order: ``plain`` or ``mma64``, see `erniequant.codes.ccq.order`.
        settings: for comparisons.

    Raises:
        ErnieQuantError: shapes or types that do not belong together, weights that are not finite or
            that bfloat16 cannot hold, an unknown order.
    """
    _check(weight, hessian, importance, k_order)
    settings = settings or Settings()
    weight = weight.float()
    order = encoding_order(hessian.diagonal(), k_order)
    moments = hessian.float()[order][:, order]
    mean = float(moments.diagonal().double().mean())
    usable = 0 < mean < torch.inf
    if usable:
        # Losses are sums of squares in float32: keep them far from its limits.
        moments /= mean
    factor = factorise_blocks(moments)
    if not settings.feedback:
        factor.feedback.zero_().fill_diagonal_(1)
    plan = Plan.of(factor, settings.books)
    if factor.fallback is None:
        moments.diagonal().add_(factor.ridge)
    else:
        moments = torch.block_diag(*factor.local).float()
    parts = [
        _encode_outputs(weight[start : start + CHUNK, order], moments, plan, settings)
        for start in range(0, len(weight), CHUNK)
    ]
    codes, nibbles, unit, book = (torch.cat(part) for part in zip(*parts, strict=True))
    tensors = _stored(codes, nibbles, unit, book, order, k_order, settings.books)
    effective = _decode_by_outputs(tensors, k_order)
    measure = hessian.float() / mean if usable else torch.eye(weight.shape[1])
    error = relative_error(weight, effective, measure)
    return EncodedWint2(*tensors, effective, error, factor.damping, factor.fallback)


def _check(
    weight: torch.Tensor, hessian: torch.Tensor, importance: torch.Tensor | None, k_order: str
) -> None:
    check_order(k_order)
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ErnieQuantError("WINT2 encodes one matrix of floating point weights")
    outputs, inputs = weight.shape
    if outputs == 0 or inputs == 0 or inputs % (2 * GROUP):
        raise ErnieQuantError(
            f"WINT2 needs outputs, and inputs by {2 * GROUP}; the matrix has {outputs} outputs and "
            f"{inputs} inputs"
        )
    if list(hessian.shape) != [inputs, inputs] or not hessian.is_floating_point():
        raise ErnieQuantError(
            f"the Hessian must be floating point [{inputs}, {inputs}], not {list(hessian.shape)}"
        )
    if importance is not None and list(importance.shape) != [outputs]:
        raise ErnieQuantError(f"importance must be [{outputs}], not {list(importance.shape)}")
    if not all_finite(weight):
        raise ErnieQuantError("the weights are not all finite")
    if float(weight.abs().max()) > _LARGEST_WEIGHT:
        raise ErnieQuantError(
            f"weights above {_LARGEST_WEIGHT:.2g} have no scale in bfloat16; the largest is "
            f"{float(weight.abs().max()):.2g}"
        )


def _encode_outputs(
    weight: torch.Tensor, moments: torch.Tensor, plan: Plan, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, nibbles, scale of nibble 1 and code book of some outputs ``[n, K]``, all in encoding
    order."""
    # Powers of two, so nothing rounds: outputs of any size are treated alike.
    size = torch.exp2(torch.frexp(weight.abs().amax(1))[1].float())
    weight = weight / size[:, None]
    dry = dry_run(plan, weight, settings.dry_tries)
    unit = _bfloat16_scale(common_unit(dry.scales), size)
    best = race(plan, weight, unit, dry.losses, settings.tries)
    for _ in range(settings.sweeps):
        _improve(best, weight, unit, moments, plan)
        unit = _refit(best, weight, unit, moments, size)
    if not settings.sweeps:
        unit = _refit(best, weight, unit, moments, size)
    return best.codes, best.nibbles, unit * size, best.book


def _bfloat16_scale(unit: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """The unit as the file holds it, back in the scale of the search; 0 for what would be
    subnormal, which processors and kernels treat differently."""
    stored = (unit * size).bfloat16().float()
    return torch.where(stored >= _SMALLEST_UNIT, stored / size, 0.0)


def common_unit(scales: torch.Tensor) -> torch.Tensor:
    """The scale of nibble 1 whose multiples up to 15 are nearest to the scales of all groups.

    Args:
        scales: ``[n, groups]``, not negative.

    Returns:
        float32 ``[n]``: of units that put the largest scale at nibble 8 to 15.4, the one with the
        least squared logarithm of stored over wanted scale; 0 where all scales are.
    """
    largest = scales.amax(1)
    best, least = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
    tiny = torch.finfo(torch.float32).tiny
    for most in _MOST_NIBBLES.tolist():
        unit = largest / most
        nibbles = (scales / unit[:, None]).nan_to_num_(0).round_().clamp_(1, 15)
        missed = (scales.clamp_min(tiny) / (nibbles * unit[:, None]).clamp_min(tiny)).log_()
        cost = torch.where(scales > 0, missed, 0.0).square_().sum(1)
        best = torch.where(cost < least, unit, best)
        least = torch.minimum(cost, least)
    return best


def _improve(
    best: Candidates, weight: torch.Tensor, unit: torch.Tensor, moments: torch.Tensor, plan: Plan
) -> None:
    """One round of coordinate descent over all bytes and nibbles; updates ``best``."""
    for start in range(weight.shape[1] - GROUP, -1, -GROUP):
        rows = slice(start, start + GROUP)
        blocks = slice(start // BYTE_WEIGHTS, (start + GROUP) // BYTE_WEIGHTS)
        own = moments[rows, rows].contiguous()
        forms = diagonal_blocks(own).double()
        metric = roots(forms)
        codes = best.codes[:, blocks].contiguous()
        nibbles = best.nibbles[:, start // GROUP].contiguous()
        error = best.error[:, rows].contiguous()
        improve_group(
            weight[:, rows].contiguous().numpy(),
            (best.error @ moments[:, rows]).numpy(),
            own.numpy(),
            metric.numpy(),
            torch.linalg.inv(forms).float().contiguous().numpy(),
            plan.points(metric),
            book_labels(plan.books),
            best.book.numpy(),
            unit.numpy(),
            codes.numpy(),
            nibbles.numpy(),
            error.numpy(),
        )
        best.nibbles[:, start // GROUP] = nibbles
        best.codes[:, blocks] = codes
        best.error[:, rows] = error


def _refit(
    best: Candidates,
    weight: torch.Tensor,
    unit: torch.Tensor,
    moments: torch.Tensor,
    size: torch.Tensor,
) -> torch.Tensor:
    """The least-squares unit of each output given its codes and nibbles, ``(q^T H w) / (q^T H q)``
    times the present one; updates the errors of ``best``."""
    value = weight - best.error
    of_value = value @ moments
    fitted = (of_value * weight).sum(1, dtype=torch.float64) / (of_value * value).sum(
        1, dtype=torch.float64
    )
    usable = torch.isfinite(fitted) & (fitted > 0.5) & (fitted < 2)
    new = _bfloat16_scale(torch.where(usable, fitted, 1.0).float() * unit, size)
    ratio = torch.where(unit > 0, new / unit, 0.0)
    best.error = weight - value * ratio[:, None]
    return new


def _stored(
    codes: torch.Tensor,
    nibbles: torch.Tensor,
    unit: torch.Tensor,
    book: torch.Tensor,
    order: torch.Tensor,
    k_order: str,
    books: tuple[Book, ...],
) -> Stored:
    """The tensors of a checkpoint, in the order of `EncodedWint2`, from what is in encoding
    order."""
    groups = order[::GROUP] // GROUP
    by_group = torch.empty_like(nibbles)
    by_group[:, groups] = nibbles
    position = torch.empty_like(order)
    position[stored_rows(len(order), k_order)] = torch.arange(len(order))
    by_byte = torch.empty_like(codes)
    by_byte[:, position[order[::BYTE_WEIGHTS]] // BYTE_WEIGHTS] = codes
    chosen = torch.tensor(books, dtype=torch.float32)[book]
    return (
        by_byte.T.contiguous(),
        (by_group[:, 0::2] << 4 | by_group[:, 1::2]).T.contiguous(),
        unit.bfloat16(),
        chosen[:, 0].contiguous(),
        chosen[:, 1].contiguous(),
    )


def _decode_by_outputs(tensors: Stored, k_order: str) -> torch.Tensor:
    """`decode_wint2`, ``[N, K]``; some outputs at a time, since decoding takes six times the
    space of its result."""
    inputs, outputs = BYTE_WEIGHTS * tensors[0].shape[0], tensors[0].shape[1]
    decoded = torch.empty(outputs, inputs)
    for start in range(0, outputs, ROW_BLOCK):
        part = slice(start, start + ROW_BLOCK)
        decoded[part] = decode_wint2(*(tensor[..., part] for tensor in tensors), k_order=k_order).T
    return decoded


def relative_error(weight: torch.Tensor, found: torch.Tensor, hessian: torch.Tensor) -> float:
    """``tr(E H E^T) / tr(W H W^T)`` of float32 ``[N, K]``; 0 for a zero matrix. By rows, so that
    nothing as large as the matrix is needed."""
    loss = energy = 0.0
    size = torch.exp2(torch.frexp(weight.abs().max())[1].float())
    for rows, decoded in zip(weight.split(ROW_BLOCK), found.split(ROW_BLOCK), strict=True):
        w = rows / size
        e = w - decoded / size
        loss += float(((e @ hessian) * e).sum(dtype=torch.float64))
        energy += float(((w @ hessian) * w).sum(dtype=torch.float64))
    return max(loss, 0.0) / energy if energy > 0 else 0.0
