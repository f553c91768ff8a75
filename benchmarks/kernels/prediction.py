"""Predicted time of a layer of experts on a card, from counted machine code and specified figures.

docs/performance.md lists the assumptions. No GPU is needed, and none has confirmed it.

`predict` is a layer as a tuning table runs it; `product` one projection in any configuration, which
is how configurations are compared before a card is at hand (`benchmarks.kernels.search`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from benchmarks.kernels.cards import Card
from benchmarks.kernels.counts import Wanted, WantedRotation, counted
from benchmarks.kernels.load import Load, load
from benchmarks.kernels.placement import (
    ALONE,
    L2_LATENCY,
    L2_PORT,
    MEMORY_LATENCY,
    Work,
    ideal,
    makespan,
)  # fmt: skip
from erniequant.codes import ConvolutionalCode
from erniequant_kernels import decode
from erniequant_kernels.bench.problem import Shape
from erniequant_kernels.machine_code_cases import rotate_programs
from erniequant_kernels.machine_traffic import Counted
from erniequant_kernels.packed_gemm import PackedGemmConfig, groups_per_warp
from erniequant_kernels.ptx.accesses import EPILOGUE, LOOP, PROLOGUE
from erniequant_kernels.routing import SCAN
from erniequant_kernels.tuning import GemmConfig, Tuning, tables

GEMM_REACHED = 0.7  # share of the matrix units' peak that a large product reaches
LAUNCH = 2e-6  # seconds between kernels of a CUDA graph
LAUNCHES = 5  # of a layer, packed or in bf16
FIRST_LOADS = 3 * L2_LATENCY + MEMORY_LATENCY
"""Clocks before a program of a product works: its expert, its tokens and their order, one after the
other from the level-2 cache, then the first words from memory."""
BARRIER = 30
"""Clocks that a barrier of a program takes."""
SORT_SCAN = L2_LATENCY + 200 * ALONE + 7 * BARRIER
"""Clocks to sort by 1024 assignments: a load, about 200 instructions and 7 barriers, as counted.
Each assignment is looked at twice."""
GROUP_ROWS, GROUP_COLUMNS = 64, 64
"""Rows of a warp-group-wide matrix instruction, and the columns below which it gets no faster."""


@dataclass(frozen=True)
class KernelTime:
    """The predicted time of one launch.

    Attributes:
        seconds: with what lies between launches.
        bound: the largest of ``parts``; ``latency`` where programs mostly wait.
        parts: seconds that each resource would take alone, perfectly spread.
        efficiency: of the placement: the time if work were spread evenly over that of the model.
        programs: of the grid that have work.
    """

    name: str
    seconds: float
    bound: str
    parts: Mapping[str, float]
    efficiency: float
    programs: int


HOST = 29e-6
"""Seconds of a layer on the host when launches are made one by one: launches that are kept, torch's
operator and the module around them, as docs/performance.md has them. Measured on a CPU, without the
driver's part."""


@dataclass(frozen=True)
class LayerTime:
    """The predicted time of a layer: its launches, one after the other."""

    kernels: tuple[KernelTime, ...]

    @property
    def seconds(self) -> float:
        """All launches."""
        return sum(kernel.seconds for kernel in self.kernels)

    @property
    def eager(self) -> float:
        """Seconds where launches are made one by one: the host or the card, whichever is later."""
        return max(HOST, self.seconds)

    @property
    def bound(self) -> str:
        """What bounds the kernels that take the most time."""
        weight: dict[str, float] = {}
        for kernel in self.kernels:
            weight[kernel.bound] = weight.get(kernel.bound, 0.0) + kernel.seconds - LAUNCH
        weight["launches"] = LAUNCH * len(self.kernels)
        return max(weight, key=lambda name: weight[name])


def _time(
    card: Card, name: str, counts: Counted, programs: int, work: Work, pipes: Mapping[str, float],
    memory_bytes: float, l2_bytes: float,
) -> KernelTime:  # fmt: skip
    """The largest of placement, memory and level-2 cache, and what is behind it."""
    cost = counts.cost
    resident = card.resident(cost.registers, work.warps, cost.shared_bytes)
    placed = makespan(programs, card.multiprocessors, resident, work) / card.clock
    perfect = ideal(programs, card.multiprocessors, work) / card.clock
    spread = programs / card.multiprocessors / card.clock
    parts = {pipe: clocks * spread for pipe, clocks in pipes.items()}
    parts["memory"] = memory_bytes / card.bytes_per_second
    parts["level 2"] = l2_bytes / (card.l2_gigabytes * 1e9)
    bound = max(parts, key=lambda part: parts[part])
    seconds = max(placed, parts["memory"], parts["level 2"])
    if seconds > 2 * parts[bound]:
        bound = "latency"
    return KernelTime(name, seconds + LAUNCH, bound, parts, perfect / placed, programs)


