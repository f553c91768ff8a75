"""How the tests here load a model and compare logits."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

# 0 is padding, which generate() would mask.
IDS = torch.randint(3, 128, (2, 19), generator=torch.Generator().manual_seed(3))


def load(folder: Path, **options: Any) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits.float()
