"""The vision tower and the resampler of a vision-language model: from image patches to embeddings
of image tokens.

Both are transformers' own modules, which compute in float32. The blocks of the tower are read from
the checkpoint one at a time, as they are needed.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe import (
    Ernie4_5_VLMoeVariableResolutionResamplerModel,
    Ernie4_5_VLMoeVisionBlock,
    Ernie4_5_VLMoeVisionTransformerPretrainedModel,
)

from erniequant.models.linear import StoredLinear, store_linears

Shapes = dict[str, tuple[int, ...]]
Reader = Callable[[str], torch.Tensor]
"""Returns the tensor with a name on disk, checked."""

RESAMPLER = "model.resampler_model."
# Layers of the resampler's two sequences, by their name in memory.
_SEQUENCE = {"fc1.": "0.", "fc2.": "2.", "ln.": "3."}


def required_tensors(config: Any, prefix: str) -> Shapes:
    """Shapes of all tensors of the tower, whose names begin with ``prefix``, and the resampler."""
    with torch.device("meta"):
        block, resampler = _block(config), _resampler(config)
    vision = config.vision_config
    width = vision.in_channels * vision.patch_size**2
    shapes: Shapes = {f"{prefix}patch_embed.proj.weight": (vision.hidden_size, width)}
    for index in range(vision.depth):
        for name, parameter in block.state_dict().items():
            shapes[f"{prefix}blocks.{index}.{name}"] = tuple(parameter.shape)
    shapes |= {f"{prefix}ln.{name}": (vision.hidden_size,) for name in ("weight", "bias")}
    for name, parameter in resampler.state_dict().items():
        shapes[_resampler_name(name)] = tuple(parameter.shape)
    return shapes


def embed_images(
    config: Any,
    prefix: str,
    read: Reader,
    patches: torch.Tensor,
    grid: torch.Tensor,
    device: torch.device,
) -> torch.Tensor:
    """Embeddings of image tokens, one after the other in all images.

    Args:
        config: config of the whole model.
        prefix: prefix of the tower's tensors on disk.
        read: source of the tensors.
        patches: float32 ``[P, C * p * p]``.
        grid: int64 ``[images, 3]``: time, height and width of each image in patches.

    Returns:
        float32 ``[P / merge**2, H]``.
    """
    patches, grid = patches.to(device), grid.to(device)
    tower = _tower(config.vision_config, prefix, read, device)
    features = tower(patches, grid).last_hidden_state
    with torch.device("meta"):
        resampler = _resampler(config)
    store_linears(resampler)
    return _loaded(resampler, lambda name: read(_resampler_name(name)), device)(features, grid)


class _Streamed(nn.Module):
    """A block that is made when it is called, and dropped after."""

    def __init__(self, make: Callable[[], nn.Module]):
        super().__init__()
        self._make = make

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._make()(*args, **kwargs)


def _tower(vision: Any, prefix: str, read: Reader, device: torch.device) -> Any:
    # Built without blocks, the tower is small, and its position embeddings are the real ones.
    without = copy.deepcopy(vision)
    without.depth = 0
    without._attn_implementation = "sdpa"
    tower: Any = Ernie4_5_VLMoeVisionTransformerPretrainedModel(without).float()
    _loaded(tower, lambda name: read(f"{prefix}{name}"), device)

    def block(index: int) -> nn.Module:
        with torch.device("meta"):
            made = Ernie4_5_VLMoeVisionBlock(without)
        store_linears(made)
        return _loaded(made, lambda name: read(f"{prefix}blocks.{index}.{name}"), device)

    def maker(index: int) -> Callable[[], nn.Module]:
        return lambda: block(index)

    tower.blocks = nn.ModuleList(_Streamed(maker(index)) for index in range(vision.depth))
    return tower.to(device)


def _loaded(module: Any, read: Reader, device: torch.device) -> Any:
    """A module with its tensors: weights of `StoredLinear` as they are stored, others in
    float32."""
    stored = {f"{n}." for n, m in module.named_modules() if isinstance(m, StoredLinear)}
    state = {}
    for name in module.state_dict():
        tensor = read(name)
        keep = f"{name.rpartition('.')[0]}." in stored
        state[name] = tensor.to(device=device, dtype=tensor.dtype if keep else torch.float32)
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)


def _block(config: Any) -> nn.Module:
    return Ernie4_5_VLMoeVisionBlock(config.vision_config)


def _resampler(config: Any) -> nn.Module:
    return Ernie4_5_VLMoeVariableResolutionResamplerModel(config)


def _resampler_name(name: str) -> str:
    """Name on disk of one of its parameters."""
    head, _, tail = name.partition("_linear.")
    for memory, disk in _SEQUENCE.items():
        if tail.startswith(memory):
            return f"{RESAMPLER}{head}_linear.{disk}{tail.removeprefix(memory)}"
    return RESAMPLER + name
