"""Records what is launched, as CUDA graphs. What is recorded, and when, is decided in graphs.py."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Protocol

import torch
from torch._C import _cuda_endAllocateToPool, _cuda_releasePool

from services.sampler.faults import failed_allocations

Replay = Callable[[], object]


class Recorder(Protocol):
    """What records launches: CUDA."""

    alignment: int  # what of an address the choice of kernels may depend on, bytes
    held_bytes: int  # memory that graphs work in

    def warm_up(self, work: Callable[[], object]) -> None:
        """Run `work` where it will be recorded: libraries make ready what cannot be made ready during a recording."""
        ...

    def record(self, work: Callable[[], object]) -> Replay:
        """What `work` launches, without running it. Raises RuntimeError if it cannot be recorded, or memory is full."""
        ...

    def failures(self) -> int:
        """Allocations on the device that failed so far."""
        ...

    def drop(self) -> None:
        """Give memory back; all replays were dropped."""
        ...


class CudaRecorder:
    """Records into one memory pool, in a thread of its own: each thread that calls cuBLAS costs a workspace."""

    alignment = 256  # torch tells cuBLAS up to so much

    def __init__(self, device: torch.device) -> None:
        self.held_bytes = 0
        self._device = device
        self._local = threading.local()
        self._thread = ThreadPoolExecutor(1, "recorder", initializer=self._settle)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], object]) -> None:
        here = torch.cuda.current_stream(self._device)
        self._thread.submit(self._warm_up, here, work).result()

    def record(self, work: Callable[[], object]) -> Replay:
        before = torch.cuda.memory_reserved(self._device)
        graph = torch.cuda.CUDAGraph()
        try:
            self._thread.submit(self._record, graph, work).result()
        finally:
            self.held_bytes += torch.cuda.memory_reserved(self._device) - before
        return graph.replay

    def failures(self) -> int:
        return failed_allocations(self._device)

    def drop(self) -> None:
        # A pool that no graph works in any more cannot be used again.
        self._pool = torch.cuda.graph_pool_handle()
        self.held_bytes = 0
        torch.cuda.synchronize(self._device)  # replays may be under way
        torch.cuda.empty_cache()

    def _settle(self) -> None:
        torch.cuda.set_device(self._device)
        self._local.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._local.stream):
            torch.cuda.current_blas_handle()  # type: ignore[no-untyped-call] # its workspace must not be taken from the pool

    @torch.inference_mode()
    def _warm_up(self, callers: torch.cuda.Stream, work: Callable[[], object]) -> None:
        stream = self._local.stream
        stream.wait_stream(callers)
        with torch.cuda.stream(stream):
            work()
        callers.wait_stream(stream)

    @torch.inference_mode()
    def _record(self, graph: torch.cuda.CUDAGraph, work: Callable[[], object]) -> None:
        with torch.cuda.stream(self._local.stream):
            # Other threads go on page-locking and copying meanwhile.
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                with suppress(RuntimeError):  # it says only that something went wrong before
                    self._end(graph)
                raise
            self._end(graph)

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        try:
            graph.capture_end()
        except RuntimeError:
            self._abandon_pool()
            raise

    def _abandon_pool(self) -> None:
        """torch does not tell its allocator when a capture ends badly: it would give out no cached memory any more."""
        index = torch.cuda.current_device()
        with suppress(RuntimeError):
            _cuda_endAllocateToPool(index, self._pool)
        with suppress(RuntimeError):
            _cuda_releasePool(index, self._pool)
        self._pool = torch.cuda.graph_pool_handle()
