"""Calls on mapped memory that Python's mmap has not, or makes while it keeps all other threads waiting."""

import ctypes
import errno
import mmap
import os

_MAP_FIXED = 0x10
_MADV_POPULATE_WRITE = 23


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


def address_of(memory: memoryview) -> int:
    """Where memory that may be written lies; valid while the caller keeps it."""
    return ctypes.addressof((ctypes.c_char * 0).from_buffer(memory))


def c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _error() -> OSError:
    return OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
