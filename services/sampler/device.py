"""The device that a sampler computes on: what it is, how much of it may be used, and how params get there."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from services.sampler.budget import GIB, UNLIMITED_BYTES, Budget, budget_bytes
from services.sampler.config import Config, ConfigError
from services.sampler.driver import Driver
from services.sampler.graphs import Graphs
from services.sampler.recorder import CudaRecorder
from services.sampler.registration import Registrar, Way
from services.sampler.ring import Ring
from services.sampler.tiling import TileRule
from services.sampler.transfer import ArenaViews, Transfer
from services.sampler.vram import Outside, Vram


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What status says of the device; bytes."""

    device: torch.device
    name: str
    budget_bytes: int  # 0: none
    graph_bytes: int = 0  # of the budget, for CUDA graphs
    vram: Vram | None = None  # None on a CPU

    def used_bytes(self) -> int:
        """VRAM that this process takes, by the driver's count."""
        return self.vram.process_bytes() if self.vram is not None else 0


def open_device(config: Config) -> tuple[Transfer, DeviceFacts]:
    """The transfer for the configured device. Raises ConfigError if there is no such device or budget."""
    device = resolve_device(config.device)
    if device.type == "cpu":
        if config.test_ring:
            total = round(max(config.max_vram_gib, 0) * GIB)
            ring = Ring(device, Budget(total or UNLIMITED_BYTES), keep_residents=False, poison=True)
            return ring, DeviceFacts(device, "CPU, poisoned ring", total)
        return ArenaViews(), DeviceFacts(device, "CPU", 0)
    vram = Vram(device)
    torch.cuda.set_device(device)
    free, total = torch.cuda.mem_get_info(device)
    total_bytes = budget_bytes(config.max_vram_gib, free)
    outside = Outside(vram.outside_bytes)

    def budget_now() -> Budget:
        budget = Budget(total_bytes, outside.look(), config.cuda_graphs, free)
        # The allocator's own limit makes the budget a hard one, whatever our plan says.
        torch.cuda.set_per_process_memory_fraction(min(max(0.0, budget.own_bytes / total), 1.0), device)
        return budget

    budget = budget_now()
    if budget.own_bytes <= 0 and not config.attach:  # else attaching is refused with what the model needs as well
        least = budget.outside_bytes / GIB
        raise ConfigError(f"--max-vram {config.max_vram_gib:g}: CUDA alone takes {least:.2f} GiB; allow more than that")
    registrar = Registrar(device, Driver(), Way[config.page_lock.upper().replace("-", "_")])
    ring = Ring(device, budget, config.stream_layers, registrar=registrar, budget_now=budget_now)
    name = torch.cuda.get_device_name(device)
    return ring, DeviceFacts(device, name, budget.total_bytes, budget.graph_bytes, vram)


def open_graphs(facts: DeviceFacts) -> Graphs | None:
    """Graphs of blocks in the part of the budget that is theirs."""
    device = facts.device
    return Graphs(device, CudaRecorder(device), facts.graph_bytes) if facts.graph_bytes else None


def tile_rule(config: Config, device: torch.device) -> TileRule:
    """When pictures are decoded in tiles: by the budget that the configuration names, if it names one."""
    named = device.type == "cuda" and config.max_vram_gib > 0  # others depend on what is free, or are none
    return TileRule(config.tiled_decode, round(config.max_vram_gib * GIB) if named else 0)


def resolve_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` as a device that is there. Raises ConfigError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name}: use auto, cpu, cuda or cuda:N") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda" or (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices; use auto or cpu")
    return torch.device("cuda", device.index or 0)
