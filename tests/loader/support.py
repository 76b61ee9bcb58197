"""Toy models on disk and real loader processes for tests."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from headwater.loader.v1 import loader_pb2 as pb
from numpy.typing import NDArray
from safetensors.numpy import save_file

from services.params.arena import AttachedArena, attach
from services.rpc.loader_client import LoaderClient

ROOT = Path(__file__).resolve().parents[2]
Tensors = dict[str, NDArray[Any]]


def environment() -> dict[str, str]:
    """For a process that imports what this one does."""
    return os.environ | {"PYTHONPATH": f"{ROOT}/gen:{ROOT}:{os.environ.get('PYTHONPATH', '')}"}


def toy_tensors(seed: int, block_count: int = 6, width: int = 64) -> Tensors:
    """Names that sort differently as text and as numbers, odd sizes, an empty and a scalar tensor."""
    random = np.random.default_rng(seed)
    tensors: Tensors = {"empty": np.zeros((0, 3), np.float32), "scale": np.array(seed, np.float32)}
    for block in range(block_count):
        tensors[f"blocks.{block}.weight"] = random.standard_normal((width, width), np.float32)
        tensors[f"blocks.{block}.bias"] = random.integers(0, 255, (width + block,), np.uint8)
    return tensors


def save_sharded(folder: Path, stem: str, tensors: Tensors, shard_count: int = 2) -> None:
    names = sorted(tensors)
    mapped = {}
    for shard in range(shard_count):
        file = f"{stem}-{shard + 1:05}-of-{shard_count:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shard_count]}
        save_file(part, folder / file)
        mapped |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": mapped}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def make_model(folder: Path, seed: int = 1, block_count: int = 6, width: int = 64) -> dict[str, Tensors]:
    """A diffusers folder: a sharded transformer, a text encoder, two parts without params. Tensors by component."""
    index = {
        "_class_name": "ToyPipeline",
        "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", "ToyScheduler"],
        "text_encoder": ["transformers", "ToyEncoder"],
        "tokenizer": ["transformers", "ToyTokenizer"],
        "transformer": ["diffusers", "ToyTransformer"],
        "safety_checker": [None, None],
    }
    for part in ("scheduler", "text_encoder", "tokenizer", "transformer"):
        (folder / part).mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    (folder / "tokenizer" / "vocab.txt").write_text("a\nb\n")
    (folder / "text_encoder" / "config.json").write_text("{}")
    (folder / "transformer" / "config.json").write_text('{"layers": 6}')
    components = {
        "text_encoder": toy_tensors(seed, block_count // 2, width),
        "transformer": toy_tensors(seed + 100, block_count, width),
    }
    save_file(components["text_encoder"], folder / "text_encoder" / "model.safetensors")
    save_sharded(folder / "transformer", "diffusion_pytorch_model", components["transformer"])
    return components


def tensor_bytes(components: dict[str, Tensors]) -> int:
    return sum(tensor.nbytes for tensors in components.values() for tensor in tensors.values())


@dataclass
class Workbench:
    """A folder for models and an arena folder in shared memory."""

    disk: Path
    memory: Path
    folders: dict[str, Path] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)  # more lines of a model's table

    @property
    def arena_dir(self) -> Path:
        return self.memory / "arenas"

    @property
    def address(self) -> str:
        return f"unix:{self.memory}/loader.sock"

    def add_model(self, name: str, seed: int = 1, block_count: int = 6, width: int = 64) -> dict[str, Tensors]:
        self.folders[name] = self.disk / name
        return make_model(self.disk / name, seed, block_count, width)

    def write_models(self) -> Path:
        path = self.disk / "models.toml"
        tables = (
            f'[models.{name}]\nfolder = "{folder}"\n{self.options.get(name, "")}\n'
            for name, folder in self.folders.items()
        )
        path.write_text("".join(tables))
        return path

    @contextmanager
    def loader(self, *flags: str, prefix: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[str]]:
        """A loader that serves; killed at the end if the test left it running. Its stderr is in `log`."""
        process = self.start(*flags, prefix=prefix)
        try:
            self.wait_until_serving(process)
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()

    @contextmanager
    def loader_on_tmpfs(self, size: str, *flags: str) -> Iterator[Path]:
        """A loader whose arena folder is a tmpfs that nobody else sees; the folder, by way of its process."""
        self.arena_dir.mkdir(exist_ok=True)
        mount = f'mount -t tmpfs -o size={size} tmpfs {self.arena_dir} && exec "$@"'
        with self.loader(*flags, prefix=("unshare", "-m", "sh", "-c", mount, "sh")) as process:
            yield Path(f"/proc/{process.pid}/root{self.arena_dir}")

    def start(self, *flags: str, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        arguments = ["--models", str(self.write_models()), "--listen", self.address, "--arena-dir", str(self.arena_dir)]
        command = [*prefix, sys.executable, "-m", "services.loader", *arguments, "--extent-bytes", "16KiB", *flags]
        with self.log.open("a") as log:
            return subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=log, text=True)

    @property
    def log(self) -> Path:
        return self.disk / "loader.log"

    def wait_until_serving(self, process: subprocess.Popen[str], timeout_s: float = 20) -> None:
        deadline = time.monotonic() + timeout_s
        seen = self.log.read_text().count("event=serving")
        target = self._served + 1
        while seen < target:
            assert process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)
            seen = self.log.read_text().count("event=serving")
        self._served = target

    _served: int = 0


def terminate(process: subprocess.Popen[str], timeout_s: float = 20) -> int:
    process.send_signal(signal.SIGTERM)
    return process.wait(timeout_s)


@contextmanager
def workbench(disk: Path) -> Iterator[Workbench]:
    memory = Path("/dev/shm") / f"headwater-test-{os.getpid()}-{time.monotonic_ns()}"
    memory.mkdir(mode=0o700)
    try:
        yield Workbench(disk, memory)
    finally:
        shutil.rmtree(memory, ignore_errors=True)


def component(model: pb.Model, name: str) -> pb.Component:
    return next(part for part in model.components if part.name == name)


def attach_component(bench: Workbench, model: pb.Model, name: str) -> AttachedArena:
    part = component(model, name)
    return attach(bench.arena_dir / part.arena, part.generation)


def assert_holds(arena: AttachedArena, tensors: Tensors) -> None:
    """Every byte of every tensor is the checkpoint's."""
    assert {tensor.name for tensor in arena.tensors} == set(tensors)
    for placed in arena.tensors:
        assert arena.is_ready(placed.extent)
        held = arena.data[placed.offset : placed.offset + placed.size_bytes]
        assert held == tensors[placed.name].tobytes(), placed.name


def can_mount() -> bool:
    probe = ["unshare", "-m", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/mnt"]
    return bool(shutil.which("unshare")) and subprocess.run(probe, capture_output=True, check=False).returncode == 0


needs_mount = pytest.mark.skipif(not can_mount(), reason="needs the right to mount a tmpfs")


async def prepared(client: LoaderClient, name: str, order: Iterable[tuple[str, Sequence[int]]] = ()) -> pb.Model:
    """The model once all of it is READY."""
    last = [message async for message in client.prepare(name, order)][-1]
    assert last.done
    assert last.ready_bytes == last.total_bytes
    return last.model
