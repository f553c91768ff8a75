"""The command line and environment of a server, which takes this process's place."""

import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

SECRET = "VLLM_API_KEY"
"""The one variable whose value is shown to nobody."""

_HIDDEN = "********"


@dataclass(frozen=True)
class Command:
    """A program to run.

    Attributes:
        arguments: program and arguments.
        environment: variables that it gets beside those of this process.
    """

    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)

    def line(self) -> str:
        """The command as one types it in a shell, without the secret."""
        variables = [f"{name}={shlex.quote(v)}" for name, v in self._shown().items()]
        return " ".join([*variables, shlex.join(self.arguments)])

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, without the secret."""
        return {"arguments": list(self.arguments), "environment": self._shown()}

    def run(self) -> NoReturn:
        """Become the program: signals reach it, and its exit code is this one's.

        Raises:
            OSError: it cannot be started.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        os.execvpe(self.arguments[0], self.arguments, {**os.environ, **self.environment})

    def _shown(self) -> dict[str, str]:
        return {n: _HIDDEN if n == SECRET else v for n, v in self.environment.items()}
