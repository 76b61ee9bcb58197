"""Device memory as the driver counts it: everything of a process, the CUDA context and the libraries' own included."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pynvml
import torch

PERIOD_S = 0.02


@dataclass
class Peak:
    """The most that was seen; None without a CUDA device. way: how it was told from other processes' memory."""

    used_bytes: int | None = None
    way: str = ""


class Watch:
    """One device's memory. Make it before the process to be watched starts."""

    def __init__(self, device: torch.device) -> None:
        self._handle = None
        if device.type == "cuda":
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
            self._before: int = pynvml.nvmlDeviceGetMemoryInfo(self._handle).used

    def used(self, pid: int) -> Peak:
        """What process `pid` takes now. Where the driver does not list it, as in a container with process numbers of
        its own, it is what the device has in use beyond what it had; other users must stay as they were."""
        if self._handle is None:
            return Peak()
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(self._handle):
            if process.pid == pid and process.usedGpuMemory:
                return Peak(int(process.usedGpuMemory), "the process")
        used = pynvml.nvmlDeviceGetMemoryInfo(self._handle).used - self._before
        return Peak(used, "the device, less what was in use before")

    @contextmanager
    def of(self, pid: int) -> Iterator[Peak]:
        """The peak of process `pid` in this block, looked at every 20 ms."""
        peak, over = Peak(), threading.Event()

        def look() -> None:
            while not over.is_set():
                now = self.used(pid)
                if now.used_bytes is not None and now.used_bytes >= (peak.used_bytes or 0):
                    peak.used_bytes, peak.way = now.used_bytes, now.way
                time.sleep(PERIOD_S)

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield peak
        finally:
            over.set()
            thread.join()
