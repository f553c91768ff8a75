"""The side of a worker: one task does one job, and says on what machine."""

import platform
import tempfile
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import ray
import torch

from erniequant.calibration.rows import RowPool
from erniequant.errors import ErnieQuantError
from erniequant.quantization.expert import LayerContext
from erniequant.quantization.expert_job import ExpertJob, ExpertLayer, run_job
from erniequant.quantization.layer import LayerInput
from erniequant.quantization.ray_engine.matrices import Matrices, SeenFile
from erniequant.quantization.ray_engine.parcels import Parcel, pack, unpack
from erniequant.quantization.run_identity import package_versions, processor
from erniequant.system import return_freed_memory, trim_memory


@dataclass(frozen=True)
class Machine:
    """The facts of a process that decide the bits of a result: its kind of processor, and versions
    of packages by name."""

    processor: str
    versions: tuple[tuple[str, str], ...]

    def require_versions_of(self, driver: "Machine", node: str) -> None:
        """Refuse a ``node`` whose versions differ from the driver's.

        Raises:
            ErnieQuantError: they do.
        """
        wanted = dict(driver.versions)
        for name, version in self.versions:
            if version != wanted[name]:
                raise ErnieQuantError(
                    f"the node {node} has {name} {version} instead of {wanted[name]}; install the "
                    "same versions on all nodes"
                )


@lru_cache(maxsize=1)
def this_machine() -> Machine:
    """That of this process."""
    return Machine(processor(), tuple(package_versions().items()))


@dataclass(frozen=True, eq=False)
class Setting:
    """What the jobs of a layer share beside its tables.

    Attributes:
        context: see `ExpertLayer`.
        on_disk: whether tables of a job go to files.
        driver: the machine that asks.
    """

    context: LayerContext
    on_disk: bool
    driver: Machine


@dataclass(frozen=True, eq=False)
class Errand:
    """A job with its source matrices."""

    job: ExpertJob
    matrices: Matrices


@dataclass(frozen=True, eq=False)
class Reply:
    """What became of a job on a node (its id in Ray): an outcome in a parcel, or an error, or
    neither where the node does not see the files of the source."""

    node: str
    processor: str
    outcome: Parcel | None = None
    error: ErnieQuantError | None = None


def do_job(inputs: Parcel, setting: Parcel, errand: Parcel) -> Reply:
    """Do a job; the parcels hold a `LayerInput`, a `Setting` and an `Errand`."""
    node, machine = ray.get_runtime_context().get_node_id(), this_machine()
    try:
        outcome = _do(unpack(inputs), unpack(setting), unpack(errand), machine)
    except ErnieQuantError as error:
        return Reply(node, machine.processor, error=error)
    finally:
        trim_memory()
    return Reply(node, machine.processor, outcome)


def _do(inputs: LayerInput, setting: Setting, errand: Errand, machine: Machine) -> Parcel | None:
    machine.require_versions_of(setting.driver, platform.node())
    if not errand.matrices.are_here():
        return None
    return_freed_memory()
    on_gpu = setting.context.device.type == "cuda"
    # Ray shows a task only its own GPU.
    context = replace(setting.context, device=torch.device("cuda" if on_gpu else "cpu"))
    pool = RowPool(Path(tempfile.gettempdir()) if setting.on_disk else None)
    return pack(run_job(errand.job, ExpertLayer(errand.matrices, inputs, context, pool)))


@dataclass(frozen=True)
class Answer:
    """A node that was asked: the machine, and whether it sees a file as the driver does."""

    machine: Machine
    sees: bool


def describe(file: SeenFile | None) -> Answer:
    """Answer for the node of this worker."""
    return Answer(this_machine(), file is None or file.is_here())
