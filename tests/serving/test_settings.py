"""Arguments for the server itself: read where the plan needs them, and stronger than ours."""

import pytest

from erniequant.errors import ErnieQuantError
from erniequant.serving.settings import ServeSettings


def passed(*arguments: str) -> ServeSettings:
    return ServeSettings("m", port=8000, ranks=2, arguments=arguments)


@pytest.mark.parametrize(
    "arguments, value",
    [
        (("--port", "9"), "9"),
        (("--port=9",), "9"),
        (("--port", "8", "--port=9"), "9"),
        (("--port", "8", "--host", "h", "--port", "9"), "9"),
        (("--api-key", "--port=9"), "9"),
        (("--ports", "9", "port", "8"), None),
        (("--port",), ""),
        ((), None),
    ],
)
def test_values(arguments: tuple[str, ...], value: str | None) -> None:
    assert passed(*arguments).value("--port") == value
    assert passed(*arguments).given("--port") == (value is not None)


def test_vllm_reads_underscores_and_short_names() -> None:
    assert passed("--tensor_parallel_size", "4").effective().ranks == 4
    assert passed("-tp", "4").effective().ranks == 4
    assert passed("-ep").given("--enable-expert-parallel")


def test_they_win() -> None:
    found = passed("--host", "::1", "--port=9").effective()
    assert (found.host, found.port, found.ranks) == ("::1", 9, 2)
    assert passed().effective() == passed()


@pytest.mark.parametrize("arguments", [("--port", "x"), ("--port",), ("-tp", "-1")])
def test_a_number_is_a_number(arguments: tuple[str, ...]) -> None:
    with pytest.raises(ErnieQuantError, match="is not a number"):
        passed(*arguments).effective()


def test_what_cannot_be_meant() -> None:
    with pytest.raises(ErnieQuantError, match="no engine 'sglang'; use auto or vllm or"):
        ServeSettings("m", engine="sglang")
    with pytest.raises(ErnieQuantError, match="--tp 0"):
        ServeSettings("m", ranks=0)


def test_the_key_is_in_no_representation() -> None:
    assert "sesame" not in repr(ServeSettings("m", api_key="sesame"))
