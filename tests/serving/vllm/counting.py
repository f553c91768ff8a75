"""Bytes that a rank holds. vLLM sends these functions to its workers by name."""

import gc
from typing import Any


def expert_bytes(model: Any) -> dict[str, int]:
    """Bytes of the packed parameters of one rank, by layer; under "other" of anything else in these
    modules."""
    found = {"other": 0}
    for path, module in model.named_modules():
        if not hasattr(module, "gate_up_proj_packed"):
            continue
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            packed = name.startswith(("gate_up_proj_", "down_proj_"))
            key = path if packed else "other"
            found[key] = found.get(key, 0) + tensor.numel() * tensor.itemsize
    return found


def float_bytes(model: Any) -> int:
    """Bytes of all float tensors of the process that Python knows of."""
    import torch

    gc.unfreeze()  # vLLM has hidden what it loaded
    gc.collect()
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in gc.get_objects()
        if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.is_floating_point()
        and tensor.layout == torch.strided
    }  # fmt: skip
    return sum(storages.values())
