"""Tries to change an arena in every way that a process has; says, as JSON, what the kernel answered to each.

    python -m tests.params.intruder PATH [USER DESCRIPTOR]

As another user if one is said; with a descriptor, which was opened for reading, it is tried too.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import sys
from collections.abc import Callable, Iterator

import numpy as np

from services.params.mapping import c_library

SIZE = mmap.PAGESIZE


def by_path(path: str) -> Iterator[tuple[str, Callable[[], object]]]:
    yield "open to write", lambda: os.open(path, os.O_RDWR)
    yield "truncate", lambda: os.truncate(path, 0)
    yield "unlink", lambda: os.unlink(path)  # noqa: PTH108 - the calls themselves are the point
    yield "rename", lambda: os.rename(path, f"{path}.old")  # noqa: PTH104
    yield "chmod", lambda: os.chmod(path, 0o666)  # noqa: PTH101
    yield "put a file beside it", lambda: os.open(f"{path}.forged", os.O_CREAT | os.O_WRONLY)


def by_descriptor(fd: int) -> Iterator[tuple[str, Callable[[], object]]]:
    mapped = mmap.mmap(fd, SIZE, mmap.MAP_SHARED, mmap.PROT_READ)
    yield "write", lambda: os.write(fd, b"x")
    yield "write at", lambda: os.pwrite(fd, b"x", 0)
    yield "cut", lambda: os.ftruncate(fd, 0)
    yield "grow", lambda: os.posix_fallocate(fd, 0, 1 << 30)
    yield "map to write", lambda: mmap.mmap(fd, SIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    yield "open again to write", lambda: os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    yield "make the mapping writable", lambda: make_writable(mapped)
    yield "punch a hole through the mapping", lambda: mapped.madvise(mmap.MADV_REMOVE)
    yield "change its mode", lambda: os.fchmod(fd, 0o666)


def make_writable(mapped: mmap.mmap) -> None:
    address = ctypes.c_void_p(address_of(mapped))
    if c_library().mprotect(address, ctypes.c_size_t(SIZE), mmap.PROT_READ | mmap.PROT_WRITE):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def address_of(mapped: mmap.mmap) -> int:
    return int(np.frombuffer(mapped, np.uint8).ctypes.data)


def become(user: int) -> None:
    """Another user, who is in no group; what was imported before need not be readable for him."""
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)


def main(path: str, user: str = "", fd: str = "") -> dict[str, str]:
    answers = {}
    if user:
        become(int(user))
    for name, attempt in (*by_path(path), *(by_descriptor(int(fd)) if fd else ())):
        answers[name] = "done"
        try:
            attempt()
        except OSError as error:
            answers[name] = errno.errorcode[error.errno or 0]
    return answers


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