def _beyond_l2(card: Card, transferred: float) -> float:
    """Bytes of an array between two kernels that come from memory: none if it fits the cache."""
    return transferred if transferred > card.l2_bytes / 2 else 0.0


def product(
    card: Card, shape: Shape, tokens: int, code: ConvolutionalCode, config: GemmConfig, *,
    down: bool, spread: Load | None = None,
) -> KernelTime:  # fmt: skip
    """One projection of a layer: gate and up, or down.

    Args:
        config: any configuration; it is compiled and counted unless `counts.prepare_counts` has
            done so.
        spread: of the tokens over experts; that of a skewed routing by default.
    """
    spread = spread or load(shape, tokens)
    outputs, inputs = (shape.hidden, shape.inner) if down else (2 * shape.inner, shape.hidden)
    counts = counted(Wanted(card.arch, code, config))
    cost, loop = counts.cost, counts.sections[LOOP]
    outside = (counts.sections[PROLOGUE], counts.sections[EPILOGUE])
    if isinstance(config, PackedGemmConfig):
        groups = config.warps * groups_per_warp(code)
        blocks, splits = -(-outputs // decode.group_weights(code) // groups), config.splits
        out_bytes = 4 * splits
    else:
        blocks, splits, out_bytes = -(-outputs // config.block_n), 1, 2
    turns = inputs // config.block_k // splits
    issue = turns * cost.slots + cost.once
    matrix, group_wide = _matrix_clocks(card, counts)
    # Rows of a tile without a token are computed, but not stored.
    row_tiles = spread.row_tiles(config.block_m)
    programs = row_tiles * blocks * splits
    filled = min(1.0, tokens * shape.top_k / (row_tiles * config.block_m))
    traffic = turns * loop.read_bytes + sum(
        part.read_bytes + filled * part.written_bytes for part in outside
    )
    pipes = {
        "issue": config.warps * issue / 4,
        "level 1": counts.l1_clocks(turns, filled),
        "matrix": turns * matrix,
        "level 2": traffic / L2_PORT,
    }
    # A warp has the matrix unit of its scheduler only.
    of_scheduler = max(issue, turns * matrix * 4 / config.warps if not group_wide else 0.0)
    turn = MEMORY_LATENCY / max(1, config.stages - 1)
    barriers = cost.opcodes.get("BAR.SYNC", 0) + group_wide
    if barriers:
        # Decoded weights pass through shared memory, or their registers may not be written before
        # the product is there: a program alone decodes, then multiplies.
        turn = max(turn, ALONE * cost.slots + matrix + barriers * BARRIER)
    work = Work(
        config.warps, of_scheduler, max(pipes["level 1"], pipes["matrix"], pipes["level 2"]),
        turns * turn + ALONE * cost.once, FIRST_LOADS,
    )  # fmt: skip
    assignments = tokens * shape.top_k
    weight_bytes = spread.active * outputs * inputs * code.bits / 8
    x_bytes = 2 * inputs * (assignments if down else tokens)
    result_bytes = out_bytes * assignments * outputs
    memory_bytes = weight_bytes + _beyond_l2(card, x_bytes) + _beyond_l2(card, result_bytes)
    name = f"{'down' if down else 'gate and up'}"
    return _time(card, name, counts, programs, work, pipes, memory_bytes, programs * traffic)


def _matrix_clocks(card: Card, counts: Counted) -> tuple[float, int]:
    """Clocks of a multiprocessor's matrix units for one turn of a program, and the waits for a
    result of a warp-group-wide instruction."""
    clocks, waits = 0.0, 0
    for rows, columns, depth in counts.matrices:
        if rows == GROUP_ROWS:
            groups = counts.warps // 4
            clocks += groups * rows * max(columns, GROUP_COLUMNS) * depth / card.peak
            waits += 1
        else:
            clocks += counts.warps * rows * columns * depth / card.mma
    # In an ordinary product the instructions of a turn are issued together.
    return clocks, waits if counts.cost.opcodes.get("BAR.SYNC", 0) == 0 else min(waits, 1)


def _written(config: GemmConfig) -> tuple[int, str]:
    """Splits and type of what a product writes."""
    return (config.splits, "*fp32") if isinstance(config, PackedGemmConfig) else (1, "*bf16")


def _rotation(
    card: Card, name: str, programs: int, written: tuple[int, str], memory_bytes: float
) -> KernelTime:
    """One of the kernels between the products; they have no main loop."""
    counts = counted(WantedRotation(card.arch, name, *written))
    part = counts.sections[PROLOGUE]
    issue = counts.executed  # the code of both halves of `prepare` is in the static count
    traffic = part.read_bytes + part.written_bytes
    pipes = {
        "issue": counts.warps * issue / 4, "level 1": part.clocks, "level 2": traffic / L2_PORT
    }  # fmt: skip
    work = Work(
        counts.warps, issue, max(pipes["level 1"], pipes["level 2"]), ALONE * issue,
        L2_LATENCY + MEMORY_LATENCY,
    )  # fmt: skip
    return _time(card, name, counts, programs, work, pipes, memory_bytes, programs * traffic)


def predict(
    card: Card, shape: Shape, tokens: int, code: ConvolutionalCode, tuning: Tuning | None = None,
    configs: tuple[GemmConfig, GemmConfig] | None = None, spread: Load | None = None,
) -> LayerTime:  # fmt: skip
    """A layer on packed weights, as a tuning table or two configurations run it.

    Args:
        tuning: the card's shipped table by default.
        configs: of gate and up, and of down, instead of a table.
        spread: of the tokens over experts; that of a skewed routing by default.
    """
    first, second = configs or layer_configs(card, shape, tokens, code, tuning)
    spread = spread or load(shape, tokens)
    assignments = tokens * shape.top_k
    written = [_written(first), _written(second)]
    width = [splits * (4 if kind == "*fp32" else 2) for splits, kind in written]
    prepared, swiglu, combined = rotate_programs(shape, tokens)
    gate_up_bytes = width[0] * assignments * 2 * shape.inner
    down_bytes = width[1] * assignments * shape.hidden
    prepare = _rotation(card, "prepare", prepared, (1, "*fp32"), 2 * tokens * shape.hidden)
    scans = 2 * -(-assignments // SCAN)
    sorting = (FIRST_LOADS + scans * SORT_SCAN) / card.clock + LAUNCH
    if sorting > prepare.seconds:
        prepare = replace(prepare, seconds=sorting, bound="latency")
    return LayerTime((
        prepare,
        product(card, shape, tokens, code, first, down=False, spread=spread),
        _rotation(card, "swiglu_rotate", swiglu, written[0], _beyond_l2(card, gate_up_bytes)),
        product(card, shape, tokens, code, second, down=True, spread=spread),
        _rotation(card, "combine", combined, written[1], _beyond_l2(card, down_bytes)),
    ))  # fmt: skip


def layer_configs(
    card: Card, shape: Shape, tokens: int, code: ConvolutionalCode, tuning: Tuning | None = None
) -> tuple[GemmConfig, GemmConfig]:
    """The configurations of gate and up, and of down, that a table chooses."""
    tuning = tuning or tables()[card.table]
    row = tuning.row(tokens * shape.top_k / shape.experts)
    first, second = (
        tuning.config(row, code, outputs, inputs, shape.experts, shape.top_k)
        for outputs, inputs in ((2 * shape.inner, shape.hidden), (shape.hidden, shape.inner))
    )
    return first, second


def bf16(card: Card, shape: Shape, tokens: int, spread: Load | None = None) -> LayerTime:
    """A layer in bfloat16, as the best of grouped products would run it.

    Its products reach `GEMM_REACHED` of the matrix units' peak or the whole memory bandwidth, wait
    for their first loads like ours, and pass bfloat16 results; the launches between them are as
    many as ours and take no time beside the launch and their traffic.
    """
    spread = spread or load(shape, tokens)
    assignments = tokens * shape.top_k
    kernels = []
    for name, outputs, inputs in (
        ("gate and up", 2 * shape.inner, shape.hidden), ("down", shape.hidden, shape.inner)
    ):  # fmt: skip
        weight_bytes = 2 * spread.active * outputs * inputs
        passed = 2 * assignments * (outputs + inputs)
        parts = {
            "memory": (weight_bytes + _beyond_l2(card, passed)) / card.bytes_per_second,
            "matrix": assignments
            * outputs
            * inputs
            / (card.multiprocessors * card.clock * card.peak * GEMM_REACHED),
        }
        bound = max(parts, key=lambda part: parts[part])
        seconds = parts[bound] + FIRST_LOADS / card.clock + LAUNCH
        kernels.append(KernelTime(name, seconds, bound, parts, 1.0, 0))
    for name, traffic in (
        ("sort", 2 * tokens * shape.hidden), ("swiglu", 6 * assignments * shape.inner),
        ("combine", 2 * assignments * shape.hidden),
    ):  # fmt: skip
        memory = _beyond_l2(card, traffic) / card.bytes_per_second
        waiting = (L2_LATENCY + MEMORY_LATENCY) / card.clock
        kernels.append(
            KernelTime(name, memory + waiting + LAUNCH, "memory", {"memory": memory}, 1.0, 0)
        )
    return LayerTime(tuple(kernels))


def wanted(
    card: Card, shape: Shape, tokens: int, code: ConvolutionalCode, tuning: Tuning | None = None
) -> list[Wanted | WantedRotation]:
    """What `predict` has counted, to be counted in parallel before."""
    configs = layer_configs(card, shape, tokens, code, tuning)
    written = [_written(config) for config in configs]
    return [
        *(Wanted(card.arch, code, config) for config in configs),
        WantedRotation(card.arch, "prepare", 1, "*fp32"),
        WantedRotation(card.arch, "swiglu_rotate", *written[0]),
        WantedRotation(card.arch, "combine", *written[1]),
    ]
