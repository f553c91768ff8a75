"""vLLM says about vision-language checkpoints what transformers says, given images and without."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import erniequant
from erniequant.data.image_inputs import image_inputs
from erniequant.data.inputs import ModelInput
from erniequant.errors import ErnieQuantError
from erniequant.serving.checkpoints import require_servable
from erniequant_data import tiny_vl_model_dir
from tests.micro_vl import write_image
from tests.serving.vllm.conftest import edited
from tests.serving.vllm.harness import PROMPTS, TOLERANCE, case, distance, run_engines

SIZES = ((64, 40), (40, 90), (200, 150))
"""Wide, tall, and larger than images may be, which leaves 48 tokens."""
QUESTIONS = {
    "one": ((0,), "What is this?"), "two": ((1, 2), "Compare: red?"), "large": ((2,), "Where?")
}  # fmt: skip
NAMES = ("text", "one", "short", "two")
"""Of the prompts of a batch; "large" is asked alone."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("pictures")
    return [write_image(root / f"{i}.png", *size, seed=i) for i, size in enumerate(SIZES)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny model, its sets of experts at 2 bits, and that as transformers saves it."""
    root = tmp_path_factory.mktemp("vl")
    plain, packed = tiny_vl_model_dir(), root / "packed"
    erniequant.quantize(plain, packed, bits=2, no_calib=True, max_tp=2, effort="fast")

    def moved(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("vision_model.")]:
            tensors[f"model.{name}"] = tensors.pop(name)

    return {"plain": plain, "packed": packed, "saved": edited(packed, root / "saved", moved)}


@pytest.fixture(scope="module")
def models(checkpoints: dict[str, Path]) -> Callable[[str], tuple[Any, Any]]:
    """Model and tokenizer of a name in transformers, in float32."""
    loaded: dict[str, tuple[Any, Any]] = {}

    def load(name: str) -> tuple[Any, Any]:
        name = "packed" if name == "saved" else name  # the same weights
        if name not in loaded:
            loaded[name] = erniequant.load(checkpoints[name], dtype=torch.float32)
        return loaded[name]

    return load


@pytest.fixture(scope="module")
def inputs(models: Callable[[str], tuple[Any, Any]], pictures: list[Path]) -> dict[str, ModelInput]:
    """Prompts with images as erniequant makes them."""
    model, tokenizer = models("packed")
    return {
        name: image_inputs(model, tokenizer, text, [pictures[i] for i in numbers])
        for name, (numbers, text) in QUESTIONS.items()
    }


@pytest.fixture(scope="module")
def asked(inputs: dict[str, ModelInput], pictures: list[Path]) -> dict[str, Any]:
    """The questions for vLLM, in which one image token stands for an image."""

    def with_images(name: str) -> dict[str, Any]:
        entry, (numbers, _) = inputs[name], QUESTIONS[name]
        assert entry.placeholder is not None
        repeated = entry.placeholder & entry.placeholder.roll(1)
        paths = [str(pictures[i]) for i in numbers]
        return {"prompt_token_ids": entry.ids[~repeated].tolist(), "images": paths}

    return {name: with_images(name) for name in QUESTIONS}


@pytest.fixture(scope="module")
def prompts(asked: dict[str, Any]) -> list[Any]:
    """Text and images mixed in a batch."""
    return [PROMPTS[0], asked["one"], PROMPTS[1], asked["two"]]


def vl_case(name: str, folder: Path, prompts: list[Any], **more: Any) -> dict[str, Any]:
    # Every case has prompts of its own, as the engine's program empties them of paths.
    copies = [dict(p) if isinstance(p, dict) else p for p in prompts]
    settings = {"max_model_len": 256, "limit_mm_per_prompt": {"image": 2}, **more}
    return case(name, folder, prompts=copies, **settings)


@pytest.fixture(scope="module")
def one_rank_vl(
    checkpoints: dict[str, Path], prompts: list[Any], asked: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:  # fmt: skip
    runs = [vl_case(name, folder, prompts) for name, folder in checkpoints.items()]
    compiled = vl_case("compiled", checkpoints["packed"], prompts, eager=False)
    # A step of 48 tokens ends before an image of 48, after the token that announces it.
    cut = vl_case(
        "cut", checkpoints["packed"], [asked["large"]], disable_chunked_mm_input=True,
        max_num_batched_tokens=48, max_num_seqs=1, enable_prefix_caching=False,
    )  # fmt: skip
    return run_engines(tmp_path_factory.mktemp("vl_one"), *runs, compiled, cut)


@pytest.fixture(scope="module")
def two_ranks_vl(
    checkpoints: dict[str, Path], prompts: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    run = vl_case("packed", checkpoints["packed"], prompts, ranks=2)
    return run_engines(tmp_path_factory.mktemp("vl_two"), run)


def agrees(said: dict[str, Any], model: Any, entry: ModelInput | None) -> None:
    """Tokens, log-probabilities and, with images, the prompt with all its image tokens."""
    assert len(said["tokens"]) == 16
    generated = len(said["tokens"]) - 1
    more: dict[str, torch.Tensor] = {}
    if entry is not None:
        assert said["prompt"] == entry.ids.tolist()
        more = entry.batch()
        del more["input_ids"], more["attention_mask"]
        for name in ("mm_token_type_ids", "moe_mm_token_type_ids"):
            more[name] = torch.nn.functional.pad(more[name], (0, generated))
    assert distance(said, model, **more) <= TOLERANCE


@pytest.mark.parametrize("number", range(4), ids=NAMES)
@pytest.mark.parametrize("name", ["plain", "packed", "saved", "compiled"])
def test_one_rank(
    name: str, number: int, one_rank_vl: dict[str, Any], inputs: dict[str, ModelInput],
    models: Callable[[str], tuple[Any, Any]],
) -> None:  # fmt: skip
    model = models("packed" if name == "compiled" else name)[0]
    agrees(one_rank_vl[name]["said"][number], model, inputs.get(NAMES[number]))


@pytest.mark.parametrize("number", range(4), ids=NAMES)
def test_two_ranks(
    number: int, two_ranks_vl: dict[str, Any], inputs: dict[str, ModelInput],
    models: Callable[[str], tuple[Any, Any]],
) -> None:  # fmt: skip
    agrees(two_ranks_vl["packed"]["said"][number], models("packed")[0], inputs.get(NAMES[number]))


def test_tokens_around_an_image_go_to_the_vision_experts_in_a_step_of_their_own(
    one_rank_vl: dict[str, Any], inputs: dict[str, ModelInput],
    models: Callable[[str], tuple[Any, Any]],
) -> None:  # fmt: skip
    entry = inputs["large"]
    assert entry.placeholder is not None
    before, image = int(entry.placeholder.int().argmax()), int(entry.placeholder.sum())
    assert before < 48 == image
    agrees(one_rank_vl["cut"]["said"][0], models("packed")[0], entry)


def test_a_tensor_that_is_missing_or_left_over_is_named_before_weights_are_read(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    def without(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
        def remove(tensors: dict[str, torch.Tensor]) -> None:
            del tensors[name]

        return remove

    def doubled(tensors: dict[str, torch.Tensor]) -> None:
        tensors["vision_model.more"] = torch.zeros(1)

    assert require_servable(checkpoints["packed"]) is not None
    for name in ("vision_model.ln.weight", "model.resampler_model.mlp.bias",
                 "model.layers.2.mlp.vision_moe.experts.down_proj_scale",
                 "model.layers.2.mlp.gate.weight_1"):  # fmt: skip
        folder = edited(checkpoints["packed"], tmp_path / "broken", without(name))
        with pytest.raises(ErnieQuantError, match=f"{name} is missing"):
            require_servable(folder)
        shutil.rmtree(folder)
    with pytest.raises(ErnieQuantError, match="vision_model.more is not part of"):
        require_servable(edited(checkpoints["packed"], tmp_path / "broken", doubled))


def test_vllm_still_rotates_no_positions_of_images_on_cpus() -> None:
    """When this fails, `cpu_repairs` can leave `Ernie4_5_VLRotaryEmbedding` alone."""
    from vllm.model_executor.layers.rotary_embedding.ernie45_vl_rope import (
        Ernie4_5_VLRotaryEmbedding,
    )

    from erniequant.serving.vllm import cpu_repairs, register

    register()
    assert Ernie4_5_VLRotaryEmbedding.forward_cpu is cpu_repairs.rotate
    inherited = super(Ernie4_5_VLRotaryEmbedding, Ernie4_5_VLRotaryEmbedding).forward_cpu
    alone = SimpleNamespace(forward_native=lambda positions, query, key=None: (query, key))
    zeros = torch.zeros(1)
    assert cpu_repairs.rotate(alone, zeros, zeros, zeros) == (zeros, zeros)
    with pytest.raises(TypeError):
        inherited(alone, zeros, zeros, zeros)
