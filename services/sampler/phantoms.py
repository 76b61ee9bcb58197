"""Stands for params that are packed in an arena while the libraries put them in place.

A library's loaders rename, split and view tensors, and know nothing of packed blocks. They are given tensors of the
unpacked shapes in address space that has no memory: where a param lies there when they are done says which of the
arena's bytes it is. A split by rows is a run of whole blocks, and what is put together of rows is a list of runs, so
neither costs anything.
"""

from __future__ import annotations

import bisect
import math
import mmap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from services.errors import UnsupportedModel
from services.params.layout import PlacedTensor
from services.sampler.gates import round_up
from services.sampler.packed import BY_NAME, FP8, check_packing
from services.sampler.packed.runs import SCALE_DTYPES, Packed, Run, Scale
from services.sampler.signatures import span_bytes

# What packed params are computed with.
DTYPE = torch.bfloat16
PLAIN = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# Beside fp8 weights, by what stands behind the module's name. Scales of activations are for products in fp8.
_SCALES = ("scale_weight", "weight_scale")
_NOT_NEEDED = ("scale_input", "input_scale", "comfy_quant")
_MARKS = ("scaled_fp8",)


def is_packed(tensors: Iterable[PlacedTensor]) -> bool:
    """Whether a component has numbers that nothing here computes with as they are."""
    return any(map(_is_packed, tensors))


def _is_packed(tensor: PlacedTensor) -> bool:
    return tensor.dtype in FP8 or (tensor.dtype in BY_NAME and BY_NAME[tensor.dtype].block > 1)


def unlike(tensors: Iterable[PlacedTensor], dtype: torch.dtype) -> list[PlacedTensor]:
    """What has to be unpacked to be `dtype`: packed numbers, and floats of other kinds."""
    return [t for t in tensors if math.prod(t.shape) and (_is_packed(t) or PLAIN.get(t.dtype, dtype) is not dtype)]


def told_apart(tensors: Iterable[PlacedTensor]) -> tuple[list[PlacedTensor], dict[str, PlacedTensor]]:
    """The params, and the scales of those in fp8 by the param's name; what a file has beside them is left out.

    Raises UnsupportedModel for a scale that cannot be one of an fp8 param.
    """
    named = {tensor.name: tensor for tensor in tensors}
    scales: dict[str, PlacedTensor] = {}
    beside: set[str] = set()
    for name, tensor in named.items():
        module, _, last = name.rpartition(".")
        if last in _MARKS or last in _NOT_NEEDED:
            beside.add(name)
        elif last in _SCALES:
            _check_scale(named.get(f"{module}.weight"), tensor)
            scales[f"{module}.weight"] = tensor
            beside.add(name)
        elif "scale" in last and _is_fp8(named.get(f"{module}.weight")):
            raise UnsupportedModel(f"{name}: fp8 weights with a scale of this kind cannot be unpacked; one number can")
    return [tensor for name, tensor in named.items() if name not in beside], scales


def _is_fp8(tensor: PlacedTensor | None) -> bool:
    return tensor is not None and tensor.dtype in FP8


def _check_scale(weight: PlacedTensor | None, scale: PlacedTensor) -> None:
    count = math.prod(scale.shape)
    if weight is None or weight.dtype not in FP8:
        what = "no weight" if weight is None else weight.dtype
        raise UnsupportedModel(f"{scale.name} is the scale of {what}; those of fp8 weights are used")
    if scale.dtype not in SCALE_DTYPES or count not in (1, weight.shape[0]):
        raise UnsupportedModel(
            f"{weight.name} has a scale of {count} {scale.dtype} numbers; one is expected, or one for each row"
        )


@dataclass(frozen=True, slots=True)
class _Region:
    """Address space of one tensor of the arena, or of one that was put together; `runs` are its numbers in order."""

    name: str
    runs: tuple[Run, ...]
    space: torch.Tensor
    dtype: torch.dtype

    def tensor(self, shape: Sequence[int]) -> torch.Tensor:
        return self.space.view(self.dtype)[: math.prod(shape)].view(shape)

    def place(self, tensor: torch.Tensor) -> int:
        """Of its first number in here."""
        return (tensor.data_ptr() - self.space.data_ptr()) // self.dtype.itemsize


