"""Images in a chat, from the side of the openai client: the server's answers are those of
transformers to the same words and images."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

import erniequant
from erniequant.data.image_inputs import image_inputs
from erniequant_data import tiny_vl_model_dir
from tests.micro_vl import write_image
from tests.serving.vllm.server import KEY, Server, serving


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    packed = tmp_path_factory.mktemp("vl_server") / "vl-2bit"
    erniequant.quantize(tiny_vl_model_dir(), packed, bits=2, no_calib=True, effort="fast")
    return packed


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    options = ("--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "4")
    with serving(folder, folder.parent / "home", "--", *options, "--enforce-eager") as started:
        yield started


def ask(server: Server, text: str, *images: bytes) -> Any:
    """The answer to images and then text, in one message."""
    urls = ["data:image/png;base64," + base64.b64encode(image).decode() for image in images]
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    messages: Any = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
    client = openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0, timeout=120)
    return client.chat.completions.create(
        model=server.name, messages=messages, max_tokens=12, temperature=0,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )  # fmt: skip


@pytest.mark.parametrize("sizes", [[(64, 40)], [(40, 90), (200, 150)]])
def test_chats_with_images(
    sizes: list[tuple[int, int]], server: Server, folder: Path, tmp_path: Path
) -> None:
    paths = [write_image(tmp_path / f"{i}.png", *size, seed=i) for i, size in enumerate(sizes)]
    model, tokenizer = erniequant.load(folder, dtype=torch.float32)
    entry = image_inputs(model, tokenizer, "What is this?", paths)
    answer = ask(server, "What is this?", *(path.read_bytes() for path in paths))
    assert answer.prompt_token_ids == entry.ids.tolist()
    said = model.generate(
        **entry.batch(), max_new_tokens=12, min_new_tokens=12, do_sample=False
    )[0, len(entry) :]  # fmt: skip
    assert answer.choices[0].token_ids == said.tolist()


def test_what_is_no_image_is_refused_in_a_line(server: Server, tmp_path: Path) -> None:
    with pytest.raises(openai.BadRequestError, match="Failed to load image"):
        ask(server, "What is this?", b"no image")
    thin = write_image(tmp_path / "thin.png", 3000, 2)
    with pytest.raises(openai.BadRequestError, match="absolute aspect ratio") as refused:
        ask(server, "What is this?", thin.read_bytes())
    assert "\n" not in str(refused.value)
    assert ask(server, "And now?").choices[0].message.content
