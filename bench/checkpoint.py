"""Writes pipeline folders with random weights at the real shapes of Z-Image, SDXL and Qwen-Image-Edit.

    python bench/checkpoint.py z-image /tmp/z-image                       bf16, 20.5 GB
    python bench/checkpoint.py sdxl /tmp/sdxl                             fp16, 6.9 GB; sdxl-bf16 in bf16
    python bench/checkpoint.py qwen-image-edit /tmp/qwen --format q8_0    transformer as Q8_0 in GGUF, 21.7 + 16.8 GB

`--format shards` (default) writes files of at most 5 GB with an index, as they circulate; `single` writes the denoiser
as one safetensors file; `q8_0` and `q4_k` as one GGUF beside the folders, whose own folder then has its config only.
A folder that is complete is left alone. Values are drawn on a GPU if there is one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from bench.common import pick_device, report, table
from bench.shapes import MODELS

SHARD_BYTES = 5_000_000_000
WRITERS = 8
NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
DENOISERS = ("transformer", "unet")
Tensors = dict[str, torch.Size]


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its header, and where in the file each tensor begins."""

    path: Path
    header: bytes
    places: Mapping[str, int]
    size_bytes: int


def plan_shard(path: Path, tensors: Tensors, dtype: torch.dtype) -> Shard:
    """Lay tensors out in the order given. Pure."""
    at, entries, places = 0, {}, {}
    for name, shape in tensors.items():
        end = at + shape.numel() * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        places[name], at = at, end
    text = json.dumps({"__metadata__": {"format": "pt"}} | entries).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return Shard(path, header, {name: len(header) + place for name, place in places.items()}, len(header) + at)


def plan_folder(folder: Path, tensors: Tensors, dtype: torch.dtype, shard_bytes: float) -> tuple[list[Shard], bytes]:
    """A component's files and, if there is more than one, its index. Pure."""
    groups: list[Tensors] = [{}]
    room = shard_bytes
    for name, shape in tensors.items():
        size = shape.numel() * dtype.itemsize
        if size > room and groups[-1]:
            groups.append({})
            room = shard_bytes
        groups[-1][name] = shape
        room -= size
    is_transformers = folder.name.startswith("text_encoder")
    stem = "model" if is_transformers else "diffusion_pytorch_model"
    if len(groups) == 1:
        return [plan_shard(folder / f"{stem}.safetensors", groups[0], dtype)], b""
    names = [f"{stem}-{n:05}-of-{len(groups):05}.safetensors" for n in range(1, len(groups) + 1)]
    total = sum(shape.numel() for shape in tensors.values()) * dtype.itemsize
    where = {tensor: name for name, group in zip(names, groups, strict=True) for tensor in group}
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1).encode()
    return [plan_shard(folder / n, g, dtype) for n, g in zip(names, groups, strict=True)], index


def values(name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Random weights that keep activations finite at the real models' depth; a name always gets the same."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    drawn = torch.randn(shape, generator=generator, device=device, dtype=dtype)
    if name.endswith("bias"):
        return drawn.mul_(0.02)
    if len(shape) < 2 or "norm" in name.split(".")[-2:][0]:
        return drawn.mul_(0.1).add_(1)
    return drawn.mul_(deviation(shape))


def deviation(shape: torch.Size) -> float:
    return min(0.02, 1 / math.sqrt(shape[1:].numel()))


def write_shard(shard: Shard, tensors: Tensors, dtype: torch.dtype, device: torch.device) -> None:
    """Write one file, a few tensors at a time: each thread draws one, copies it and writes it to its place."""
    part = shard.path.with_suffix(".part")
    with part.open("wb") as file:
        file.truncate(shard.size_bytes)
        os.pwrite(file.fileno(), shard.header, 0)

        def put(name: str) -> None:
            data = values(name, tensors[name], dtype, device).cpu().view(-1).view(torch.uint8).numpy().data
            at = shard.places[name]
            while data:
                written = os.pwrite(file.fileno(), data, at)
                data, at = data[written:], at + written

        with ThreadPoolExecutor(WRITERS) as pool:
            list(pool.map(put, shard.places))
    part.rename(shard.path)  # last: a file under its name is whole


def q8_0(deviation: float, blocks: torch.Tensor, generator: torch.Generator) -> None:
    """Give random bytes (rows, blocks, 34) such scales (fp16, then 32 int8) that the numbers have that deviation."""
    scale = deviation / (256 / math.sqrt(12))
    scales = torch.empty(blocks.shape[:2], device=blocks.device).uniform_(0.9 * scale, 1.1 * scale, generator=generator)
    blocks[..., :2] = scales.half().unsqueeze(-1).view(torch.uint8)


def q4_k(deviation: float, blocks: torch.Tensor, generator: torch.Generator) -> None:
    """The same for (rows, blocks, 144): fp16 d and dmin, 12 bytes of 6-bit scales and minima, 256 nibbles.

    All scales and minima are 32, and dmin is 7.5 d: a number is 32 d (nibble - 7.5).
    """
    d = deviation / (32 * math.sqrt((16**2 - 1) / 12))
    scales = torch.empty(blocks.shape[:2], device=blocks.device).uniform_(0.9 * d, 1.1 * d, generator=generator)
    blocks[..., :2] = scales.half().unsqueeze(-1).view(torch.uint8)
    blocks[..., 2:4] = (scales * 7.5).half().unsqueeze(-1).view(torch.uint8)
    blocks[..., 4:12], blocks[..., 12:16] = 0b10_100000, 0


@dataclass(frozen=True)
class PackedForm:
    """How a GGUF's matrices are packed; `scale` makes random bytes of blocks numbers of a deviation."""

    kind: gguf.GGMLQuantizationType
    scale: Callable[[float, torch.Tensor, torch.Generator], None]

    def packs(self, shape: torch.Size) -> bool:
        """Matrices whose rows are whole blocks; the rest stays F32, as such files have it."""
        return len(shape) == 2 and shape[-1] % gguf.GGML_QUANT_SIZES[self.kind][0] == 0

    def row_bytes(self, shape: torch.Size) -> int:
        block, block_bytes = gguf.GGML_QUANT_SIZES[self.kind]
        return shape[-1] // block * block_bytes

    def draw(self, name: str, shape: torch.Size, device: torch.device) -> np.ndarray:
        """Rows of blocks, uint8, of the deviation that the weights have."""
        generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        block, block_bytes = gguf.GGML_QUANT_SIZES[self.kind]
        size = (shape[0], shape[1] // block, block_bytes)
        blocks = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator, device=device)
        self.scale(deviation(shape), blocks, generator)
        return blocks.view(shape[0], -1).cpu().numpy()


PACKED_FORMS = {
    "q8_0": PackedForm(gguf.GGMLQuantizationType.Q8_0, q8_0),
    "q4_k": PackedForm(gguf.GGMLQuantizationType.Q4_K, q4_k),
}


def write_gguf(
    path: Path,
    architecture: str,
    tensors: Tensors,
    device: torch.device,
    form: PackedForm,
    tell: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> None:
    """One GGUF file, tensor by tensor; `tell` adds metadata."""
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, architecture)
    tell(writer)
    for name, shape in tensors.items():
        if form.packs(shape):
            rows = (shape[0], form.row_bytes(shape))
            writer.add_tensor_info(name, rows, np.dtype(np.uint8), math.prod(rows), form.kind)
        else:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), shape.numel() * 4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with ThreadPoolExecutor(1) as ahead:  # the next tensor is drawn while one is written

        def draw(name: str) -> np.ndarray:
            shape = tensors[name]
            if form.packs(shape):
                return form.draw(name, shape, device)
            return values(name, shape, torch.float32, device).cpu().numpy()

        coming = None
        order: list[str | None] = [*tensors, None]
        for each in order:
            following = ahead.submit(draw, each) if each else None
            if coming is not None:
                writer.write_tensor_data(coming.result())
            coming = following
    writer.close()
    part.rename(path)


