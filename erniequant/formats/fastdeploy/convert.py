"""From tensors of the original to FastDeploy's keys and back: pure functions of one part each.

Ranks get what tensor parallel gives them: of a matrix cut along the outputs, the rank's piece of
every source (gate after gate, then up; queries, keys, values); of one cut along the inputs, a
stretch of inputs. Packing follows cutting, as tiles of the layouts would straddle the cuts.
"""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from erniequant.errors import ErnieQuantError
from erniequant.formats.fastdeploy.names import Matrix, Plain
from erniequant.formats.fastdeploy.packers import WINT4, WINT8

Tensors = Mapping[str, torch.Tensor]


def plain_to_rank(part: Plain, tensor: torch.Tensor | None, rank: int, ranks: int) -> torch.Tensor:
    """The part of an unquantised tensor of the original that a rank stores; None stands for zeros.

    Raises:
        ErnieQuantError: it has another shape than ``part.shape``.
    """
    if tensor is None:
        tensor = torch.zeros(part.shape)
    if tuple(tensor.shape) != part.shape:
        raise ErnieQuantError(
            f"{part.source} has shape {list(tensor.shape)}, expected {list(part.shape)}"
        )
    if part.cut is not None:
        tensor = tensor.chunk(ranks, part.cut)[rank]
    tensor = tensor.to(part.dtype)
    return tensor.T.contiguous() if part.transposed else tensor.contiguous()


def plain_from_ranks(part: Plain, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The original's tensor, in its orientation, from what each rank stores of it.

    Raises:
        ErnieQuantError: ranks that should hold the same do not.
    """
    if part.transposed:
        tensors = [tensor.T for tensor in tensors]
    if part.cut is not None:
        return torch.cat(list(tensors), part.cut).contiguous()
    for rank, tensor in enumerate(tensors):
        if not torch.equal(tensor, tensors[0]):
            raise ErnieQuantError(f"tensor {part.key} of rank{rank} differs from that of rank0")
    return tensors[0].reshape(part.shape).contiguous()


def rank_outputs(part: Matrix, rank: int, ranks: int) -> torch.Tensor:
    """Outputs of the whole matrix that a rank holds, int64, in its order."""
    if part.cut == "inputs":
        return torch.arange(sum(part.outputs))
    pieces, begin = [], 0
    for outputs in part.outputs:
        piece = outputs // ranks
        pieces.append(begin + torch.arange(rank * piece, (rank + 1) * piece))
        begin += outputs
    return torch.cat(pieces)


def rank_inputs(part: Matrix, rank: int, ranks: int) -> slice:
    """Inputs of the whole matrix that a rank holds."""
    if part.cut == "outputs":
        return slice(0, part.inputs)
    piece = part.inputs // ranks
    return slice(rank * piece, (rank + 1) * piece)


def wint8_to_rank(
    part: Matrix, sources: Sequence[torch.Tensor], rank: int, ranks: int
) -> dict[str, torch.Tensor]:
    """A rank's keys, by suffix, of a matrix whose sources ``[n, K]`` are in the original.

    The scale is that of the rank's own inputs: cut along them, an output has one per rank.

    Raises:
        ErnieQuantError: a source has another shape.
    """
    for name, outputs, source in zip(part.sources, part.outputs, sources, strict=True):
        if tuple(source.shape) != (outputs, part.inputs):
            raise ErnieQuantError(
                f"{name} has shape {list(source.shape)}, expected {[outputs, part.inputs]}"
            )
    whole = torch.cat(list(sources))
    weight = whole[rank_outputs(part, rank, ranks), rank_inputs(part, rank, ranks)]
    return WINT8.round(weight.T).tensors()


def encoded_to_rank(
    part: Matrix, encoded: Tensors, rank: int, ranks: int
) -> dict[str, torch.Tensor]:
    """A rank's keys, by suffix, of a matrix that was encoded as a whole.

    Cutting loses nothing: a rank's inputs are whole bytes of WINT2 and of its scales, and wint4 and
    wint8 are packed again from the same codes with the same scales.

    Raises:
        ValueError: a tensor is missing or of another shape or dtype, or one is too many.
    """
    expected = part.keys(1)
    actual = {name: (tuple(t.shape), t.dtype) for name, t in encoded.items()}
    if actual != expected:
        raise ValueError(f"{part.prefix}: encoded tensors are {actual}, expected {expected}")
    if ranks == 1:
        return dict(encoded)
    outputs, inputs = rank_outputs(part, rank, ranks), rank_inputs(part, rank, ranks)
    if part.format != "wint2":
        packing = WINT8 if part.format == "wint8" else WINT4
        codes = packing.unpack(encoded["quant_weight"])[inputs, outputs]
        return {
            "quant_weight": packing.pack(codes),
            "weight_scale": encoded["weight_scale"][outputs].contiguous(),
        }
    cut = {}
    for name, tensor in encoded.items():
        if tensor.dim() == 2:
            per_row = part.inputs // tensor.shape[0]
            tensor = tensor[inputs.start // per_row : inputs.stop // per_row]
        cut[name] = tensor[..., outputs].contiguous()
    return cut


def decode_rank(part: Matrix, tensors: Tensors, k_order: str) -> torch.Tensor:
    """The weights that a rank's keys stand for: float32 ``[N, K]`` of its outputs and inputs.

    k_order: the K order of WINT2, "plain" or "mma64".
    """
    if part.format == "wint2":
        ccq: Any = importlib.import_module("erniequant.ccq")
        decoded = ccq.decode_wint2(
            *(tensors[name] for name in part.keys(1)), k_order=k_order, rounding="exact"
        )
    else:
        packing = WINT8 if part.format == "wint8" else WINT4
        # FastDeploy rounds scales of any other float type as it loads them.
        scale = tensors["weight_scale"].to(torch.bfloat16)
        decoded = packing.dequantize(tensors["quant_weight"], scale)
    return decoded.T


def matrix_from_ranks(
    part: Matrix, ranks: Sequence[Tensors], k_order: str
) -> dict[str, torch.Tensor]:
    """The original's tensors, float32 ``[n, K]``, by name, from the keys of every rank.

    k_order: the K order of WINT2, "plain" or "mma64".
    """
    whole = torch.empty(sum(part.outputs), part.inputs)
    for rank, tensors in enumerate(ranks):
        outputs = rank_outputs(part, rank, len(ranks))
        whole[outputs, rank_inputs(part, rank, len(ranks))] = decode_rank(part, tensors, k_order)
    return dict(zip(part.sources, whole.split(list(part.outputs)), strict=True))
