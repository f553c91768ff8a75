"""Check, from headers, that a folder has the tensors that FastDeploy's loader asks for.

FastDeploy pops keys from a dictionary and sets parameters whose shape and dtype are already fixed:
a tensor that is missing or of another kind ends its start after minutes; tensors left over it never
mentions.
"""

from collections.abc import Collection, Iterator, Mapping

import torch

from erniequant.checkpoint.reader import TensorHeader
from erniequant.formats.fastdeploy.names import Plain, parts_of, rank_keys
from erniequant.formats.fastdeploy.sizes import FastDeployModel
from erniequant.packing.schema import TensorInfo

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
# A speculative head, which FastDeploy loads as a model of its own.
_MTP = "ernie.mtp_"


def check_keys(headers: Mapping[str, TensorHeader], model: FastDeployModel) -> tuple[str, ...]:
    """Every deviation of one rank's tensors from what we write, one line each.

    Every key is there once, of exactly the shape and dtype that the loader's parameters have, and
    nothing else is.
    """
    return tuple(_problems(headers, rank_keys(model), (), ()))


def check_readable(headers: Mapping[str, TensorHeader], model: FastDeployModel) -> tuple[str, ...]:
    """Everything that keeps the tensors of one rank from being read, one line each.

    Like `check_keys`, but allows what the loader accepts in files by others: any float type where
    it converts (what is not quantised, and scales of wint8), no correction bias, one of shape
    ``[E]``, and the tensors of a speculative head.
    """
    converted, optional = set(), set()
    for part in parts_of(model):
        if isinstance(part, Plain):
            converted.add(part.key)
            optional |= {part.key} if part.optional else set()
        elif part.format == "wint8":
            converted.add(f"{part.prefix}.weight_scale")
    without_mtp = {name: header for name, header in headers.items() if not name.startswith(_MTP)}
    return tuple(_problems(without_mtp, rank_keys(model), optional, converted))


def _problems(
    headers: Mapping[str, TensorHeader],
    expected: Mapping[str, TensorInfo],
    optional: Collection[str],
    converted: Collection[str],
) -> Iterator[str]:
    for name, (shape, dtype) in expected.items():
        header = headers.get(name)
        if header is None:
            if name not in optional:
                yield f"tensor {name} is missing"
            continue
        if header.dtype != dtype and not (name in converted and header.dtype in _FLOATS):
            wanted = str(dtype).removeprefix("torch.")
            yield f"tensor {name} has dtype {header.stored_dtype}, expected {wanted}"
        shapes = {shape, shape[1:]} if name in optional else {shape}
        if header.shape not in shapes:
            yield f"tensor {name} has shape {list(header.shape)}, expected {list(shape)}"
    for name in headers:
        if name not in expected:
            yield f"tensor {name} is not one that FastDeploy asks for"
