"""Page-locks arenas for CUDA, extent by extent as they become READY."""

from __future__ import annotations

import threading
from typing import Any

import structlog
import torch

from services.params.arena import AttachedArena

READ_ONLY = 0x08  # cudaHostRegisterReadOnly

log = structlog.get_logger()


class Registrar:
    """Page-locks READY extents in the background, so that copies run at the bus's speed and beside the compute.

    A copy from an extent that is not registered yet is right too, only slower.
    """

    def __init__(self, device: torch.device) -> None:
        self.way = "registered memory"
        self._device = device
        self._mutex = threading.Lock()
        self._todo: dict[AttachedArena, tuple[torch.Tensor, list[int]]] = {}
        self._done: dict[AttachedArena, list[int]] = {}
        self._more = threading.Event()
        threading.Thread(target=self._run, name="registrar", daemon=True).start()

    def add(self, arena: AttachedArena, source: torch.Tensor) -> None:
        with self._mutex:
            if arena not in self._todo and arena not in self._done:
                self._todo[arena] = (source, list(range(len(arena.extents))))
                self._done[arena] = []
        self._more.set()

    def remove(self, arena: AttachedArena) -> None:
        """Unregister; the caller has seen to it that no copy is under way."""
        with self._mutex:
            self._todo.pop(arena, None)
            cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            for pointer in self._done.pop(arena, []):
                cudart.cudaHostUnregister(pointer)

    def _run(self) -> None:
        torch.cuda.set_device(self._device)
        while self._more.wait():
            self._more.clear()
            while self._todo:
                if not self._one():
                    self._more.wait(0.05)  # what is left is not READY yet

    def _one(self) -> bool:
        """Register one READY extent; False if there is none."""
        with self._mutex:
            for arena, (source, extents) in list(self._todo.items()):
                ready = next((e for e in extents if arena.is_ready(e)), None)
                if ready is None:
                    continue
                extents.remove(ready)
                if not extents:
                    del self._todo[arena]
                self._register(arena, source, ready)
                return True
        return False

    def _register(self, arena: AttachedArena, source: torch.Tensor, number: int) -> None:
        extent = arena.extents[number]
        pointer = source.data_ptr() + extent.offset
        cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        status = int(cudart.cudaHostRegister(pointer, extent.size_bytes, READ_ONLY))
        if status:
            self.way = "pageable memory"
            self._todo.clear()
            log.warning("page-locking refused, copies stay pageable", cuda_error=status)
        else:
            self._done[arena].append(pointer)
