"""transformers' OpenAI server: what it cannot do, and how it is started."""

import sys
from collections.abc import Iterator

from erniequant.serving.command import Command
from erniequant.serving.installed import Installed
from erniequant.serving.machine import Machine
from erniequant.serving.memory import TRANSFORMERS_PROCESS, Memory
from erniequant.serving.served_model import ServedModel
from erniequant.serving.settings import ServeSettings

MODULE = "erniequant.serving.transformers_server"


def problems(model: ServedModel, settings: ServeSettings) -> Iterator[str]:
    """A line for everything that keeps transformers' server from serving the model as asked."""
    if settings.ranks > 1:
        yield (
            f"--tp {settings.ranks}: transformers' server is one process; install vLLM "
            "(pip install 'erniequant[vllm]')"
        )
    if settings.api_key is not None:
        yield (
            "--api-key: transformers' server asks for no key; leave it out, or install vLLM "
            "(pip install 'erniequant[vllm]')"
        )
    if not model.has_tokenizer:
        yield f"{model.folder} has no tokenizer; copy the original's into it"


def notes(model: ServedModel, installed: Installed) -> Iterator[str]:
    """A line for everything that the user should know."""
    if model.architecture.images is not None:
        yield "transformers' server shows this model no images; vLLM does"
    if installed.distribution is None:
        yield "it answers one request at a time; vLLM takes many (pip install 'erniequant[vllm]')"


def memory(model: ServedModel, settings: ServeSettings, machine: Machine) -> Memory:
    """What the server takes, without keys and values, which grow with the text."""
    weights, device = model.weight_bytes(), settings.value("--device") or "auto"
    if machine.cards and not device.startswith("cpu"):
        return Memory(weights, None, 0, machine.cards[0], 1, "GPU")
    return Memory(weights, None, int(TRANSFORMERS_PROCESS), machine.memory, 1, "CPU")


def command(model: ServedModel, settings: ServeSettings) -> Command:
    """The server's command."""
    ours = {"--host": settings.host, "--port": str(settings.port)}
    words = [word for name in ours if not settings.given(name) for word in (name, ours[name])]
    folder = str(model.folder.resolve())
    return Command(
        (sys.executable, "-m", MODULE, folder, "serve", model.name, *words, *settings.arguments)
    )
