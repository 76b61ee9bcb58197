"""A process that uses one model after the other as samplers do: prepare, lease all of it, compare it, hold it, let go.

    python -m tests.loader.tenant ADDRESS ARENA_DIR SEED SECONDS NAME=FOLDER ...

Ends with what it did and what went wrong, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from safetensors.numpy import load_file

from services.errors import HostMemoryFull, LoaderGone
from services.params.arena import AttachedArena, attach
from services.rpc.loader_client import LoaderClient, LoaderModel

MOST_HOLD_S = 0.1
PAUSE_S = 0.01

Truth = dict[str, dict[str, bytes]]  # by component and tensor, as the library reads it


def truth_of(folder: Path) -> Truth:
    truth: Truth = {}
    for file in sorted(folder.glob("*/*.safetensors")):
        read = {name: tensor.tobytes() for name, tensor in load_file(file).items()}
        truth.setdefault(file.parent.name, {}).update(read)
    return truth


class Tenant:
    """One reader of an arena folder; `tally` is what it saw."""

    def __init__(self, arena_dir: Path, seed: int, truths: dict[str, Truth]) -> None:
        self.tally = Counter(prepares=0, refused=0, gone=0, compared_bytes=0, wrong_bytes=0, lost_leases=0)
        self._arena_dir = arena_dir
        self._chance = random.Random(seed)
        self._truths = truths

    async def use(self, client: LoaderClient, seconds: float) -> None:
        end = time.monotonic() + seconds
        name = self._pick()
        while time.monotonic() < end:
            try:
                await self._turn(client, name)
                name = self._pick()
            except HostMemoryFull:  # all room is leased: ask for the same again
                self.tally["refused"] += 1
                await asyncio.sleep(self._chance.uniform(0, PAUSE_S))
            except LoaderGone:  # evicted for another after the call had ended and before it was leased
                self.tally["gone"] += 1

    def _pick(self) -> str:
        return self._chance.choice(sorted(self._truths))

    async def _turn(self, client: LoaderClient, name: str) -> None:
        leased: dict[Path, AttachedArena] = {}
        with ExitStack() as leases:
            async for news in client.prepare(name):
                if news.HasField("model") and not leased:
                    leased = self._lease(news.model, leases)
            inodes = {path: path.lstat().st_ino for path in leased}
            self.tally["prepares"] += 1
            self._compare(leased, self._truths[name])
            await asyncio.sleep(self._chance.uniform(0, MOST_HOLD_S))
            self._compare(leased, self._truths[name])
            for path, inode in inodes.items():
                self.tally["lost_leases"] += not path.exists() or path.lstat().st_ino != inode

    def _lease(self, model: LoaderModel, leases: ExitStack) -> dict[Path, AttachedArena]:
        paths = {self._arena_dir / part.arena: part.generation for part in model.components}
        return {path: leases.enter_context(attach(path, generation)) for path, generation in paths.items()}

    def _compare(self, leased: dict[Path, AttachedArena], truth: Truth) -> None:
        for arena in leased.values():
            want = truth[arena.component]
            assert {tensor.name for tensor in arena.tensors} == set(want)
            for tensor in arena.tensors:
                held = bytes(arena.data[tensor.offset : tensor.offset + tensor.size_bytes])
                self.tally["compared_bytes"] += len(held)
                if held != want[tensor.name]:
                    self.tally["wrong_bytes"] += sum(a != b for a, b in zip(held, want[tensor.name], strict=True))


async def main(address: str, arena_dir: str, seed: str, seconds: str, *models: str) -> Counter[str]:
    folders = dict(model.split("=", 1) for model in models)
    tenant = Tenant(Path(arena_dir), int(seed), {name: truth_of(Path(folder)) for name, folder in folders.items()})
    async with LoaderClient(address) as client:
        await tenant.use(client, float(seconds))
    return tenant.tally


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(*sys.argv[1:]))))
