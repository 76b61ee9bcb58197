"""`--check` and `--clean`: an arena folder looked after from the command line."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from services.params.arena import attach
from services.params.owned_arena import OwnedArena
from services.rpc.loader_client import LoaderClient
from tests.loader.support import ROOT, Workbench, environment, prepared


def command(bench: Workbench, task: str) -> tuple[int, str]:
    """(exit code, what was said) of the program with one task."""
    run = subprocess.run(
        [sys.executable, "-m", "services.loader", task, "--arena-dir", str(bench.arena_dir)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment(),
    )
    return run.returncode, run.stdout + run.stderr


def fill(bench: Workbench) -> None:
    async def ask() -> None:
        async with LoaderClient(bench.address) as client:
            await prepared(client, "toy")

    asyncio.run(ask())


def damage(path: Path, extent: int) -> None:
    arena = OwnedArena.open(path)
    with arena.window(extent) as memory:
        memory[5] ^= 1
    arena.close()


def test_check_says_what_is_damaged(bench: Workbench) -> None:
    """While the loader serves: sound first; then one bit of one extent and one file that is no arena are named."""
    bench.add_model("toy")
    with bench.loader("--eager-load"):
        fill(bench)
        code, text = command(bench, "--check")
        assert code == 0, text
        assert text.count("sound") == 3  # two arenas, and the sum
        assert "2 arenas, " in text

        victim = next(bench.arena_dir.glob("transformer-*.arena"))
        damage(victim, 2)
        (bench.arena_dir / "unet-0.arena").write_bytes(b"nonsense")
        code, text = command(bench, "--check")
        (bench.arena_dir / "unet-0.arena").unlink()

    assert code == 1
    assert f"{victim.name}: " in text
    assert "damaged extents: 2\n" in text
    assert "unet-0.arena: not an arena\n" in text
    assert "2 not sound" in text


def test_clean_removes_what_nobody_owns(bench: Workbench) -> None:
    """Nothing while the loader lives; then all but what a sampler maps; then that, and the folder."""
    bench.add_model("toy")
    with bench.loader() as process:
        fill(bench)
        code, text = command(bench, "--clean")
        assert code == 1
        assert "another loader owns" in text
        assert len(list(bench.arena_dir.glob("*.arena"))) == 2
        process.kill()
        process.wait()
    mapped = next(bench.arena_dir.glob("transformer-*.arena"))
    arena = OwnedArena.open(mapped)
    generation = arena.header.generation
    arena.close()

    with attach(mapped, generation):
        code, text = command(bench, "--clean")
        assert code == 1
        assert f"{mapped.name}: stays, a sampler maps it" in text
        assert list(bench.arena_dir.glob("*.arena")) == [mapped]

    code, text = command(bench, "--clean")

    assert code == 0
    assert "0 arenas stay" in text
    assert not bench.arena_dir.exists()


@pytest.mark.parametrize("task", ["--check", "--clean"])
def test_a_folder_that_is_not_there_is_named(bench: Workbench, task: str) -> None:
    code, text = command(bench, task)

    assert code == 1
    assert text == f"headwater-loader: there is no folder {bench.arena_dir}\n"
    assert not bench.arena_dir.exists()
