"""The engines that do the jobs of a layer: threads of this process, or a Ray cluster."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from erniequant.errors import ErnieQuantError
from erniequant.models.architecture import TensorSource
from erniequant.progress import Progress
from erniequant.quantization.executors import Executor
from erniequant.quantization.options import RunOptions

LOCAL, RAY = ENGINES = ("local", "ray")


def check_engine(run: RunOptions) -> None:
    """Refuse an engine that is not known or not installed.

    Raises:
        ErnieQuantError: it is not.
    """
    if run.engine not in ENGINES:
        raise ErnieQuantError(f"there is no engine {run.engine!r}; use {' or '.join(ENGINES)}")
    if run.engine != RAY and run.ray_address is not None:
        raise ErnieQuantError("--ray-address is for --engine ray only; give both or neither")
    if run.engine == RAY and find_spec("ray") is None:
        raise ErnieQuantError("--engine ray needs Ray; pip install 'erniequant[ray]'")


def engine_note(run: RunOptions) -> str:
    """A line of the plan on the engine; empty for the local one."""
    if run.engine != RAY:
        return ""
    where = f"the cluster at {run.ray_address}" if run.ray_address else "one started here"
    return (
        f"engine ray, {where}: experts are quantised by its nodes, whose memory comes on top; time "
        "is predicted for this machine alone"
    )


@contextmanager
def ray_engine(
    source: TensorSource, on_gpu: bool, at_once: int, address: str | None, watch: Progress
) -> Iterator[tuple[Executor, Progress]]:
    """An executor on a Ray cluster for as long as the context lasts, and an observer that tells
    ``watch`` the nodes and cores at work.

    Args:
        source: the checkpoint.
        on_gpu: whether products or the search for codes need one.
        at_once: cores of a cluster that is started here.
        address: see `erniequant.quantize`.

    Raises:
        ErnieQuantError: there is no such cluster, or its nodes cannot do the work.
    """
    from erniequant.quantization.ray_engine.cluster import connected
    from erniequant.quantization.ray_engine.executor import RayExecutor

    with connected(address, at_once):
        executor = RayExecutor(source, on_gpu, watch)
        yield executor, _Located(watch, executor.at_work)


class _Located:
    """An observer whose labels say where the work is done."""

    def __init__(self, watched: Progress, where: Callable[[], str]):
        self._watched, self._where = watched, where
        self.plan, self.start = watched.plan, watched.start
        self.message, self.finish = watched.message, watched.finish

    def advance(self, units: int, label: str) -> None:
        self._watched.advance(units, ", ".join(filter(None, (label, self._where()))))
