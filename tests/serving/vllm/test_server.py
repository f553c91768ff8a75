"""`erniequant serve` with vLLM, from the side of the openai client. The tests share one server and
run in order; the last stops it."""

import asyncio
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

import erniequant
from erniequant_data import tiny_model_dir
from tests.serving.vllm.server import KEY, Server, serving

CONTEXT = 128
PROMPTS = [
    f"{who} {what}"
    for who in ("The king", "An old man of the sea", "My sister's house", "昔者，")
    for what in ("said", "was", "and the", "in 1815, when", "could not", "went to", "had", "is")
]
"""Of different lengths, so that prompts and answers meet in one step."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The embedded tiny model at 2 bits; half of 32 streams have to wait."""
    root = tmp_path_factory.mktemp("server")
    folder = root / "tiny-2bit"
    erniequant.quantize(tiny_model_dir(), folder, bits=2, no_calib=True, effort="fast")
    options = ("--dtype", "float32", "--max-model-len", str(CONTEXT), "--max-num-seqs", "16",
               "--enforce-eager")  # fmt: skip
    with serving(folder, root / "home", "--", *options) as started:
        yield started


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0, timeout=120)


def test_it_is_vllm_and_names_the_model(server: Server, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny-2bit"]
    assert "vLLM" in server.log.read_text()


def test_only_with_the_key_and_only_from_here(server: Server) -> None:
    stranger = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    port = int(server.url.split(":")[-1].removesuffix("/v1"))
    here = socket.gethostbyname(socket.gethostname())
    if here.startswith("127."):
        pytest.skip("this machine has no other address")
    with pytest.raises(OSError), socket.create_connection((here, port), timeout=5):
        pass


def test_completion_with_log_probabilities(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny-2bit", prompt="The king", max_tokens=12, temperature=0, logprobs=3
    )
    assert answer.usage is not None and answer.usage.completion_tokens == 12
    found = answer.choices[0].logprobs
    assert found is not None and len(found.tokens) == 12
    for token, value, others in zip(
        found.tokens, found.token_logprobs, found.top_logprobs, strict=True
    ):
        assert others[token] == value == max(others.values()) < 0
    assert "".join(found.tokens) == answer.choices[0].text


def test_chat_and_its_stream_say_the_same(client: openai.OpenAI) -> None:
    messages: Any = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Who was the king?"},
        {"role": "assistant", "content": "An old man."},
        {"role": "user", "content": "And then?"},
    ]
    common: Any = {"model": "tiny-2bit", "messages": messages, "max_tokens": 20, "temperature": 0}
    whole = client.chat.completions.create(**common).choices[0].message.content
    chunks = list(client.chat.completions.create(**common, stream=True))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert whole and "".join(pieces) == whole and len(list(filter(None, pieces))) > 5
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")


def test_a_request_beyond_the_context_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=str(CONTEXT)):
        client.completions.create(model="tiny-2bit", prompt="king " * CONTEXT, max_tokens=1)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny-2bit", prompt="The king", max_tokens=CONTEXT + 1)
    assert client.completions.create(model="tiny-2bit", prompt="The", max_tokens=1).choices


def test_a_client_that_leaves_frees_its_place(server: Server, client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="tiny-2bit", prompt="The king", max_tokens=100, temperature=0, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    next(iter(stream))
    stream.close()
    until = time.monotonic() + 20
    while server.running() and time.monotonic() < until:
        time.sleep(0.2)
    assert server.running() == 0
    assert client.completions.create(model="tiny-2bit", prompt="The", max_tokens=1).choices


async def stream(
    client: openai.AsyncOpenAI, prompt: str, tokens: int = 24
) -> list[dict[str, float]]:
    """The two likeliest at every step."""
    steps: list[dict[str, float]] = []
    chunks = await client.completions.create(
        model="tiny-2bit", prompt=prompt, max_tokens=tokens, temperature=0, logprobs=2,
        stream=True, extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True},
    )  # fmt: skip
    async for chunk in chunks:
        if chunk.choices and (found := chunk.choices[0].logprobs) is not None:
            steps += found.top_logprobs or []
    return steps


def test_streams_at_once_say_what_they_say_alone(server: Server) -> None:
    """Except after a step whose two likeliest tokens are all but equal."""

    async def both() -> tuple[list[Any], list[Any]]:
        async with openai.AsyncOpenAI(base_url=server.url, api_key=KEY, timeout=300) as client:
            alone = [await stream(client, prompt) for prompt in PROMPTS]
            return alone, await asyncio.gather(*(stream(client, prompt) for prompt in PROMPTS))

    assert len(PROMPTS) == 32
    for alone, together in zip(*asyncio.run(both()), strict=True):
        assert len(alone) == len(together) == 24
        for one, other in zip(alone, together, strict=True):
            first, second = sorted(one.values(), reverse=True)[:2]
            likeliest = max(one, key=lambda token: one[token])
            if likeliest != max(other, key=lambda token: other[token]):
                assert first - second < 1e-3
                break
            assert abs(one[likeliest] - other[likeliest]) < 1e-3


def test_nothing_is_lost_of_500_requests(server: Server) -> None:
    """One in ten is cancelled after its first token."""

    async def ask(client: openai.AsyncOpenAI, turn: asyncio.Semaphore, number: int) -> int:
        async with turn:
            chunks = await client.completions.create(
                model="tiny-2bit", prompt=f"{number}: {PROMPTS[number % 32]}", max_tokens=6,
                temperature=1, seed=number, stream=True, extra_body={"ignore_eos": True},
                stream_options={"include_usage": True},
            )  # fmt: skip
            tokens = 0
            async for chunk in chunks:
                if number % 10 == 0:
                    await chunks.close()
                    return -1
                tokens = chunk.usage.completion_tokens if chunk.usage else tokens
            return tokens

    async def all_of_them() -> list[int]:
        async with openai.AsyncOpenAI(base_url=server.url, api_key=KEY, timeout=300) as client:
            turn = asyncio.Semaphore(48)
            return await asyncio.gather(*(ask(client, turn, number) for number in range(500)))

    found = asyncio.run(all_of_them())
    assert found == [-1 if number % 10 == 0 else 6 for number in range(500)]
    until = time.monotonic() + 20
    while server.running() and time.monotonic() < until:
        time.sleep(0.2)
    assert server.running() == 0


def test_it_ends_in_good_order(server: Server) -> None:
    assert server.stop() == 0


def test_two_ranks_of_a_model_for_one_are_refused_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "for-one"
    erniequant.quantize(tiny_model_dir(), folder, bits=4, no_calib=True, effort="fast", max_tp=1)
    with (
        pytest.raises(AssertionError, match="--max-tp 2"),
        serving(folder, tmp_path / "home", "--tp", "2"),
    ):
        pass
