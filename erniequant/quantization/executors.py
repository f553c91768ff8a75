"""Where the jobs of a layer are done: on threads of this process."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from erniequant.quantization.expert_job import ExpertJob, ExpertLayer, ExpertOutcome, run_job


class Executor(Protocol):
    """Does jobs, each by `run_job`, so that no executor changes a bit of the result."""

    def run(self, layer: ExpertLayer, jobs: Iterable[ExpertJob]) -> Iterator[ExpertOutcome]:
        """Outcomes in the order of the jobs, whose errors are raised in their places.

        A job is made when it is asked for, and an outcome holds tables: so take no more jobs than
        are under way. After Ctrl-C or an error the iterator is closed; it returns at once then,
        however long jobs under way still take.
        """


class ThreadExecutor:
    """Threads of this process, which share the layer and its tables without a copy."""

    def __init__(self, at_once: int):
        """``at_once``: jobs under way, and outcomes waiting for their turn, at most."""
        self._at_once = at_once

    def run(self, layer: ExpertLayer, jobs: Iterable[ExpertJob]) -> Iterator[ExpertOutcome]:
        """See `Executor`."""
        workers = ThreadPoolExecutor(self._at_once)
        waiting: deque[Future[ExpertOutcome]] = deque()
        try:
            for job in jobs:
                waiting.append(workers.submit(run_job, job, layer))
                if len(waiting) == self._at_once:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            # Not waiting for experts under way: after Ctrl-C that could be minutes.
            workers.shutdown(wait=False, cancel_futures=True)
