"""The VRAM budget: what `--max-vram` means, whom it is for, and the least that would do. Knows sizes, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from services.errors import DeviceMemoryFull

GIB = 1 << 30
UNLIMITED_BYTES = 1 << 62
# Graphs of a picture of 1024x688 of Z-Image take some 300 MB; larger ones are not bound by launches.
GRAPHS_BYTES = 512 << 20
# Part of a small budget.
GRAPHS_SHARE = 16


@dataclass(frozen=True, slots=True)
class Budget:
    """What this process may take of its device: CUDA itself, then graphs, then the ring's params and pictures' work."""

    total_bytes: int
    outside_bytes: int = 0  # CUDA's context and kernels, which torch does not count
    has_graphs: bool = False
    free_bytes: int = UNLIMITED_BYTES  # what no budget can exceed

    @property
    def own_bytes(self) -> int:
        """What torch may allocate; not above 0 if CUDA alone takes all."""
        return self.total_bytes - self.outside_bytes

    @property
    def graph_bytes(self) -> int:
        return min(GRAPHS_BYTES, max(0, self.own_bytes) // GRAPHS_SHARE) if self.has_graphs else 0

    @property
    def ring_bytes(self) -> int:
        """For params and work."""
        return self.own_bytes - self.graph_bytes

    def least_bytes(self, ring_bytes: int) -> int:
        """The smallest total that leaves the ring so much."""
        # Graphs get a share of their sum with the ring: one for every GRAPHS_SHARE - 1 of the ring, if it is full.
        graphs = min(GRAPHS_BYTES, max(0, ring_bytes - 1) // (GRAPHS_SHARE - 1)) if self.has_graphs else 0
        return self.outside_bytes + ring_bytes + graphs

    def too_small(self, params_bytes: int, work_bytes: int) -> DeviceMemoryFull:
        """What to say if params and work do not fit: the budget that would do, or that none would."""
        least = self.least_bytes(params_bytes + work_bytes)
        others = least - params_bytes - work_bytes
        parts = f"{params_bytes / GIB:.2f} GiB for params and {work_bytes / GIB:.2f} for the work of pictures"
        if others:
            parts += f", {others / GIB:.2f} for CUDA and its graphs"
        short = f"; only {self.free_bytes / GIB:.2f} GiB of the device are free" if least > self.free_bytes else ""
        return DeviceMemoryFull(
            f"the VRAM budget of {gib_down(self.total_bytes)} GiB is too small: --max-vram {gib_up(least)} is the "
            f"least that works ({parts}){short}"
        )


def budget_bytes(max_vram_gib: float, free_bytes: int) -> int:
    """`--max-vram` as stable-diffusion.cpp means it: GiB; negative: what is free less that; 0: all that is free."""
    if max_vram_gib > 0:
        return min(round(max_vram_gib * GIB), free_bytes)
    return free_bytes + round(max_vram_gib * GIB)


def gib_down(size_bytes: int) -> str:
    """No more than so many bytes, unless they were a fraction of one below two decimals."""
    return f"{(size_bytes + 1) * 100 // GIB / 100:.2f}"


def gib_up(size_bytes: int) -> str:
    """A `--max-vram` of two decimals that is no less than so many bytes."""
    return f"{-(-size_bytes * 100 // GIB) / 100:.2f}"
