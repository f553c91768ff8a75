"""Cards that times are predicted for: their specified figures, and a few published measurements."""

from dataclasses import dataclass

REACHED = 0.9  # share of the specified memory bandwidth that a large copy reaches


@dataclass(frozen=True)
class Card:
    """The figures of a card.

    Attributes:
        arch: architecture whose machine code is counted; Ada runs the code of sm_80.
        table: tuning table that the card uses.
        gigabytes: memory bandwidth in GB/s, as specified.
        l2_gigabytes: bandwidth of the level-2 cache in GB/s; ``l2_bytes``: its size.
        mma, peak: bf16 multiply-adds with float32 sums per clock and multiprocessor, by the
            warp-wide matrix instruction and by the fastest one.
        warps, programs, shared_bytes: most that a multiprocessor holds.
    """

    name: str
    arch: int
    table: str
    multiprocessors: int
    gigahertz: float
    gigabytes: float
    l2_gigabytes: float
    l2_bytes: float
    mma: float
    peak: float
    warps: int
    programs: int
    shared_bytes: int

    @property
    def clock(self) -> float:
        """Clocks per second."""
        return self.gigahertz * 1e9

    @property
    def bytes_per_second(self) -> float:
        """Memory bandwidth that a kernel can reach."""
        return REACHED * self.gigabytes * 1e9

    def resident(self, registers: int, warps: int, shared_bytes: int) -> int:
        """Programs of so many registers a lane, warps and shared bytes that a multiprocessor holds.

        Registers are given to warps in units of 256, and each program takes 1 KiB of shared memory
        beside its own. A multiprocessor has 65536 registers.
        """
        of_warp = -(-registers * 32 // 256) * 256
        limits = (
            65536 // (of_warp * warps),
            self.warps // warps,
            self.programs,
            self.shared_bytes // (shared_bytes + 1024),
        )
        return max(1, min(limits))


# Hopper's warp-wide instruction reaches about five eighths of the peak of the warp-group-wide one
# in published micro-benchmarks.
#
# Level 2: A100 and H100 are specified with 5120 bytes per clock, of which 80 % are assumed.
# Ordinary products in tiles of 128 by 256, which exceed 600 TFLOPS on an H100, draw about that. RTX
# 4090: as measured in published micro-benchmarks.
CARDS = (
    Card("RTX 4090", 80, "default", 128, 2.52, 1008, 5000, 72e6, 256, 256, 48, 24, 100 << 10),
    Card("A100 80 GB", 80, "sm_80", 108, 1.41, 2039, 5800, 40e6, 1024, 1024, 64, 32, 164 << 10),
    Card("H100 SXM", 90, "sm_90", 132, 1.755, 3350, 7200, 50e6, 1280, 2048, 64, 32, 228 << 10),
    Card("H200", 90, "sm_90", 132, 1.755, 4800, 7200, 50e6, 1280, 2048, 64, 32, 228 << 10),
)
