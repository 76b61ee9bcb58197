"""Checkpoint files that go wrong under a fill: swapped, disguised, unreadable, on a disk that hangs."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from headwater.loader.v1 import loader_pb2 as pb
from safetensors.numpy import save_file

from services import errors
from services.loader.records import Residency
from services.rpc.loader_client import LoaderClient, PrepareNews
from tests.loader.support import Workbench, assert_holds, attach_component, prepared, toy_tensors
from tests.loader.test_store import drain, running

FILE = Path("text_encoder") / "model.safetensors"
SLOWLY = ("--max-fill-rate", "100KB", "--fill-threads", "1")


async def begun(stream: AsyncIterator[PrepareNews]) -> pb.Model:
    """The model, once an extent of it is READY."""
    model = pb.Model()
    async for news in stream:
        model = news.model if news.HasField("model") else model
        if news.ready:
            break
    return model


async def end_of(stream: AsyncIterator[PrepareNews]) -> None:
    async for _ in stream:
        pass


def test_a_file_replaced_by_rename_is_never_mixed_with_the_old_one(bench: Workbench) -> None:
    """DATA_LOSS; what a reader has of the old one stays; asked again, another generation holds the new one alone."""
    old = bench.add_model("toy")["text_encoder"]
    path = bench.folders["toy"] / FILE
    new = toy_tensors(77, 3)
    save_file(new, path.with_suffix(".new"))

    async def use() -> None:
        async with LoaderClient(bench.address) as client:
            stream = client.prepare("toy", [("text_encoder", [])])
            with attach_component(bench, await begun(stream), "text_encoder") as before:
                path.with_suffix(".new").rename(path)
                with pytest.raises(errors.CheckpointChanged, match=r"model\.safetensors"):
                    await end_of(stream)
                with attach_component(bench, await prepared(client, "toy"), "text_encoder") as after:
                    assert after.generation != before.generation
                    assert_holds(after, new)
                ready = [tensor for tensor in before.tensors if before.is_ready(tensor.extent)]
                assert 0 < len(ready) < len(old)
                for tensor in ready:
                    held = before.data[tensor.offset : tensor.offset + tensor.size_bytes]
                    assert held == old[tensor.name].tobytes()

    with bench.loader(*SLOWLY):
        asyncio.run(use())


def test_a_file_rewritten_under_its_old_times_is_noticed(bench: Workbench) -> None:
    """Same size, modification time put back: the kernel's own time of change tells."""
    bench.add_model("toy")
    path = bench.folders["toy"] / FILE

    async def use() -> None:
        async with LoaderClient(bench.address) as client:
            stream = client.prepare("toy", [("text_encoder", [])])
            await begun(stream)
            status = path.stat()
            with path.open("r+b") as file:
                file.seek(-100, os.SEEK_END)
                file.write(bytes(100))
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
            assert path.stat().st_mtime_ns == status.st_mtime_ns
            with pytest.raises(errors.CheckpointChanged):
                await end_of(stream)

    with bench.loader(*SLOWLY):
        asyncio.run(use())


class Disk:
    """`os.preadv`, but with something done first in reads of files of one model that lie in the second half."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, first: Any) -> None:
        self._real, self._folder, self._first = os.preadv, str(folder), first
        monkeypatch.setattr(os, "preadv", self.preadv)

    def preadv(self, fd: int, buffers: Any, offset: int) -> int:
        path = Path(f"/proc/self/fd/{fd}").readlink()
        if str(path).startswith(self._folder) and offset > path.stat().st_size // 2:
            self._first()
        return self._real(fd, buffers, offset)


def test_a_read_error_is_the_models_own(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk's word, without a path; another model is filled meanwhile; with the disk mended, so is this one."""
    bench.add_model("bad")
    bench.add_model("good", seed=5)

    def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    async def use() -> None:
        async with running(bench) as store:
            with monkeypatch.context() as patch:
                Disk(patch, bench.folders["bad"], fail)
                with pytest.raises(errors.BadCheckpoint, match="cannot be read: Input/output error") as caught:
                    await drain(store.prepare("bad"))
                assert str(bench.disk) not in str(caught.value)
                assert store.model("bad").state is Residency.FAILED
                assert (await drain(store.prepare("good"))).is_done
            assert (await drain(store.prepare("bad"))).is_done

    asyncio.run(use())


def test_a_disk_that_hangs_holds_up_its_own_callers_only(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """They leave when they like; what is READY is had at once; when the disk answers, the fill ends by itself."""
    bench.add_model("slow", block_count=2)
    bench.add_model("ready", seed=5)
    hung, answers = threading.Event(), threading.Event()

    def hang() -> None:
        hung.set()
        assert answers.wait(20)

    async def use() -> None:
        async with running(bench) as store:
            await drain(store.prepare("ready"))
            Disk(monkeypatch, bench.folders["slow"], hang)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await drain(store.prepare("slow"))
            assert hung.is_set()
            assert (await drain(store.prepare("ready"))).is_done
            answers.set()
            assert (await drain(store.prepare("slow"))).is_done

    asyncio.run(use())


SPELLINGS = (
    "", ".", "..", "/", "../toy", "./toy", "toy/", "toy/.", "toy/..", "/toy", "//toy", "toy/text_encoder", "TOY",
    " toy", "toy ", "toy\0", "toy\n", "\0", "toy.safetensors", "../../etc/passwd", "/etc/passwd", "file:///etc/passwd",
    "/proc/self/environ", "%2e%2e%2ftoy", "..\\toy", "toy\\..", "~", "~root", "$HOME", "`id`", "toy;id", "*", "to?",
    "[t]oy", "\uff54oy", "t\u043ey", "toy\u200b", "\u202eyot", "\u2024\u2024/toy", "a" * 5000,
)  # fmt: skip


def test_a_models_name_is_never_a_path(bench: Workbench) -> None:
    """However it is spelled: not known, or no name; a link with that name beside the models changes nothing."""
    bench.add_model("toy")
    shutil.copytree(bench.folders["toy"], bench.disk / "hidden")
    (bench.disk / "TOY").symlink_to("hidden")

    async def use() -> None:
        async with LoaderClient(bench.address) as client:
            for name in (*SPELLINGS, "hidden", str(bench.folders["toy"]), str(bench.disk / "hidden")):
                for call in (client.get_model(name), prepared(client, name), client.evict(name)):
                    with pytest.raises((errors.UnknownModel, errors.InvalidRequest)):
                        await call
            assert not list(bench.arena_dir.glob("*.arena"))
            await prepared(client, "toy")

    with bench.loader():
        asyncio.run(use())
