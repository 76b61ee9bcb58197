"""Calls on mapped memory that Python's mmap has not, or makes while it keeps all other threads waiting."""

import ctypes
import errno
import mmap
import os
import platform
from collections.abc import Sequence
from enum import IntEnum

_MAP_FIXED = 0x10
_MADV_POPULATE_WRITE = 23
# The C library has no such function; numbers of system calls differ between machines.
_MBIND = {"x86_64": 237, "aarch64": 235}


class Policy(IntEnum):
    """Where the kernel takes new pages from; its own numbers."""

    PREFERRED = 1  # one node
    INTERLEAVE = 3
    PREFERRED_MANY = 5  # Linux 5.15

    @classmethod
    def of_preferred(cls, count: int) -> "Policy":
        return cls.PREFERRED if count == 1 else cls.PREFERRED_MANY


def map_over(address: int, size_bytes: int, protection: int, fd: int, offset: int) -> None:
    """Map the file at `offset` in the place of what is mapped at `address`: the same bytes, with other rights."""
    call = c_library().mmap
    call.restype = ctypes.c_void_p
    number = ctypes.c_long
    mapped = call(
        ctypes.c_void_p(address),
        ctypes.c_size_t(size_bytes),
        protection,
        mmap.MAP_SHARED | _MAP_FIXED,
        fd,
        number(offset),
    )
    if mapped != address:
        raise _error()
    c_library().madvise(ctypes.c_void_p(address), ctypes.c_size_t(size_bytes), mmap.MADV_DONTDUMP)


def protect(address: int, size_bytes: int, protection: int) -> None:
    if c_library().mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size_bytes), protection):
        raise _error()


def populate(address: int, size_bytes: int) -> bool:
    """Have memory for whole pages that may be written, in one call instead of a fault for each.

    False if the kernel cannot (before Linux 5.14). Raises OSError with ENOSPC if there is no memory for them.
    """
    if not c_library().madvise(ctypes.c_void_p(address), ctypes.c_size_t(size_bytes), _MADV_POPULATE_WRITE):
        return True
    error = _error()
    if error.errno == errno.EINVAL:
        return False
    # A store there would be a SIGBUS, which the kernel reports as a bad address.
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if error.errno == errno.EFAULT else error


def set_policy(address: int, size_bytes: int, policy: Policy, nodes: Sequence[int]) -> None:
    """Have the file of a tmpfs that is mapped at `address` take its new pages from some NUMA nodes; none of it moves.

    Raises OSError: EINVAL for nodes that the process may not use, EPERM where a container forbids it, ENOSYS.
    """
    if platform.machine() not in _MBIND:
        raise OSError(errno.ENOSYS, f"mbind is not known on {platform.machine()}")
    word_bits = 8 * ctypes.sizeof(ctypes.c_ulong)
    mask = (ctypes.c_ulong * (max(nodes) // word_bits + 1))()
    for node in nodes:
        mask[node // word_bits] |= 1 << node % word_bits
    number, flags = ctypes.c_long(_MBIND[platform.machine()]), ctypes.c_uint(0)
    bits = ctypes.c_ulong(len(mask) * word_bits + 1)  # the kernel takes one off
    place = ctypes.c_void_p(address), ctypes.c_size_t(size_bytes)
    if c_library().syscall(number, *place, ctypes.c_int(policy), mask, bits, flags):
        raise _error()


def address_of(memory: memoryview) -> int:
    """Where memory that may be written lies; valid while the caller keeps it."""
    return ctypes.addressof((ctypes.c_char * 0).from_buffer(memory))


def c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _error() -> OSError:
    return OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
