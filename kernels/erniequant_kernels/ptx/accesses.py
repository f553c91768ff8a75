"""Sectors, lines and shared-memory wavefronts of a kernel's memory instructions, and their cost.

The model of a multiprocessor's level-1 pipe (NVIDIA's Nsight Compute guide, "L1/TEX cache" and
"shared memory"; the same on sm_80 and sm_90):

* Memory comes in sectors of 32 bytes and lines of 128. A warp's access to global memory looks up
  one line per clock, and its data pass 128 bytes per clock: a request takes as many clocks as it
  touches lines, since four sectors of one line pass at once.
* Shared memory has 32 banks of four bytes. Lanes are served in phases of 128 bytes: all 32 at up
  to four bytes a lane, 16 at eight, 8 at sixteen or for one matrix of ``ldmatrix``. A phase takes a
  clock (a wavefront) for each different word in its busiest bank; more than one is a conflict.
* An asynchronous copy does both: it looks its lines up, then its data enter shared memory with the
  wavefronts of a store. The two are pipelined, so it takes the larger number of clocks.
* A warp-group-wide matrix instruction reads its operands from shared memory at 128 bytes a clock
  without conflicts (the layouts it accepts have none).

All warps of a multiprocessor share this pipe, while each of its four schedulers issues one
instruction a clock: one clock here is worth four issue slots.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from erniequant_kernels.ptx.launch import Launched, Section
from erniequant_kernels.ptx.machine import WARP
from erniequant_kernels.ptx.memory import Access
from erniequant_kernels.ptx.values import Array

SECTOR, LINE, BANKS, BANK = 32, 128, 32, 4
PROLOGUE, LOOP, EPILOGUE = "prologue", "loop", "epilogue"
SECTIONS = (PROLOGUE, LOOP, EPILOGUE)


@dataclass(frozen=True)
class Traffic:
    """What one memory instruction does, summed over the warps of a program.

    Counts are averages over the programs that ran, and over the turns for an instruction of the
    main loop.

    Attributes:
        place: index of the instruction; an asynchronous copy has two entries, one a space.
        section: ``prologue``, ``loop`` or ``epilogue``; a kernel without a main loop has only a
            prologue.
        instruction: as written, with its place in the source.
        space: ``global`` or ``shared``.
        width: bytes of a lane.
        requests: warps that accessed memory, with at least one lane.
        sectors, least_sectors: touched, and the least that could hold the bytes of each request.
        wasted_sectors: of those touched, the ones of which some bytes are used by no access of the
            section, by this instruction or another.
        lines: 128-byte lines touched.
        bytes: different bytes of each request.
        wavefronts, conflicts: clocks of shared memory, and those beyond one a phase.
    """

    place: int
    section: str
    instruction: str
    space: str
    store: bool
    width: int
    requests: float
    sectors: float = 0.0
    least_sectors: float = 0.0
    wasted_sectors: float = 0.0
    lines: float = 0.0
    bytes: float = 0.0
    wavefronts: float = 0.0
    conflicts: float = 0.0

    @property
    def uncoalesced(self) -> bool:
        """Whether more sectors are touched than the bytes would fill, and not for the sake of other
        accesses: the words before runs of groups lie in sectors that the runs fill."""
        return self.sectors > self.least_sectors * 1.001 and self.wasted_sectors > 0


def _different(rows: Array) -> Array:
    """Sorted rows and where each value differs from the one before it: bool ``[n, m]``."""
    first = np.ones(rows.shape, bool)
    first[:, 1:] = rows[:, 1:] != rows[:, :-1]
    return first


def _by_warp(access: Access) -> tuple[Array, Array]:
    """Addresses ``[warps, 32]`` of warps with an active lane, and which lanes are active."""
    addresses = access.addresses.reshape(-1, WARP).astype(np.int64)
    active = np.ones(addresses.shape, bool)
    if access.active is not None:
        active = access.active.reshape(-1, WARP)
    some = active.any(axis=1)
    return addresses[some], active[some]


def global_counts(addresses: Array, active: Array, width: int) -> tuple[int, int, int, int]:
    """Sectors, least sectors, lines and different bytes of warps.

    Args:
        addresses: integer ``[warps, 32]``; ``active``: bool of that shape, a lane in each row.
        width: bytes of a lane, at most a sector.
    """
    some = np.where(active, addresses, np.max(np.where(active, addresses, 0), axis=1)[:, None])
    units = np.sort(some // width, axis=1)
    unit_is_new = _different(units)
    used = unit_is_new.sum(axis=1) * width
    sectors = int(_different(units * width // SECTOR).sum())
    lines = int(_different(units * width // LINE).sum())
    return sectors, int((-(-used // SECTOR)).sum()), lines, int(used.sum())


def shared_counts(addresses: Array, active: Array, width: int) -> tuple[int, int]:
    """Wavefronts and phases of warps; arguments as for `global_counts`."""
    lanes = max(1, min(WARP, BANKS * BANK // width))
    words_each = max(1, width // BANK)
    words = addresses[:, :, None] // BANK + np.arange(words_each)
    words = words.reshape(-1, lanes * words_each)
    used = np.repeat(active[:, :, None], words_each, axis=2).reshape(words.shape)
    some = used.any(axis=1)
    words, used = words[some], used[some]
    words = np.sort(
        np.where(used, words, np.max(np.where(used, words, -1), axis=1)[:, None]), axis=1
    )
    new = _different(words)
    row = np.broadcast_to(np.arange(len(words))[:, None], words.shape)
    busy = np.bincount((row * BANKS + words % BANKS)[new], minlength=len(words) * BANKS)
    return int(busy.reshape(-1, BANKS).max(axis=1).sum()), len(words)


def _section(place: int, loop: Section | None) -> str:
    if loop is None or place < loop.first:
        return PROLOGUE
    return LOOP if place <= loop.last else EPILOGUE


def _half_used(launched: Launched, loop: Section | None) -> dict[tuple[str, bool], Array]:
    """Sectors of which loads, or stores, of a section use some words and not all."""
    words: dict[tuple[str, bool], list[Array]] = defaultdict(list)
    for machine in launched.machines:
        for access in machine.accesses:
            if access.space == "global":
                addresses = access.addresses[machine.active(access.active)].astype(np.int64)
                each = addresses[:, None] // BANK + np.arange(max(1, access.width // BANK))
                words[_section(access.place, loop), access.store].append(np.unique(each))
    result = {}
    for key, parts in words.items():
        sectors, used = np.unique(
            np.unique(np.concatenate(parts)) // (SECTOR // BANK), return_counts=True
        )
        result[key] = sectors[used < SECTOR // BANK]
    return result


def _touched(addresses: Array, active: Array, sectors: Array) -> int:
    """How many of some sectors warps touch."""
    rows = np.sort(np.where(active, addresses // SECTOR, -1), axis=1)
    return int((_different(rows) & np.isin(rows, sectors)).sum())


def traffic(launched: Launched) -> list[Traffic]:
    """What every memory instruction of a recorded launch did, in the order of the code."""
    loop, turns = launched.loop, launched.turns
    programs = sum(len(machine.programs) for machine in launched.machines)
    groups: dict[tuple[int, str], list[Access]] = defaultdict(list)
    for access in (a for machine in launched.machines for a in machine.accesses):
        groups[access.place, access.space].append(access)
    half_used = _half_used(launched, loop)
    found = []
    for (place, space), accesses in sorted(groups.items()):
        section = _section(place, loop)
        share = 1 / (programs * (turns if section == LOOP else 1))
        addresses, active = (
            np.concatenate(parts) for parts in zip(*map(_by_warp, accesses), strict=True)
        )
        width, counts = accesses[0].width, dict[str, float]()
        given = sum(one.wavefronts for one in accesses)
        if given:
            counts = {"wavefronts": given * share}
        elif len(addresses) and space == "global":
            sectors, least, lines, total = global_counts(addresses, active, width)
            wasted = _touched(addresses, active, half_used[section, accesses[0].store])
            counts = {
                "sectors": sectors * share, "least_sectors": least * share, "lines": lines * share,
                "bytes": total * share, "wasted_sectors": wasted * share,
            }  # fmt: skip
        elif len(addresses):
            wavefronts, phases = shared_counts(addresses, active, width)
            counts = {
                "wavefronts": wavefronts * share, "conflicts": (wavefronts - phases) * share,
            }  # fmt: skip
        instruction = str(launched.program.instructions[place])
        requests = (len(accesses) if given else len(addresses)) * share
        found.append(
            Traffic(
                place, section, instruction, space, accesses[0].store, width, requests, **counts
            )
        )
    return found


def clocks(of: Iterable[Traffic]) -> float:
    """Clocks of the level-1 pipe for some instructions."""
    by_instruction: dict[int, float] = defaultdict(float)
    for one in of:
        own = max(one.lines, one.wavefronts)
        by_instruction[one.place] = max(by_instruction[one.place], own)
    return sum(by_instruction.values())


@dataclass(frozen=True)
class Totals:
    """The accesses of one section, summed over the warps of a program (and one turn of the loop).

    Attributes:
        clocks: of the level-1 pipe; ``store_clocks``: of these, for stores to global memory.
        requests, sectors, least_sectors: of global accesses.
        uncoalesced: requests that touch more sectors than their bytes would fill.
        wavefronts, conflicts: clocks of shared memory, and those beyond one a phase.
        read_bytes, written_bytes: of different sectors, so what passes the level-2 cache if the
            level-1 cache holds the sectors of one turn.
    """

    clocks: float
    store_clocks: float
    requests: float
    sectors: float
    least_sectors: float
    uncoalesced: float
    wavefronts: float
    conflicts: float
    read_bytes: float
    written_bytes: float


def totals(launched: Launched, found: Sequence[Traffic]) -> dict[str, Totals]:
    """Sums by section; every section is there."""
    loop, turns = launched.loop, launched.turns
    programs = sum(len(machine.programs) for machine in launched.machines)
    different: dict[tuple[str, bool], set[tuple[int, int]]] = defaultdict(set)
    for number, machine in enumerate(launched.machines):
        for access in machine.accesses:
            if access.space != "global":
                continue
            lanes = machine.active(access.active)
            program = number * len(launched.machines[0].programs) + lanes // machine.threads
            sectors = access.addresses[lanes] // np.uint64(SECTOR)
            key = _section(access.place, loop), access.store
            different[key].update(zip(program.tolist(), sectors.tolist(), strict=True))
    result = {}
    for section in SECTIONS:
        share = SECTOR / (programs * (turns if section == LOOP else 1))
        own = [one for one in found if one.section == section]
        everywhere = [one for one in own if one.space == "global"]
        result[section] = Totals(
            clocks=clocks(own),
            store_clocks=clocks(one for one in everywhere if one.store),
            requests=sum(one.requests for one in everywhere),
            sectors=sum(one.sectors for one in everywhere),
            least_sectors=sum(one.least_sectors for one in everywhere),
            uncoalesced=sum(one.requests for one in everywhere if one.uncoalesced),
            wavefronts=sum(one.wavefronts for one in own),
            conflicts=sum(one.conflicts for one in own),
            read_bytes=share * len(different[section, False]),
            written_bytes=share * len(different[section, True]),
        )
    return result
