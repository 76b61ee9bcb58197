"""What nobody uses is given back while the host is short of memory."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from services.loader.pressure import FILES, relieving, stalled_percent
from tests.loader.support import Workbench, attach_component
from tests.loader.test_store import arenas, drain, running

CALM = "some avg10=0.00 avg60=3.00 avg300=9.00 total=1\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"
SHORT = "some avg10=42.50 avg60=3.00 avg300=9.00 total=1\nfull avg10=40.00 avg60=0.00 avg300=0.00 total=0\n"


def test_the_kernels_text_is_understood() -> None:
    assert stalled_percent(CALM) == 0
    assert stalled_percent(SHORT) == 42.5
    assert stalled_percent("") == 0
    kernels = next(file for file in FILES if file.exists()).read_text()
    assert 0 <= stalled_percent(kernels) <= 100
    assert kernels.startswith("some avg10=")


def test_what_nobody_uses_goes_and_the_rest_stays(bench: Workbench, tmp_path: Path) -> None:
    """Nothing while it is calm; then the leased component stays alone, and the model can be had again."""
    bench.add_model("toy")
    file = tmp_path / "pressure"
    file.write_text(CALM)

    async def use() -> None:
        async with running(bench) as store, relieving(store.give_back, 10, [tmp_path / "none", file], 0.005):
            model = (await drain(store.prepare("toy"))).model
            await asyncio.sleep(0.1)
            assert len(arenas(bench)) == 2
            leased = next(part.arena for part in model.components if part.name == "transformer")
            with attach_component(bench, model, "transformer"):
                file.write_text(SHORT)
                async for _ in store.watch("test"):
                    if arenas(bench) == [leased]:
                        break
                await asyncio.sleep(0.1)
                assert arenas(bench) == [leased]
                file.write_text(CALM)
                await asyncio.sleep(0.05)
                assert (await drain(store.prepare("toy"))).is_done

    asyncio.run(use())


def test_what_is_mapped_is_asked_back(bench: Workbench, tmp_path: Path) -> None:
    """Nobody is made to let go; who does so gives the memory back."""
    bench.add_model("toy")
    file = tmp_path / "pressure"
    file.write_text(SHORT)

    async def use() -> None:
        async with running(bench) as store:
            model = (await drain(store.prepare("toy"))).model
            mapped = [attach_component(bench, model, part.name) for part in model.components]
            async with relieving(store.give_back, 10, [file], 0.01):
                async for news in store.watch("test"):
                    if news.give_back == ["toy"]:
                        break
                assert len(arenas(bench)) == 2
                for arena in mapped:
                    arena.close()
                async for _ in store.watch("test"):
                    if not arenas(bench):
                        break

    asyncio.run(use())


@pytest.mark.parametrize(("limit", "text"), [(0, SHORT), (50, SHORT), (10, "nonsense")])
def test_nothing_goes_without_a_reason(limit: float, text: str, tmp_path: Path) -> None:
    file = tmp_path / "pressure"
    file.write_text(text)
    calls: list[int] = []

    async def give_back() -> int | None:
        calls.append(1)
        return None

    async def use() -> None:
        async with relieving(give_back, limit, [file], 0.005):
            await asyncio.sleep(0.1)

    asyncio.run(use())
    assert calls == []
