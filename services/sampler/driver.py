"""Page-locking through the CUDA driver's own interface.

Not through the runtime's, which torch wraps: what it refuses it reports a second time, to whatever torch does next.
"""

from __future__ import annotations

import ctypes

READ_ONLY_SUPPORTED = 113  # CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED
READ_ONLY = 0x08  # CU_MEMHOSTREGISTER_READ_ONLY


class Driver:
    """The driver of the machine; calls need a thread whose current device was set. Raises OSError if there is none."""

    def __init__(self) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1")

    def locks_read_only(self, device_index: int) -> bool:
        """Whether the device page-locks memory that the process may not write."""
        device, value = ctypes.c_int(), ctypes.c_int()
        if self._cuda.cuDeviceGet(ctypes.byref(device), device_index):
            return False
        return not self._cuda.cuDeviceGetAttribute(ctypes.byref(value), READ_ONLY_SUPPORTED, device) and value.value > 0

    def lock(self, address: int, size_bytes: int, read_only: bool) -> int:
        """Page-lock memory; 0, or the driver's error number."""
        flags = READ_ONLY if read_only else 0
        return int(
            self._cuda.cuMemHostRegister_v2(ctypes.c_void_p(address), ctypes.c_size_t(size_bytes), ctypes.c_uint(flags))
        )

    def unlock(self, address: int) -> int:
        """Undo `lock` at the same address; 0, or the driver's error number."""
        return int(self._cuda.cuMemHostUnregister(ctypes.c_void_p(address)))
