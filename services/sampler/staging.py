"""Copies to a device from memory that cannot be page-locked: through pinned buffers that several threads fill."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

from services.sampler.slots import Slot, new_event

BUFFER_BYTES = 16 << 20
BUFFER_COUNT = 8
THREAD_COUNT = 4


class Staging:
    """A ring of pinned buffers. The bus gets what the threads can copy, more than one copy from pageable memory."""

    def __init__(self, device: torch.device, copies: torch.cuda.Stream) -> None:
        self._device = device
        self._copies = copies
        self._buffers: queue.SimpleQueue[tuple[torch.Tensor, torch.cuda.Event]] = queue.SimpleQueue()
        with torch.inference_mode(False):  # made while a request draws, written by threads that do not
            for _ in range(BUFFER_COUNT):
                self._buffers.put((torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=True), new_event()))
        self._threads = ThreadPoolExecutor(THREAD_COUNT, "staging")
        self._orders = ThreadPoolExecutor(1, "staging-order")

    def bring(self, source: torch.Tensor, pieces: Sequence[tuple[int, int, int]], slot: Slot) -> Future[None]:
        """Copy (offset in source, size, place in the slot) pieces; when it is done, `slot.arrived` was recorded.

        What the copy stream has to wait for first must have been told it before.
        """
        return self._orders.submit(self._bring, source, pieces, slot)

    def _bring(self, source: torch.Tensor, pieces: Sequence[tuple[int, int, int]], slot: Slot) -> None:
        parts = [
            (offset + part, min(BUFFER_BYTES, size - part), at + part)
            for offset, size, at in pieces
            for part in range(0, size, BUFFER_BYTES)
        ]
        done, _ = wait([self._threads.submit(self._copy, source, *part, slot.memory) for part in parts])
        for copy in done:
            copy.result()
        assert slot.arrived is not None
        slot.arrived.record(self._copies)

    def _copy(self, source: torch.Tensor, offset: int, size: int, at: int, memory: torch.Tensor) -> None:
        torch.cuda.set_device(self._device)
        buffer, used = self._buffers.get()
        try:
            used.synchronize()  # its last copy has left it
            buffer[:size].copy_(source[offset : offset + size])
            with torch.cuda.stream(self._copies):
                memory[at : at + size].copy_(buffer[:size], non_blocking=True)
                used.record(self._copies)
        finally:
            self._buffers.put((buffer, used))
