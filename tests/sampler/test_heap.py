"""What threads freed goes back to the kernel, and they share a few heaps."""

from __future__ import annotations

import subprocess
import sys

# Blocks too small to be mapped singly, and one at the end of each heap that keeps the rest from being given back.
PROGRAM = """
import ctypes, threading
from services.sampler import heap

BLOCK, COUNT, THREADS = 100_000, 200, 8

def anonymous_mb():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Anonymous:")) / 1000

def work():
    blocks = [bytes(BLOCK).replace(b"\\0", b"\\1") for _ in range(COUNT)]
    barrier.wait()
    kept.append(blocks.pop())
    barrier.wait()

def heaps():
    libc = ctypes.CDLL(None)
    libc.fopen.restype = ctypes.c_void_p
    libc.fopen.argtypes = ctypes.c_char_p, ctypes.c_char_p
    libc.malloc_info.argtypes = ctypes.c_int, ctypes.c_void_p
    libc.fclose.argtypes = (ctypes.c_void_p,)
    file = libc.fopen(b"/dev/stderr", b"w")
    libc.malloc_info(0, file)
    libc.fclose(file)

heap.share_heaps()
barrier, kept = threading.Barrier(THREADS), []
before = anonymous_mb()
threads = [threading.Thread(target=work) for _ in range(THREADS)]
for thread in threads: thread.start()
for thread in threads: thread.join()
freed = anonymous_mb() - before
heap.give_back()
print(freed, anonymous_mb() - before)
heaps()
"""


def test_what_threads_freed_goes_back() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    held_mb, left_mb = map(float, done.stdout.split())
    assert held_mb > 100, "the test's own: the C library gave it back by itself"
    assert left_mb < 10
    assert 1 <= done.stderr.count("<heap nr=") <= 2
