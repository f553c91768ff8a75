"""Observers of work: one whose output fails is left out, one that stops the work does."""

import warnings

import pytest

import erniequant
from erniequant.errors import ErnieQuantWarning
from erniequant.progress import NULL_PROGRESS, NullProgress, observed

EVENTS = ("plan", "start", "advance", "finish")


class Recording(NullProgress):
    """Notes what it is told, and raises `error` at one event."""

    def __init__(self, event, error):
        self.event, self.error, self.seen = event, error, []

    def __getattribute__(self, name):
        if name not in EVENTS:
            return super().__getattribute__(name)

        def told(*_):
            self.seen.append(name)
            if name == self.event:
                raise self.error

        return told


@pytest.fixture
def quantise(request, tmp_path):
    def work(kind, progress):
        source = request.getfixturevalue(kind)
        options = {"bits": 2, "no_calib": True, "max_tp": 1, "effort": "fast"}
        return erniequant.quantize(source, tmp_path / "q", progress=progress, **options)

    return work


@pytest.mark.parametrize("kind", ["micro_ernie", "micro_vl", "micro_dense"])
@pytest.mark.parametrize(
    ("event", "error"),
    [
        ("plan", UnicodeEncodeError("gbk", "\u1d40", 0, 1, "illegal multibyte sequence")),
        ("advance", BrokenPipeError(32, "Broken pipe")),
        ("finish", ValueError("I/O operation on closed file")),
    ],
)
def test_an_observer_that_cannot_print_does_not_stop_the_work(
    quantise, tmp_path, kind, event, error
):
    watching = Recording(event, error)
    with pytest.warns(ErnieQuantWarning, match=f"progress.{event} failed") as warned:
        quantise(kind, watching)
    assert (tmp_path / "q" / "config.json").is_file()
    assert len(warned) == 1 and watching.seen[-1] == event, "it is asked no more"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("enough")], ids=repr)
def test_an_observer_can_stop_the_work(quantise, tmp_path, error):
    with pytest.raises(type(error)):
        quantise("micro_dense", Recording("advance", error))
    assert not (tmp_path / "q" / "config.json").exists()


def test_no_observer_is_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert observed(None) is NULL_PROGRESS
        observed(NullProgress()).advance(1, "done")
