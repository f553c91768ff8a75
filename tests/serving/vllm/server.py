"""A server that `erniequant serve` starts, for tests."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.serving.vllm.harness import environment, processors

KEY = "a key that clients must send"


@dataclass(frozen=True)
class Server:
    """One that listens.

    Attributes:
        url: of the API, with its version.
        name: of the model.
        process: vLLM's own, as the command becomes the server.
        log: what it prints.
    """

    url: str
    name: str
    process: "subprocess.Popen[bytes]"
    log: Path

    def get(self, path: str) -> str:
        """A page beside the API, such as /health."""
        with urllib.request.urlopen(self.url.removesuffix("/v1") + path, timeout=10) as reply:
            return reply.read().decode()

    def running(self) -> float:
        """Requests that are being answered or wait."""
        line = re.compile(r"^vllm:num_requests_(?:running|waiting)\{.*\} (\S+)", re.MULTILINE)
        found = line.findall(self.get("/metrics"))
        assert found
        return sum(map(float, found))

    def stop(self) -> int:
        """The exit code after TERM."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextmanager
def serving(folder: Path, home: Path, *arguments: str, seconds: int = 400) -> Iterator[Server]:
    """A server of a checkpoint; ``arguments`` are options of the command and of vLLM."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home.mkdir(parents=True, exist_ok=True)
    log = home / "server.txt"
    words = ["-m", "erniequant", "serve", str(folder), "--port", str(port), *arguments]
    variables = {k: v for k, v in environment().items() if not k.startswith("VLLM_ENABLE_V1")}
    with log.open("wb") as lines:
        process = subprocess.Popen(
            [sys.executable, *words], stdout=lines, stderr=subprocess.STDOUT, cwd=home,
            env={**variables, "VLLM_API_KEY": KEY},
        )  # fmt: skip
    server = Server(f"http://127.0.0.1:{port}/v1", folder.name, process, log)
    try:
        with processors(ranks=1):
            _wait(server, seconds)
            yield server
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.kill(process.pid, signal.SIGKILL)


def _wait(server: Server, seconds: int) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if server.process.poll() is not None:
            break
        try:
            server.get("/health")
            return
        except OSError:
            time.sleep(1)
    raise AssertionError(f"no server:\n{server.log.read_text()[-4000:]}")
