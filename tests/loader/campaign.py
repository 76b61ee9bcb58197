"""Kills loaders and readers, freezes loaders, fills their memory, again and again; and looks at what is left each time.

    unshare -rm python -m tests.loader.campaign --loader-kills 500 --reader-kills 500 --stops 100 --full 100

Three small models in a budget for two, filled slowly, so that kills fall into fills, evictions and adoptions. After
each blow every extent that says READY must hold its checkpoint's bytes and every caller must have heard something soon;
at the end no arena may stay. `--plant MISTAKE` runs a loader of faulty_loader.py, which must be found out.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from services.errors import HeadwaterError
from services.loader.catalog import read_model
from services.loader.entries import ModelEntry
from services.params.arena import AttachedArena, attach
from services.params.owned_arena import OwnedArena
from services.rpc.loader_client import LoaderClient
from tests.loader.support import ROOT, Tensors, Workbench, environment, workbench

MODELS = "abc"
EXTENT_BYTES = 16 << 10
FLAGS = ("--extent-bytes", "16KiB", "--max-fill-rate", "800KB", "--host-budget", "520KiB", "--grace", "1")
SOON_S = 10.0
TMPFS_BYTES = 640 << 10


@dataclass
class Tally:
    """What was done, and what must not have happened."""

    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)  # bytes that are not the checkpoint's
    stuck: list[str] = field(default_factory=list)  # callers that heard nothing
    leaked: list[str] = field(default_factory=list)  # memory that stayed
    failed: list[str] = field(default_factory=list)  # errors that are not ours, loaders that do not start

    @property
    def is_clean(self) -> bool:
        return not (self.wrong or self.stuck or self.leaked or self.failed)


class Campaign:
    """One workbench, one loader at a time, and what every component should hold."""

    def __init__(self, bench: Workbench, chance: random.Random, plant: str = "") -> None:
        self.tally = Tally()
        self._bench = bench
        self._chance = chance
        self._module = ("tests.loader.faulty_loader", plant) if plant else ("services.loader",)
        self._truth: dict[str, Tensors] = {}  # by identity
        for seed, name in enumerate(MODELS):
            tensors = bench.add_model(name, seed)
            source = read_model(ModelEntry(name, bench.folders[name]), EXTENT_BYTES)
            self._truth |= {part.identity: tensors[part.name] for part in source.components}
        self._models = bench.write_models()

    # ---- a loader and who calls it

    @asynccontextmanager
    async def loader(self) -> AsyncIterator[subprocess.Popen[bytes]]:
        """A loader that serves; ended at the end, however it is."""
        process = self._start()
        try:
            if not await self._serves(process):
                self.tally.failed.append(f"a loader did not start: {self._bench.log.read_text()[-500:]}")
            yield process
        finally:
            process.kill()
            process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", *self._module, "--models", str(self._models), "--listen", self._bench.address]
        command += ["--arena-dir", str(self._bench.arena_dir), *FLAGS]
        with self._bench.log.open("ab") as log:
            return subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=log)

    async def _serves(self, process: subprocess.Popen[bytes]) -> bool:
        deadline = time.monotonic() + SOON_S
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(HeadwaterError):
                async with LoaderClient(self._bench.address) as client:
                    await client.list_models()
                    return True
            await asyncio.sleep(0.02)
        return False

    async def _call(self, client: LoaderClient) -> None:
        """One caller: prepares a model, to its end or not. Whatever it hears but our errors is a finding."""
        name, patience = self._chance.choice(MODELS), self._chance.choice((0.05, 0.2, None))
        with contextlib.suppress(TimeoutError, HeadwaterError):
            async with asyncio.timeout(patience):
                async for _ in client.prepare(name, [("transformer", [self._chance.randrange(6)])]):
                    pass

    async def _crowd(self, client: LoaderClient, blow: asyncio.Task[None]) -> None:
        """Callers and evictions until the blow has fallen; then all must hear of it soon."""
        tasks: set[asyncio.Task[None]] = set()
        while not blow.done():
            tasks.add(asyncio.create_task(self._call(client)))
            if self._chance.random() < 0.3:
                tasks.add(asyncio.create_task(self._evict(client)))
            await asyncio.sleep(self._chance.uniform(0, 0.1))
        _, late = await asyncio.wait(tasks, timeout=SOON_S)
        for task in late:
            self.tally.stuck.append(f"a caller heard nothing for {SOON_S} s")
            task.cancel()
        for task in tasks - late:
            if not task.cancelled() and (error := task.exception()) is not None:
                self.tally.failed.append(f"a caller heard {type(error).__name__}: {error}")

    async def _evict(self, client: LoaderClient) -> None:
        with contextlib.suppress(HeadwaterError):
            await client.evict(self._chance.choice(MODELS))

    # ---- blows

    async def kill_loader(self) -> None:
        async with self.loader() as process, LoaderClient(self._bench.address) as client:

            async def blow() -> None:
                await asyncio.sleep(self._chance.uniform(0, 0.4))
                process.kill()

            await self._crowd(client, asyncio.create_task(blow()))
        self.look("a killed loader")

    async def stop_loader(self, process: subprocess.Popen[bytes]) -> None:
        async with LoaderClient(self._bench.address) as client:

            async def blow() -> None:
                await asyncio.sleep(self._chance.uniform(0, 0.2))
                process.send_signal(signal.SIGSTOP)
                # Whoever maps an arena that it was about to remove waits until it goes on.
                looking = asyncio.create_task(asyncio.to_thread(self.look, "a frozen loader"))
                await asyncio.wait([looking], timeout=self._chance.uniform(0.02, 0.2))
                process.send_signal(signal.SIGCONT)
                await looking

            await self._crowd(client, asyncio.create_task(blow()))

    async def kill_reader(self) -> None:
        """A process that maps an arena, as a sampler does, dies; its lease goes with it."""
        async with LoaderClient(self._bench.address) as client:
            name = self._chance.choice(MODELS)
            models = [news.model async for news in client.prepare(name) if news.HasField("model")]
            part = self._chance.choice(models[0].components)
            await asyncio.to_thread(self._map_and_die, part.arena, part.generation)
            try:
                await client.evict(name)
            except HeadwaterError as error:
                self.tally.leaked.append(f"a dead reader's lease stays: {error}")
            self.look("a killed reader")

    def _map_and_die(self, arena: str, generation: str) -> None:
        command = [sys.executable, "-m", "tests.loader.reader", str(self._bench.arena_dir / arena), generation]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as reader:
            assert reader.stdout is not None
            if self._chance.random() < 0.8:
                reader.stdout.readline()  # it maps
                time.sleep(self._chance.uniform(0, 0.02))
            reader.kill()

    async def fill_memory(self) -> None:
        """The tmpfs has room for a part of a model; then nothing of it stays, and with room it can be had."""
        ballast = self._bench.arena_dir / "ballast"
        name = self._chance.choice(MODELS)
        async with LoaderClient(self._bench.address) as client:
            for other in MODELS:
                with contextlib.suppress(HeadwaterError):
                    await client.evict(other)
            weight = bytes(self._chance.randrange(TMPFS_BYTES))
            before = sorted(path.name for path in self._bench.arena_dir.glob("*.arena"))
            writing = asyncio.create_task(asyncio.to_thread(put, ballast, weight))
            if self._chance.random() < 0.5:
                await writing  # else it comes between the loader's look at the room and its taking it
            try:
                async for _ in client.prepare(name):
                    pass
                self.tally.done["fills that fitted"] += 1
            except HeadwaterError as error:
                self.tally.done[type(error).__name__] += 1
                after = sorted(path.name for path in self._bench.arena_dir.glob("*.arena"))
                self.tally.leaked += [f"{path} after a fill that failed" for path in set(after) - set(before)]
            await writing
            ballast.unlink()
            async for news in client.prepare(name):
                if news.done:
                    break
            else:
                self.tally.stuck.append("a fill with room did not end")
        self.look("a full tmpfs")

    # ---- what is left

    def look(self, after: str) -> None:
        """Every READY extent of every arena holds its checkpoint's bytes."""
        self.tally.done[after] += 1
        for path in self._bench.arena_dir.glob("*.arena"):
            with contextlib.suppress(HeadwaterError), contextlib.ExitStack() as open_now:
                owned = OwnedArena.open(path)
                open_now.callback(owned.close)
                arena = open_now.enter_context(attach(path, owned.header.generation))
                self._compare(arena, self._truth[owned.header.identity], after)

    def _compare(self, arena: AttachedArena, truth: Tensors, after: str) -> None:
        for tensor in arena.tensors:
            if not arena.is_ready(tensor.extent):
                continue
            held = arena.data[tensor.offset : tensor.offset + tensor.size_bytes]
            if held != truth[tensor.name].tobytes():
                self.tally.wrong.append(f"{arena.component} {tensor.name} after {after}")

    async def close(self) -> None:
        """A last loader: all that is there can be had and is right, and it leaves nothing behind."""
        async with self.loader() as process:
            async with LoaderClient(self._bench.address) as client:
                for name in MODELS[:2]:
                    try:
                        async with asyncio.timeout(SOON_S):
                            async for _ in client.prepare(name):
                                pass
                    except (TimeoutError, HeadwaterError) as error:
                        self.tally.stuck.append(f"{name} at the end: {error!r}")
            self.look("all")
            process.terminate()
            code = await asyncio.to_thread(process.wait, SOON_S)
            if code:
                self.tally.failed.append(f"the last loader ended with {code}")
        stays = [path.name for path in self._bench.arena_dir.glob("*")]
        self.tally.leaked += [f"{name} at the end" for name in stays]


