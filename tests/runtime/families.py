"""The three families of models with packed experts, and inputs for each."""

from pathlib import Path
from typing import Any

import torch

from tests.micro_vl import IMAGE, IMAGE_END, IMAGE_START, PATCH

FAMILIES = {"text": "packed_ernie", "vision-language": "packed_vl", "dense": "packed_dense"}
"""The fixture with the packed micro model of each."""

# 0 is padding. A prime number of tokens fills no tile.
_IDS = torch.randint(3, 90, (2, 17), generator=torch.Generator().manual_seed(3))


def inputs(family: str) -> dict[str, torch.Tensor]:
    """A batch for a model of the family; with one image in each row where it takes any."""
    if family != "vision-language":
        return {"input_ids": _IDS}
    # 4 x 8 patches are 2 x 4 tokens.
    image = torch.tensor([IMAGE_START, *[IMAGE] * 8, IMAGE_END]).expand(2, -1)
    ids = torch.cat([_IDS[:, :5], image, _IDS[:, 5:]], dim=1)
    generator = torch.Generator().manual_seed(4)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(2 * 32, 3 * PATCH**2, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 8]] * 2),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "moe_mm_token_type_ids": ((ids >= IMAGE) & (ids <= IMAGE_END)).int(),
    }


def from_pretrained(folder: Path, **options: Any) -> Any:
    """The model as a user of transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options)
