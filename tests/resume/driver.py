"""Runs `erniequant.quantize` in children forked after the imports, and kills them on request.

Reads one JSON request a line on stdin, answers with one JSON object a line on stdout. A child
counts what it does to the disk (writes, flushes, renames) and kills itself at a given count (a
write is cut in half first), or so many counts after it first does something by name, or has a full
disk from a count on. This process has no threads of its own at the time of the fork, or the
children could hang.
"""

import errno
import importlib
import itertools
import json
import os
import resource
import signal
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast  # noqa: F401  (imported once, here)

from erniequant.codes import get_code
from erniequant.codes.viterbi import encoder
from erniequant.errors import ErnieQuantError
from erniequant.formats.fastdeploy.ccq.encode import encode_matrix
from erniequant.quantization import job, pipeline, run
from erniequant.tuning import layer, model, training
from erniequant.tuning.config import Training

NEEDED = (
    "transformers.models.auto.tokenization_auto",
    "transformers.models.auto.modeling_auto",
    "transformers.models.ernie4_5_moe.modeling_ernie4_5_moe",
    "erniequant.formats.native.format",
    "erniequant.formats.native.output",
)
"""What the library imports when it first needs it, which would be in every child."""

STEPS = Training(epochs=2, windows_per_step=2, rate=6e-3, matrix_rate=3e-4)
"""Scales have to move by more than the spacing of bfloat16, or nothing shows that they did."""

COUNTED = ("pwrite", "fsync", "fdatasync", "replace", "posix_fallocate")


def _keep_what_is_trained() -> None:
    """Have every epoch pass for an improvement: whether it is one on a model of random weights is
    chance, and another on every kind of processor."""

    def train(parameters: Any, windows: Any, loss: Any, *others: Any) -> Any:
        judged = itertools.count()

        def told(*window: Any) -> Any:
            return loss(*window) if torch.is_grad_enabled() else -next(judged)

        return training.train(parameters, windows, told, *others)

    layer.train = model.train = train


def main() -> None:
    torch.set_num_threads(1)
    _keep_what_is_trained()
    for name in NEEDED:
        importlib.import_module(name)
    # Compiled once here, not in every child.
    tile = np.zeros((1, 32), np.float32)
    encoder(get_code("cc2", 10)).encode(tile, tile + 1)
    print(json.dumps({"ready": True}), flush=True)
    warm = False
    for line in sys.stdin:
        request = json.loads(line)
        if not warm and request["options"].get("format") == "fastdeploy-wint2":
            encode_matrix(torch.randn(128, 128), torch.eye(128), k_order="mma64")
            warm = True
        print(json.dumps(_run(request)), flush=True)


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
    events = _count_events(request)
    if request.get("file_limit"):
        limit = request["file_limit"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if request.get("tight"):
        # The least that a run can do with: one expert at a time, tables on disk.
        planned = job.plan_memory
        job.plan_memory = lambda model, needs, *_: planned(model, needs, 1, 0, True)
    run.LAYER = run.MODEL = replace(STEPS, **request.get("steps", {}))
    pipeline.MAX_SHARD_BYTES = request.get("shard_bytes", pipeline.MAX_SHARD_BYTES)
    answer: dict[str, Any] = {}
    try:
        report = pipeline.quantize(request["src"], request["dst"], **request["options"])
        answer = {"ok": True, "sessions": report.sessions}
    except ErnieQuantError as error:
        answer = {"error": str(error)}
    except BaseException as error:
        answer = {"traceback": repr(error)}
    answer["events"] = events[0]
    os.write(writing, json.dumps(answer).encode())
    os._exit(0)


def _count_events(request: dict[str, Any]) -> list[int]:
    """Count from now on; ``kill_on`` is what is done to which file, and a number of events."""
    events = [0]
    kill_at, full_at = request.get("kill_at"), request.get("full_at")
    named, later = request.get("kill_on", (None, 0))

    def counted(name: str, original: Any) -> Any:
        def call(*args: Any) -> Any:
            nonlocal kill_at
            events[0] += 1
            if named and kill_at is None and f"{name} {_file(args)}".startswith(named):
                kill_at = events[0] + later
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


def _file(args: tuple[Any, ...]) -> str:
    """The name of the file that a call changes: its last path, or that of its descriptor."""
    path = os.readlink(f"/proc/self/fd/{args[0]}") if isinstance(args[0], int) else args[1]
    return os.path.basename(path)


if __name__ == "__main__":
    main()