class Phantoms:
    """Tensors of a component that have to be unpacked, as others see them. Nothing may be read from them: all zeros.

    data: the arena's (uint8), for what has to be computed; scales: by the name of the fp8 param that each belongs to;
    dtype: what is computed with, but for those that `dtypes` has by name. Raises UnsupportedModel for a packing that
    nothing here unpacks.
    """

    def __init__(
        self,
        tensors: Iterable[PlacedTensor],
        data: torch.Tensor,
        scales: Mapping[str, PlacedTensor],
        dtype: torch.dtype = DTYPE,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        self._data = data
        self._addresses: list[int] = []  # of the regions
        self._regions: list[_Region] = []
        self._views = {}
        for tensor in tensors:
            runs = (_run_of(tensor, scales.get(tensor.name)),)
            wanted = (dtypes or {}).get(tensor.name, dtype)
            self._views[tensor.name] = self._reserve(tensor.name, runs, tensor.shape, wanted)

    def _reserve(self, name: str, runs: tuple[Run, ...], shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        size_bytes = round_up(math.prod(shape) * dtype.itemsize)
        space = torch.frombuffer(mmap.mmap(-1, size_bytes, flags=flags, prot=mmap.PROT_READ), dtype=torch.uint8)
        region = _Region(name, runs, space, dtype)
        at = bisect.bisect(self._addresses, space.data_ptr())
        self._addresses.insert(at, space.data_ptr())
        self._regions.insert(at, region)
        return region.tensor(shape)

    def views(self) -> dict[str, torch.Tensor]:
        """By name in the checkpoint, of the unpacked shapes."""
        return dict(self._views)

    def holds(self, tensor: torch.Tensor) -> bool:
        return tensor.numel() > 0 and self._region(tensor) is not None

    def _region(self, tensor: torch.Tensor) -> _Region | None:
        at = bisect.bisect_right(self._addresses, tensor.data_ptr()) - 1
        if at < 0 or tensor.data_ptr() >= self._addresses[at] + self._regions[at].space.numel():
            return None
        return self._regions[at]

    def origin(self, tensor: torch.Tensor) -> Packed:
        """The packed bytes that a tensor in here stands for. Raises ValueError if they are no runs of whole blocks."""
        region = self._region(tensor)
        assert region is not None
        start = region.place(tensor)
        runs = _cut(region, start, start + tensor.numel()) if tensor.is_contiguous() else None
        if runs is None:
            packing = region.runs[0].packing
            raise ValueError(f"{region.name} is {packing} and is needed in another order than it is packed in")
        return Packed(runs)

    def joined(self, parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """Parts put one behind the other along their first dimension, as one phantom.

        None if one of them is neither here nor in the arena, or not by whole blocks.
        """
        runs: list[Run] = []
        dtype = parts[0].dtype
        for part in parts:
            if part.dtype is not dtype:
                return None
            if self.holds(part):
                try:
                    runs += self.origin(part).runs
                except ValueError:
                    return None
            elif self._is_plain(part):
                offset = part.data_ptr() - self._data.data_ptr()
                packing = next(name for name, plain in PLAIN.items() if plain is dtype)
                runs.append(Run(packing, offset, part.nbytes, part.numel()))
            else:
                return None
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        return self._reserve("a tensor put together", tuple(runs), shape, dtype)

    def _is_plain(self, tensor: torch.Tensor) -> bool:
        at = tensor.data_ptr() - self._data.data_ptr()
        in_it = 0 <= at < self._data.numel() and tensor.numel() > 0
        return in_it and tensor.dtype in PLAIN.values() and tensor.is_contiguous()

    def real(self, tensor: torch.Tensor) -> torch.Tensor:
        """The numbers that a tensor in here stands for, in memory of its own, of its shape and strides."""
        region = self._region(tensor)
        assert region is not None
        numbers = torch.empty(sum(run.count for run in region.runs), dtype=region.dtype)
        Packed(region.runs).unpack(lambda offset, size: self._data[offset : offset + size], numbers)
        start = region.place(tensor)
        end = start + span_bytes(tensor) // region.dtype.itemsize
        return numbers[start:end].as_strided(tensor.shape, tensor.stride()).to(tensor.dtype)


def _run_of(tensor: PlacedTensor, scale: PlacedTensor | None) -> Run:
    if tensor.dtype not in FP8:
        check_packing(tensor.dtype)
    found = None if scale is None else Scale(scale.dtype, scale.offset, math.prod(scale.shape))
    return Run(tensor.dtype, tensor.offset, tensor.size_bytes, math.prod(tensor.shape), found)


def _cut(region: _Region, start: int, end: int) -> tuple[Run, ...] | None:
    """The runs of numbers `start` to `end` of a region; None if an edge is within a block."""
    found: list[Run] = []
    at = 0
    for run in region.runs:
        first, last = max(start - at, 0), min(end - at, run.count)
        at += run.count
        if first >= last:
            continue
        part = _part(run, first, last)
        if part is None:
            return None
        found.append(part)
    return tuple(found)


def _part(run: Run, first: int, last: int) -> Run | None:
    block, block_bytes = (1, 1) if run.packing in FP8 else BY_NAME[run.packing][1:]
    if first % block or last % block:
        return None
    scale = run.scale
    if scale is not None and scale.count > 1:
        width, item_bytes = run.count // scale.count, SCALE_DTYPES[scale.dtype].itemsize
        if first % width or last % width:
            return None
        scale = Scale(scale.dtype, scale.offset + first // width * item_bytes, (last - first) // width)
    offset = run.offset + first // block * block_bytes
    return Run(run.packing, offset, (last - first) // block * block_bytes, last - first, scale)
