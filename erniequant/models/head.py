"""The end of a model: from the hidden states that leave the last layer to logits."""

from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from erniequant.models.architecture import Architecture, TensorSource

NORM = "model.norm.weight"
"""Name on disk of the weight of the last norm."""


@dataclass(frozen=True, eq=False)
class Head:
    """The last norm and the output embedding.

    Attributes:
        norm: float32 ``[H]``.
        embedding: as it is stored, ``[V, H]``.
        bias: as it is stored, ``[V]``, or None.
        epsilon: of the norm.
    """

    norm: torch.Tensor
    embedding: torch.Tensor
    bias: torch.Tensor | None
    epsilon: float

    def logits(self, hidden: torch.Tensor, norm: torch.Tensor | None = None) -> torch.Tensor:
        """Logits float32 ``[n, V]`` of hidden states float32 ``[n, H]``.

        norm: takes the place of its own, and may have a gradient.
        """
        mean = hidden.square().mean(-1, keepdim=True)
        scaled = hidden * torch.rsqrt(mean + self.epsilon) * (self.norm if norm is None else norm)
        fast = torch.is_autocast_enabled(hidden.device.type)
        weight = self.embedding if fast else self.embedding.float()
        logits = linear(scaled, weight).float()
        return logits if self.bias is None else logits + self.bias.float()


def load_head(source: TensorSource, model: Architecture, device: torch.device) -> Head:
    """The head of a checkpoint."""
    names = set(source.names())
    tied = "model.embed_tokens.weight"
    embedding = tied if model.config.tie_word_embeddings else "lm_head.weight"
    bias = source.tensor("lm_head.bias").to(device) if "lm_head.bias" in names else None
    return Head(
        source.tensor(NORM).float().to(device),
        source.tensor(embedding).to(device),
        bias,
        float(model.config.rms_norm_eps),
    )
