"""Run transformers' own OpenAI server on one checkpoint that `erniequant.load` reads.

``python -m erniequant.serving.transformers_server FOLDER serve NAME [OPTIONS]``: the words after
FOLDER are those of the command `transformers`; clients call the model NAME. The server would load
it by itself, but with linear layers that are slow for one token on a CPU, without a check of its
files, and not at all from FastDeploy's layout.
"""

import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from erniequant.errors import ErnieQuantError

EXIT_CODES = {signal.SIGTERM: 0, signal.SIGINT: 130}
"""After a signal that ends the server: TERM is how servers are stopped, Ctrl-C an interruption."""


def main(arguments: Sequence[str]) -> int:
    """Serve until a signal comes; returns the exit code, or raises SystemExit with it.

    arguments: folder, then the arguments of `transformers`.
    """
    for number in EXIT_CODES:
        # uvicorn ends in good order, and raises the signal again.
        signal.signal(number, _end)
    folder, *words = arguments
    from transformers.cli import transformers as cli
    from transformers.cli.serving import model_manager

    # `transformers serve` looks the class up when it runs.
    model_manager.ModelManager = manager_of(folder, model_manager.ModelManager)
    try:
        cli.app(words)
    except ErnieQuantError as error:
        sys.stderr.write(f"erniequant: {error}\n")
        return 1
    return 0


def manager_of(folder: str, stock: Any) -> type:
    """A subclass of ``stock``, transformers' class that loads models, for the one in ``folder``,
    whatever clients call it."""

    class PinnedManager(stock):
        @staticmethod
        def process_model_name(model_id: str) -> str:
            """The name as it is; the stock method adds a revision of the hub."""
            return model_id

        def _load_processor(self, name: str, *_: Any, **__: Any) -> Any:
            from erniequant.data.tokenizers import load_tokenizer
            from erniequant.paths import expanded

            self._require_pinned(name)
            return load_tokenizer(expanded(folder))

        def _load_model(self, name: str, *_: Any, **__: Any) -> Any:
            self._require_pinned(name)
            if self.quantization is not None:
                raise ErnieQuantError(
                    f"--quantization {self.quantization}: the model is served as it is stored"
                )
            return load_ready(folder, self.device, self.dtype, self.attn_implementation)

        def _require_pinned(self, name: str) -> None:
            if name != self.force_model:
                raise ErnieQuantError(f"this server has the model {self.force_model} only")

    return PinnedManager


def load_ready(
    folder: str, device: str | int, dtype: Any = None, attention: str | None = None
) -> Any:
    """The model as `erniequant.load` gives it, with all kernels compiled.

    Args:
        device: "auto", "cpu", "cuda", "cuda:N", or the number of a GPU.
        dtype: as of `erniequant.load`.
        attention: transformers' name of an implementation, None for its own choice.

    Raises:
        ErnieQuantError: as `erniequant.load`.
    """
    from erniequant.formats.verbs import load
    from erniequant.runtime.warm_up import warm_up

    place = f"cuda:{device}" if isinstance(device, int) else device
    model, _ = load(folder, device=place, dtype=dtype)
    if attention is not None:
        model.set_attn_implementation(attention)
    warm_up(model)
    return model


def _end(number: int, _: Any) -> NoReturn:
    raise SystemExit(EXIT_CODES[signal.Signals(number)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
