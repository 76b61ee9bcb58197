"""What a process takes of a CUDA device's memory by the driver's count, which is what a budget is about.

torch counts its own allocations. The driver counts the context, loaded kernels and libraries' workspaces as well.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pynvml
import torch
import torch.nn.functional as F

from services.sampler.faults import failed_allocations

# Kernels are loaded when they are first used: what a first picture was seen to add after `warm_up` (430 MiB with
# compiled blocks), and what may come at any time after it.
FIRST_BYTES, LATER_BYTES = 512 << 20, 96 << 20
STEP_BYTES = 32 << 20


class Vram:
    """The memory of one device as this process uses it. Make it before the process first touches the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        before = pynvml.nvmlDeviceGetMemoryInfo(self._handle).used
        warm_up(device)
        self._context_bytes: int = pynvml.nvmlDeviceGetMemoryInfo(self._handle).used - before

    def process_bytes(self) -> int:
        """What this process takes; where the driver does not list it, torch's count and the context as first seen."""
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(self._handle):
            if process.pid == os.getpid() and process.usedGpuMemory:
                return int(process.usedGpuMemory)
        return torch.cuda.memory_reserved(self._device) + self._context_bytes

    def shortages(self) -> dict[str, tuple[int, str]]:
        """How often torch's allocator was short of memory: counts, and what they mean."""
        retries = torch.cuda.memory_stats(self._device)["num_alloc_retries"]
        failures = failed_allocations(self._device)
        return {
            "retries": (retries, "Allocations that had to give cached memory back first."),
            "failures": (failures, "Allocations that failed; what asked may have found another way."),
        }

    def outside_bytes(self) -> int:
        """What this process takes beside torch's allocations."""
        return self.process_bytes() - torch.cuda.memory_reserved(self._device)


class Outside:
    """What a process takes of its device beside torch's allocations, now and soon; `outside` says what it takes now."""

    def __init__(self, outside: Callable[[], int]) -> None:
        self._outside = outside
        self._first_bytes = outside() + FIRST_BYTES

    def look(self) -> int:
        """Bytes; in steps, so that plans do not change with every kernel that is loaded."""
        expected = max(self._first_bytes, self._outside() + LATER_BYTES)
        return -(-expected // STEP_BYTES) * STEP_BYTES


def warm_up(device: torch.device) -> None:
    """Load what every pipeline needs: the context, matrix products, convolutions, attention."""
    for dtype in (torch.float32, torch.bfloat16):
        square = torch.ones(1, 1, 128, 128, device=device, dtype=dtype)
        F.conv2d(square @ square, torch.ones(1, 1, 3, 3, device=device, dtype=dtype))
        F.scaled_dot_product_attention(square, square, square)
    torch.cuda.synchronize(device)
    del square
    torch.cuda.empty_cache()
