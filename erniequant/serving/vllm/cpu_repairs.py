"""Repairs of vLLM 0.32 for ERNIE 4.5 on CPUs; on GPUs nothing is touched.

Each has a test that fails once vLLM no longer needs it.
"""

import sys
from functools import wraps
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.layers.rotary_embedding.ernie45_vl_rope import Ernie4_5_VLRotaryEmbedding
from vllm.platforms import current_platform
from vllm.triton_utils import dispatcher

_REPAIRED = "_erniequant"


def apply() -> None:
    """Calling it again does nothing."""
    if not current_platform.is_cpu() or hasattr(CPURouter._compute_routing, _REPAIRED):
        return
    CPURouter._compute_routing = _with_correction_bias(CPURouter._compute_routing)
    dispatcher._rebind_kernels = _without_llvmlite(dispatcher._rebind_kernels)
    if "forward_cpu" not in vars(Ernie4_5_VLRotaryEmbedding):
        Ernie4_5_VLRotaryEmbedding.forward_cpu = rotate


def _with_correction_bias(original: Any) -> Any:
    """`CPURouter` ignores the correction bias where softmax routers have no groups: experts are
    chosen by score plus bias, and weighted by score (as vLLM itself does on GPUs)."""

    @wraps(original)
    def compute(
        self: Any, hidden_states: torch.Tensor, router_logits: torch.Tensor, *args: Any, **kw: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        bias = self.e_score_correction_bias
        if (
            bias is None
            or self.scoring_func != "softmax"
            or self.use_grouped_topk
            or self.custom_routing_function is not None
        ):
            return original(self, hidden_states, router_logits, *args, **kw)
        scores = torch.softmax(router_logits.float(), dim=-1)
        chosen = torch.topk(scores + bias, self.top_k, dim=-1)[1]
        weights = scores.gather(1, chosen)
        if self.renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights * self.routed_scaling_factor, chosen.to(torch.int32)

    setattr(compute, _REPAIRED, True)
    return compute


def _without_llvmlite(original: Any) -> Any:
    """A starting worker reads the attributes of everything in every loaded module. llvmlite has an
    object without any, which stops an engine in a process that has multiplied packed weights."""

    @wraps(original)
    def rebind(*args: Any) -> None:
        name = "llvmlite.binding.ffi"
        hidden = sys.modules.pop(name, None)
        try:
            original(*args)
        finally:
            if hidden is not None:
                sys.modules[name] = hidden

    return rebind


def rotate(
    self: Any, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """`Ernie4_5_VLRotaryEmbedding` inherits a `forward_cpu` that passes its `forward_native` an
    argument too many."""
    return self.forward_native(positions, query, key)
