"""Runs `erniequant.quantize` in children forked after the imports, and kills them on request.

Reads one JSON request a line on stdin, answers with one JSON object a line on stdout. A child
counts what it does to the disk (writes, flushes, renames, deletions) and kills itself at a given
count (a write is cut in half first), or has a full disk from a count on. This process has no
threads of its own at the time of the fork, or the children could hang.
"""

import errno
import importlib
import json
import os
import resource
import signal
import sys
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast  # noqa: F401  (imported once, here)

from erniequant.checkpoint.reader import open_checkpoint
from erniequant.codes import get_code
from erniequant.codes.viterbi import encoder
from erniequant.errors import ErnieQuantError
from erniequant.models.registry import architecture_of
from erniequant.quantization.memory import MemoryInputs, largest_layer, plan_memory
from erniequant.quantization.pipeline import quantize

NEEDED = (
    "transformers.models.auto.tokenization_auto",
    "transformers.models.auto.modeling_auto",
    "transformers.models.ernie4_5_moe.modeling_ernie4_5_moe",
    "erniequant.formats.native.format",
    "erniequant.formats.native.output",
)
"""What the library imports when it first needs it, which would be in every child."""

COUNTED = ("pwrite", "fsync", "fdatasync", "replace", "posix_fallocate")


def main() -> None:
    torch.set_num_threads(1)
    for name in NEEDED:
        importlib.import_module(name)
    # Compiled once here, not in every child.
    tile = np.zeros((1, 32), np.float32)
    encoder(get_code("cc2", 10)).encode(tile, tile + 1)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line))), flush=True)


def _run(request: dict[str, Any]) -> dict[str, Any]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _child(request, writing)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return {"signal": os.WTERMSIG(status)}
    return json.loads(text)


def _child(request: dict[str, Any], writing: int) -> None:
    events = _count_events(request.get("kill_at"), request.get("full_at"))
    if request.get("file_limit"):
        limit = request["file_limit"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    options = dict(request["options"])
    if request.get("tight"):
        options["max_memory"] = _least_memory(request["src"], options)
    answer: dict[str, Any] = {}
    try:
        report = quantize(request["src"], request["dst"], **options)
        answer = {"ok": True, "sessions": report.sessions}
    except ErnieQuantError as error:
        answer = {"error": str(error)}
    except BaseException as error:
        answer = {"traceback": repr(error)}
    answer["events"] = events[0]
    os.write(writing, json.dumps(answer).encode())
    os._exit(0)


def _least_memory(src: str, options: dict[str, Any]) -> int:
    """The least that a run can do with: one expert at a time, tables on disk."""
    checkpoint = open_checkpoint(src)
    model = architecture_of(checkpoint.config)
    layer = largest_layer(checkpoint, model)
    tokens, length = options["calib_samples"] * options["calib_length"], options["calib_length"]
    return plan_memory(model, MemoryInputs(tokens, length, 0, layer), 1, 0, True).peak_bytes


def _count_events(kill_at: int | None, full_at: int | None) -> list[int]:
    events = [0]

    def counted(name: str, original: Any) -> Any:
        def call(*args: Any) -> Any:
            events[0] += 1
            if events[0] == kill_at:
                if name == "pwrite":
                    original(args[0], bytes(args[1])[: len(args[1]) // 2], args[2])
                os.kill(os.getpid(), signal.SIGKILL)
            if full_at is not None and events[0] >= full_at and name != "replace":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*args)

        return call

    for name in COUNTED:
        setattr(os, name, counted(name, getattr(os, name)))
    return events


if __name__ == "__main__":
    main()
