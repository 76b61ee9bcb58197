"""Where the numbers of one param lie packed, and how they are unpacked: a list of runs, each of whole blocks.

Offsets count from the start of an arena's data. Who unpacks says how bytes are fetched: from the arena itself, or from
where a copy of it put them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from services.sampler.packed import FP8, unpack, unpack_fp8

Fetch = Callable[[int, int], torch.Tensor]  # (offset, size): so many bytes, uint8, on the device that unpacks

SCALE_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Scale:
    """What fp8 numbers are multiplied with: one number, or one for each row of the run."""

    dtype: str
    offset: int
    count: int

    @property
    def size_bytes(self) -> int:
        return self.count * SCALE_DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class Run:
    """`count` numbers, packed in whole blocks that lie one behind the other."""

    packing: str
    offset: int
    size_bytes: int
    count: int
    scale: Scale | None = None

    def unpack(self, fetch: Fetch, out: torch.Tensor) -> None:
        """Write the numbers to `out`, which is contiguous and has `count` of them."""
        scale = self._scale(fetch)
        self._unpack(fetch(self.offset, self.size_bytes), scale, out)

    def rows(self, fetch: Fetch, ids: torch.Tensor, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows `ids` (int64, one dimension) of numbers: (ids, columns). Other rows are not read."""
        raw = fetch(self.offset, self.size_bytes).view(self.count // columns, -1)[ids]
        scale = self._scale(fetch)
        if scale is not None and scale.numel() > 1:
            scale = scale[ids]
        out = torch.empty(len(ids), columns, dtype=dtype, device=raw.device)
        self._unpack(raw.flatten(), scale, out)
        return out

    def _scale(self, fetch: Fetch) -> torch.Tensor | None:
        if self.scale is None:
            return None
        return fetch(self.scale.offset, self.scale.size_bytes).view(SCALE_DTYPES[self.scale.dtype])

    def _unpack(self, raw: torch.Tensor, scale: torch.Tensor | None, out: torch.Tensor) -> None:
        if self.packing not in FP8:
            unpack(raw, self.packing, (out.numel(),), out.dtype, out=out.view(-1))
            return
        rows = 1 if scale is None else scale.numel()
        unpack_fp8(raw, self.packing, (rows, out.numel() // max(rows, 1)), scale, out.dtype, out=out.view(rows, -1))


@dataclass(frozen=True, slots=True)
class Packed:
    """All the numbers of a param, in its order."""

    runs: tuple[Run, ...]

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """(first byte, size) of all that is needed to unpack it."""
        scales = (run.scale for run in self.runs if run.scale)
        return (*((r.offset, r.size_bytes) for r in self.runs), *((s.offset, s.size_bytes) for s in scales))

    def rows(self, fetch: Fetch, ids: torch.Tensor, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows `ids` (int64, one dimension) of a matrix that is one run: (ids, columns). Other rows are not read."""
        (run,) = self.runs
        return run.rows(fetch, ids, columns, dtype)

    def unpack(self, fetch: Fetch, out: torch.Tensor) -> torch.Tensor:
        """Write the numbers to `out`, which is contiguous and of their shape; returns it."""
        flat, at = out.view(-1), 0
        for run in self.runs:
            run.unpack(fetch, flat[at : at + run.count])
            at += run.count
        return out
