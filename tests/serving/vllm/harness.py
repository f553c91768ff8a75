"""Running engines from tests, and what transformers says to the same tokens."""

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[3]
PROMPTS = [[5, 17, 90, 33, 2, 71, 8], [100, 101, 7]]
STEPS = 16
TOLERANCE = 1e-4
"""Of log-probabilities, in float32."""


CACHES = ("VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME")
"""Variables that name folders for what vLLM, torch and our products compile."""


def environment(ranks: int = 1, **more: str) -> dict[str, str]:
    """Environment of a process that runs vLLM on this machine's CPUs; `CACHES` are inherited."""
    packages = (ROOT, ROOT / "kernels", ROOT / "cli", ROOT / "calib_data")
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    chosen = {
        "PYTHONPATH": os.pathsep.join(map(str, packages)),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # functions that count bytes go to workers
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # engines share the imports of the process
        "HF_HUB_OFFLINE": "1",
        # Engines that run at once have a processor each.
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(str((worker + r) % 2) for r in range(ranks)),
    }
    # This process runs kernels in Triton's interpreter, which is not for the engine.
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return {**inherited, **chosen, **more}


def case(
    name: str, folder: Path, *, ranks: int = 1, eager: bool = True,
    prompts: Iterable[Any] = PROMPTS, steps: int = STEPS, fails: bool = False,
    count: bool = False, **settings: Any,
) -> dict[str, Any]:  # fmt: skip
    """One of the runs of an engine; see `engines`."""
    settings |= {"tensor_parallel_size": ranks, "enforce_eager": eager}
    return {"name": name, "folder": str(folder), "settings": settings, "prompts": list(prompts),
            "steps": steps, "fails": fails, "count": count}  # fmt: skip


def run_engines(home: Path, *runs: dict[str, Any], **more: str) -> dict[str, Any]:
    """Results by the runs' names; ``more`` is environment. All runs have one number of ranks."""
    home.mkdir(parents=True, exist_ok=True)
    ranks = runs[0]["settings"]["tensor_parallel_size"]
    job, output, log = home / "job.json", home / "output.json", home / "log.txt"
    job.write_text(json.dumps({"runs": runs, "output": str(output)}))
    program = Path(__file__).with_name("engines.py")
    with log.open("w") as lines, processors(ranks):
        done = subprocess.run(
            [sys.executable, str(program), str(job)], env=environment(ranks, **more),
            stdout=lines, stderr=subprocess.STDOUT, timeout=600, cwd=home,
        )  # fmt: skip
    results = json.loads(output.read_text()) if output.exists() else {}
    if done.returncode and not all(run["fails"] for run in runs):
        raise AssertionError(f"the engine ended with {done.returncode}:\n{log.read_text()[-4000:]}")
    return {**results, "log": log.read_text()}


@contextmanager
def processors(ranks: int) -> Iterator[None]:
    """Engines of one rank run beside each other, those of several alone: their ranks wait for one
    another in loops, and lose minutes to anything else on their processors."""
    with (Path(os.environ[CACHES[0]]) / "processors").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH if ranks == 1 else fcntl.LOCK_EX)
        yield


def distance(said: Mapping[str, Any], model: Any, **inputs: torch.Tensor) -> float:
    """Largest difference of log-probabilities of the engine's likeliest five at every step from
    those of a model of transformers on the same tokens.

    Raises:
        AssertionError: a token is not the likeliest to the model.
    """
    prompt, tokens = said["prompt"], said["tokens"]
    ids = torch.tensor([prompt + tokens[:-1]])
    with torch.no_grad():
        logits = model(input_ids=ids, **inputs).logits[0, len(prompt) - 1 :]
    wanted = logits.float().log_softmax(-1)
    assert wanted.argmax(-1).tolist() == tokens
    return max(
        abs(wanted[step, int(token)].item() - value)
        for step, likeliest in enumerate(said["logprobs"])
        for token, value in likeliest.items()
    )


def agrees(found: Mapping[str, Any], model: Any) -> None:
    """Assert that a run's greedy tokens and log-probabilities are those of a model."""
    for said in found["said"]:
        assert len(said["tokens"]) == STEPS
        assert distance(said, model) <= TOLERANCE


def differences(found: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Largest difference between the first steps of two runs, over the tokens that both name."""
    return max(
        abs(value - second["logprobs"][0].get(token, 0.0))
        for first, second in zip(found["said"], other["said"], strict=True)
        for token, value in first["logprobs"][0].items()
        if token in second["logprobs"][0]
    )
