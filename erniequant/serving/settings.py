"""What the user asks of a server, and arguments that go to the server as they are."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from erniequant.errors import ErnieQuantError

ENGINES = ("auto", "vllm", "transformers")
HOST, PORT = "127.0.0.1", 8000
_SHORT = {"--tensor-parallel-size": "-tp", "--enable-expert-parallel": "-ep"}


@dataclass(frozen=True)
class ServeSettings:
    """A server as it is asked for.

    Attributes:
        model: folder or Hugging Face id.
        host, port: where it listens.
        ranks: of tensor parallelism.
        api_key: what clients have to send; None for no key.
        engine: one of `ENGINES`.
        arguments: passed on to the server; they win over all else.
    """

    model: str
    host: str = HOST
    port: int = PORT
    ranks: int = 1
    api_key: str | None = field(default=None, repr=False)
    engine: str = "auto"
    arguments: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ErnieQuantError(f"no engine {self.engine!r}; use {' or '.join(ENGINES)}")
        if self.ranks < 1:
            raise ErnieQuantError(f"--tp {self.ranks} is too little; give at least 1")

    def given(self, name: str) -> bool:
        """True if the option ``name`` (``--dtype``) is among the server's own arguments."""
        return bool(_places(self.arguments, name))

    def value(self, name: str) -> str | None:
        """The value that the server's own arguments give an option, the last one if they repeat it;
        None if they do not name it."""
        places = _places(self.arguments, name)
        if not places:
            return None
        word, _, value = self.arguments[places[-1]].partition("=")
        following = self.arguments[places[-1] + 1 : places[-1] + 2]
        return value if word != self.arguments[places[-1]] else "".join(following)

    def effective(self) -> "ServeSettings":
        """The same with host, port and ranks as the server's own arguments have them.

        Raises:
            ErnieQuantError: one of these is not a number.
        """
        return replace(
            self,
            host=self.value("--host") or self.host,
            port=self._number("--port", self.port),
            ranks=self._number("--tensor-parallel-size", self.ranks),
        )

    def _number(self, name: str, otherwise: int) -> int:
        value = self.value(name)
        if value is None:
            return otherwise
        if not value.isdecimal():
            raise ErnieQuantError(f"{name} {value!r} after -- is not a number")
        return int(value)


def _places(arguments: Sequence[str], name: str) -> list[int]:
    """Indices of the words that name an option, alone or with its value; ``_`` counts as ``-``."""
    names = (name, _SHORT.get(name, name))
    words = [argument.partition("=")[0] for argument in arguments]
    return [
        i
        for i, word in enumerate(words)
        if word.startswith("-") and word.replace("_", "-") in names
    ]
