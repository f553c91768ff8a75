"""The plan of a server: which one, what stands in its way, the memory and the command."""

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from erniequant.errors import ErnieQuantError
from erniequant.serving import transformers_command, vllm_server
from erniequant.serving.command import Command
from erniequant.serving.installed import (
    TRANSFORMERS,
    VLLM,
    Installed,
    choose_engine,
    find_installed,
)
from erniequant.serving.machine import Machine, is_loopback, this_machine, why_not_listen
from erniequant.serving.memory import Memory
from erniequant.serving.served_model import ServedModel, read_served
from erniequant.serving.settings import ServeSettings

_ADVICE = {
    "GPU": "give more GPUs with --tp, or quantise with fewer bits",
    "CPU": "use a machine with more memory, or quantise with fewer bits",
}


@dataclass(frozen=True)
class ServePlan:
    """A server before it runs.

    Attributes:
        settings: effective ones.
        engine: "vllm" or "transformers".
        title: the engine, its version and where it computes, for people.
        model: what it serves.
        memory: None if the model cannot be divided as asked for.
        command: what is run.
        problems: a line for each reason not to run it.
        notes: a line for all else that the user should know.
    """

    settings: ServeSettings
    engine: str
    title: str
    model: ServedModel
    memory: Memory | None
    command: Command
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def url(self) -> str:
        """Where clients find it."""
        host = f"[{self.settings.host}]" if ":" in self.settings.host else self.settings.host
        return f"http://{host}:{self.settings.port}/v1"

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; it holds no API key."""
        return {
            "engine": self.engine,
            "title": self.title,
            "url": self.url,
            "model": self.model.name,
            "folder": str(self.model.folder),
            "format": self.model.format,
            "ranks": self.settings.ranks,
            "api_key": self.settings.api_key is not None,
            "memory": None if self.memory is None else self.memory.to_dict(),
            "command": self.command.to_dict(),
            "problems": list(self.problems),
            "notes": list(self.notes),
        }


def plan_server(settings: ServeSettings) -> ServePlan:
    """Look at the model's headers, the installed servers, the machine and the port.

    Raises:
        ErnieQuantError: no server is installed, or the model cannot be served at all.
    """
    settings, installed = settings.effective(), find_installed()
    choose_engine(settings.engine, installed)
    model = read_served(settings.model)
    return make_plan(settings, model, installed, this_machine(), os.environ)


def make_plan(
    settings: ServeSettings,
    model: ServedModel,
    installed: Installed,
    machine: Machine,
    environment: Mapping[str, str],
) -> ServePlan:
    """The plan for a model on a machine; asks nothing of this one but whether the port is free.

    Raises:
        ErnieQuantError: no server is installed.
    """
    engine = choose_engine(settings.engine, installed)
    known = (settings, installed, machine, environment)
    memory: Memory | None = None
    problems: list[str] = []
    notes = list(_exposure(settings, engine, environment))
    if engine == VLLM:
        problems += vllm_server.problems(model, *known)
        notes += vllm_server.notes(installed)
        with suppress(ErnieQuantError):  # among the problems
            memory = vllm_server.memory(model, *known)
        command = vllm_server.command(model, *known, memory)
        place = "the CPU" if installed.vllm_on_cpu(environment) else "the GPU"
        title = f"vLLM {installed.vllm} on {place}"
    else:
        problems += transformers_command.problems(model, settings)
        notes += transformers_command.notes(model, installed)
        memory = transformers_command.memory(model, settings, machine)
        command = transformers_command.command(model, settings)
        title = f"transformers {installed.transformers}'s own server on the {memory.place}"
    if memory is not None and (line := memory.problem(_ADVICE[memory.place])) is not None:
        problems.append(line)
    if (line := why_not_listen(settings.host, settings.port)) is not None:
        problems.append(line)
    if model.has_tokenizer and not model.has_template and not settings.given("--chat-template"):
        notes.append("the model has no chat template: /v1/completions works, chats are refused")
    return ServePlan(
        settings, engine, title, model, memory, command, tuple(problems), tuple(notes)
    )  # fmt: skip


def _exposure(
    settings: ServeSettings, engine: str, environment: Mapping[str, str]
) -> Iterator[str]:
    keyed = settings.api_key or settings.given("--api-key") or environment.get("VLLM_API_KEY")
    if engine == TRANSFORMERS and environment.get("VLLM_API_KEY"):
        yield "VLLM_API_KEY is set, but transformers' server asks for no key"
    if not is_loopback(settings.host) and (engine == TRANSFORMERS or not keyed):
        yield f"--host {settings.host} lets everybody who reaches this machine use the server"