async def run(campaign: Campaign, bench: Workbench, options: argparse.Namespace) -> None:
    """All blows, kind by kind; stops early once something is wrong."""
    for _ in range(options.loader_kills):
        if campaign.tally.is_clean:
            await campaign.kill_loader()
    for count, blow in ((options.stops, "stop"), (options.reader_kills, "reader")):
        if count and campaign.tally.is_clean:
            async with campaign.loader() as process:
                for _ in range(count):
                    if campaign.tally.is_clean:
                        await (campaign.stop_loader(process) if blow == "stop" else campaign.kill_reader())
    if campaign.tally.is_clean:
        await campaign.close()
    if options.full and campaign.tally.is_clean:
        with small_tmpfs(bench):
            async with campaign.loader():
                for _ in range(options.full):
                    if campaign.tally.is_clean:
                        await campaign.fill_memory()
            if campaign.tally.is_clean:
                await campaign.close()


def put(path: Path, data: bytes) -> None:
    """Write as much of `data` as there is room for."""
    with contextlib.suppress(OSError):
        path.touch()
        path.write_bytes(data)


@contextlib.contextmanager
def small_tmpfs(bench: Workbench) -> Iterator[None]:
    """The arena folder on a tmpfs of its own; needs a mount namespace."""
    bench.arena_dir.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "tmpfs", str(bench.arena_dir)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(bench.arena_dir)], check=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, what in (
        ("loader-kills", "SIGKILLs of loaders"),
        ("reader-kills", "SIGKILLs of readers"),
        ("stops", "SIGSTOPs of loaders"),
        ("full", "fills with too little memory"),
    ):
        parser.add_argument(f"--{name}", type=int, default=0, help=what)
    parser.add_argument("--plant", default="", choices=("", "size-only", "flag-first"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as disk, workbench(Path(disk)) as bench:
        campaign = Campaign(bench, random.Random(options.seed), options.plant)
        asyncio.run(run(campaign, bench, options))
    tally = campaign.tally
    figures = {key: getattr(tally, key) for key in ("done", "wrong", "stuck", "leaked", "failed")}
    print(json.dumps(figures | {"seconds": round(time.monotonic() - start, 1)}))
    return 0 if tally.is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