def tensors_of(module: nn.Module) -> Tensors:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def is_complete(folder: Path, files: Mapping[Path, int]) -> bool:
    """Whether every file is there with its size (-1: any), model_index.json, written last, among them."""
    if not (folder / "model_index.json").exists():
        return False
    return all(path.exists() and size in (-1, path.stat().st_size) for path, size in files.items())


def write(model: str, folder: Path, form: str = "shards", tiny: bool = False) -> Iterator[tuple[str, int]]:
    """Write a model's folder if it is not complete; yields (file, bytes) for each file of weights, once it is there.

    form: of the denoiser, as `--format`.
    """
    device = pick_device()
    recipe = MODELS[model](tiny)
    shard_bytes = 1 << 19 if tiny else SHARD_BYTES
    plans: dict[Path, tuple[Shard, Tensors]] = {}
    others: dict[Path, bytes] = {}
    packed: dict[Path, Tensors] = {}
    for name, module in recipe.modules.items():
        tensors = tensors_of(module)
        if form in PACKED_FORMS and name in DENOISERS:
            packed[folder / f"{model}-{form.upper()}.gguf"] = tensors
            continue
        limit = math.inf if form == "single" and name in DENOISERS else shard_bytes
        shards, index = plan_folder(folder / name, tensors, recipe.dtype, limit)
        plans |= {shard.path: (shard, tensors) for shard in shards}
        if index:
            others[shards[0].path.parent / f"{shards[0].path.name.split('-')[0]}.safetensors.index.json"] = index
    sizes = {path: shard.size_bytes for path, (shard, _) in plans.items()} | dict.fromkeys([*others, *packed], -1)
    if not is_complete(folder, sizes):
        (folder / "model_index.json").unlink(missing_ok=True)
        recipe.write_configs(folder)
        for path, text in others.items():
            path.write_bytes(text)
    for path, (shard, tensors) in plans.items():
        if not path.exists() or path.stat().st_size != shard.size_bytes:
            write_shard(shard, tensors, recipe.dtype, device)
        yield str(path.relative_to(folder)), path.stat().st_size
    for path, tensors in packed.items():
        if not path.exists():
            write_gguf(path, recipe.architecture, tensors, device, PACKED_FORMS[form])
        yield path.name, path.stat().st_size
    recipe.write_index(folder)


@contextmanager
def there(model: str, folder: Path | None, tiny: bool, form: str = "shards") -> Iterator[tuple[Path, Path]]:
    """(The model's folder, written if it is not there; a folder for what else a run needs, which goes with it)."""
    with tempfile.TemporaryDirectory() as disk:
        folder = folder or Path(disk) / model
        list(write(model, folder, form, tiny))
        yield folder, Path(disk)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--format", choices=("shards", "single", *PACKED_FORMS), default="shards")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the code")
    options = parser.parse_args(arguments)
    rows, start = [], time.perf_counter()
    for name, size in write(options.model, options.folder, options.format, options.tiny):
        rows.append((name, size, time.perf_counter() - start))
    table(f"{options.model} in {options.folder.name}", ("file", "bytes", "there after s"), rows)
    figures = {"bytes": sum(size for _, size, _ in rows), "seconds": time.perf_counter() - start}
    report("checkpoint", pick_device(), {"model": options.model, "format": options.format} | figures)


if __name__ == "__main__":
    main()
