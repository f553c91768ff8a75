"""A vLLM that the plugin does not fit is left alone, with a warning: it serves other models too."""

import logging
from collections.abc import Callable

import pytest

from erniequant.serving.vllm import register


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lines that the plugin warns with."""
    lines: list[str] = []
    log = logging.getLogger("vllm.erniequant")
    monkeypatch.setattr(log, "warning", lambda text, *args: lines.append(text % args))
    return lines


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("0.31.4", "vLLM 0.31.4 is older than 0.32"),
        ("0.34.0", "vLLM 0.34.0 is newer than 0.33"),
        ("1.0.0rc1", "vLLM 1.0.0rc1 is newer"),
        ("dev", "version 'dev' is unknown"),
    ],
)
def test_versions_warn(
    version: str, said: str, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm.__version__", version)
    monkeypatch.setattr("erniequant.serving.vllm.registration.register_all", lambda: None)
    register()
    assert len(warnings) == 1 and said in warnings[0]


@pytest.mark.parametrize("version", ["0.32.0", "0.33.1+cpu"])
def test_known_versions_are_silent(
    version: str, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm.__version__", version)
    register()
    register()
    assert not warnings


def test_an_old_version_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        pytest.fail("registered")

    monkeypatch.setattr("vllm.__version__", "0.31.0")
    monkeypatch.setattr("erniequant.serving.vllm.registration.register_all", refuse)
    register()


@pytest.mark.parametrize("error", [ImportError, AttributeError, TypeError, RuntimeError])
def test_an_interface_that_has_changed_warns(
    error: Callable[[str], Exception], warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed() -> None:
        raise error("no such thing")

    monkeypatch.setattr("erniequant.serving.vllm.registration.register_all", changed)
    register()
    assert len(warnings) == 1 and "no such thing" in warnings[0]
