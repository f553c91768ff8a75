"""Executors that do jobs as an engine over machines would: everything arrives as pickled bytes."""

import pickle
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

from erniequant.quantization.expert_job import ExpertJob, ExpertLayer, ExpertOutcome, run_job


class PickledExecutor:
    """In this process, one job after another."""

    def run(self, layer: ExpertLayer, jobs: Iterable[ExpertJob]) -> Iterator[ExpertOutcome]:
        sent = pickle.loads(pickle.dumps(layer))
        for job in jobs:
            outcome = run_job(pickle.loads(pickle.dumps(job)), sent)
            yield pickle.loads(pickle.dumps(outcome))


class ProcessExecutor:
    """In processes of their own, started anew; each is sent a layer once, by a file."""

    def __init__(self, processes: int) -> None:
        self._processes = processes
        self._workers = ProcessPoolExecutor(processes, mp_context=get_context("spawn"))

    def run(self, layer: ExpertLayer, jobs: Iterable[ExpertJob]) -> Iterator[ExpertOutcome]:
        waiting: deque[Future[bytes]] = deque()
        with tempfile.NamedTemporaryFile() as file:
            pickle.dump(layer, file)
            file.flush()
            for job in jobs:
                waiting.append(self._workers.submit(_work, Path(file.name), pickle.dumps(job)))
                if len(waiting) == self._processes:
                    yield pickle.loads(waiting.popleft().result())
            while waiting:
                yield pickle.loads(waiting.popleft().result())

    def shutdown(self) -> None:
        self._workers.shutdown()


@lru_cache(maxsize=1)
def _layer(file: Path) -> ExpertLayer:
    return pickle.loads(file.read_bytes())


def _work(layer: Path, job: bytes) -> bytes:
    return pickle.dumps(run_job(pickle.loads(job), _layer(layer)))
