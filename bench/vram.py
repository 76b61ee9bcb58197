"""Device memory as the driver counts it: everything of a process, the CUDA context and the libraries' own included."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

PERIOD_S = 0.02
NOT_AVAILABLE = 2**64 - 1
PROCESS_LIMIT = 64


class ProcessInfo(ctypes.Structure):
    """nvmlProcessInfo_t, version 3 of nvmlDeviceGetComputeRunningProcesses."""

    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used_bytes", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


class MemoryInfo(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class Driver:
    """NVML's view of one CUDA device. Raises OSError where there is no NVML."""

    def __init__(self, device: torch.device) -> None:
        self._nvml = ctypes.CDLL("libnvidia-ml.so.1")
        self._handle = ctypes.c_void_p()
        self._check(self._nvml.nvmlInit_v2())
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
        if self._nvml.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(self._handle)):
            self._check(self._nvml.nvmlDeviceGetHandleByIndex_v2(device.index or 0, ctypes.byref(self._handle)))

    def used_bytes(self) -> int:
        """Memory of the device that anybody uses."""
        info = MemoryInfo()
        self._check(self._nvml.nvmlDeviceGetMemoryInfo(self._handle, ctypes.byref(info)))
        return int(info.used)

    def process_bytes(self, pid: int) -> int | None:
        """Memory of one process; None if the driver does not say, as in a container with process numbers of its own."""
        count = ctypes.c_uint(PROCESS_LIMIT)
        infos = (ProcessInfo * PROCESS_LIMIT)()
        call = self._nvml.nvmlDeviceGetComputeRunningProcesses_v3
        self._check(call(self._handle, ctypes.byref(count), infos))
        found = [int(info.used_bytes) for info in infos[: count.value] if info.pid == pid]
        return found[0] if found and found[0] != NOT_AVAILABLE else None

    def _check(self, status: int) -> None:
        if status:
            raise OSError(f"NVML answered {status}")


@dataclass
class Peak:
    """The most that was seen; None without a CUDA device. way: how it was told from other processes' memory."""

    used_bytes: int | None = None
    way: str = ""


class Watch:
    """Samples a process's device memory in a thread, from `of` on, until it is left."""

    def __init__(self, device: torch.device) -> None:
        self._driver = Driver(device) if device.type == "cuda" else None
        self._before = self._driver.used_bytes() if self._driver else 0  # of others, before the process starts

    @contextmanager
    def of(self, pid: int) -> Iterator[Peak]:
        """The peak of process `pid` in this block; whatever else uses the device must stay as it was."""
        peak = Peak()
        over = threading.Event()
        thread = threading.Thread(target=self._sample, args=(pid, peak, over), daemon=True)
        if self._driver:
            thread.start()
        try:
            yield peak
        finally:
            over.set()
            if self._driver:
                thread.join()

    def _sample(self, pid: int, peak: Peak, over: threading.Event) -> None:
        assert self._driver is not None
        while not over.is_set():
            used = self._driver.process_bytes(pid)
            peak.way = "the process" if used is not None else "the device, less what was used before"
            if used is None:
                used = self._driver.used_bytes() - self._before
            peak.used_bytes = max(peak.used_bytes or 0, used)
            time.sleep(PERIOD_S)
