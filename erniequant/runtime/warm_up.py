"""Compile all that a model's experts launch, before the first token is waited for."""

from collections.abc import Hashable, Iterable
from contextlib import nullcontext

import torch

from erniequant.errors import ErnieQuantError
from erniequant.runtime.decoding_module import DecodingExperts

TOKENS = tuple(2**power for power in range(13))
"""Tiles change with the load of an expert, in steps of at least a factor of two."""

_ready: set[Hashable] = set()


def warm_up(
    model: torch.nn.Module, tokens: Iterable[int] = TOKENS, *, top_k: int | None = None
) -> None:
    """Compile and load the kernels of a model's experts for batches of every size.

    Afterwards Triton compiles nothing for a batch of such a size, and the experts can be captured
    in a CUDA graph. Compiling runs on all cores and takes seconds to a minute the first time; what
    Triton keeps on disk is loaded in less. Experts that are not on a GPU are left alone.

    Args:
        model: a model of transformers, or one experts module of it, where it will run.
        tokens: sizes of batches; powers of two meet every kernel up to the largest.
        top_k: experts of a token; by default as the model's config has it.

    Raises:
        ErnieQuantError: a CUDA graph is being captured, or `top_k` is needed and not known.
    """
    kinds = {}
    dtype = getattr(model, "dtype", torch.bfloat16)
    for module in model.modules():
        if isinstance(module, DecodingExperts) and not module.keep_decoded:
            device = next(module.parameters()).device
            if module.launches_kernels(device, dtype):
                stored = tuple((p.shape, p.dtype) for p in module.parameters())
                kinds[device, type(module), str(module), stored] = module
    for (device, *kind), experts in kinds.items():
        chosen = 1 if experts.num_experts == 1 else top_k or _top_k(model)
        new = [n for n in tokens if (device, *kind, dtype, chosen, n) not in _ready]
        if new:
            _compile(experts, device, new, chosen, dtype)
            _ready.update((device, *kind, dtype, chosen, n) for n in new)


def _compile(
    experts: DecodingExperts, device: torch.device, tokens: list[int], top_k: int,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    from erniequant_kernels.launch import compile_all

    def rehearse() -> None:
        for count in tokens:
            experts.rehearse(count, top_k, dtype)

    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        compile_all(rehearse)
        # One token for good: constants of the kernels lie on the device afterwards.
        x = torch.zeros(1, experts.hidden_dim, dtype=dtype, device=device)
        index = torch.arange(top_k, device=device)[None]
        with torch.inference_mode():
            experts.multiply(x, index, index.to(dtype))


def _top_k(model: torch.nn.Module) -> int:
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    for name in ("num_experts_per_tok", "moe_k"):
        found = getattr(text, name, None)
        if isinstance(found, int):
            return found
    raise ErnieQuantError(
        "warm_up cannot tell how many experts a token has: give it the model, or top_k"
    )
