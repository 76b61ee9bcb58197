"""Compiled arithmetic: a request's pixels are the same whoever else rides, whatever came before, in every replica."""

from __future__ import annotations

import functools
import hashlib
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import psutil
import pytest
import structlog
import torch
from headwater_client import Client, InvalidRequest, Numerics, Result
from torch._dynamo.utils import counters

from services.errors import UnsupportedModel
from services.sampler import compiling
from services.sampler.budget import Budget
from services.sampler.compiler import Compiler
from services.sampler.drawing import Drawing
from services.sampler.encoding import png
from services.sampler.engine import Engine
from services.sampler.helper import Helper
from services.sampler.job import MARKERS
from services.sampler.model import AttachedModel
from services.sampler.requests import ImageRequest
from services.sampler.ring import Ring
from services.sampler.transfer import ArenaViews
from services.sampler.work import WorkMemory
from services.sampler.workspace import Workspace
from tests.sampler.inprocess import attached, under_baton
from tests.stack import Process, Stack

# A gate for each block of the tiny Z-Image, as real sizes have it.
GATE_LIMIT = 400_000
# A helper that finds everything done.
YES = ("-c", 'import sys\nfor line in sys.stdin: print(\'{"ok": true, "seconds": 0}\', flush=True)')
CompilerOf = Callable[..., list[Compiler]]
SIZES = [(64, 64), (96, 64), (64, 64), (96, 64)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of compiled programs that replicas share."""
    return tmp_path_factory.mktemp("compiled")


def replica(stack: Stack, cache: Path, *flags: str) -> Process:
    return stack.sampler("--numerics", "compiled", "--compile-cache", str(cache), *flags, gate_limit=GATE_LIMIT)


@pytest.fixture(scope="module")
def compiled(stack: Stack, cache: Path) -> Process:
    return replica(stack, cache)


def drawn(sampler: Process, index: int) -> Result:
    """Request `index` of four, two of each size."""
    width, height = SIZES[index]
    with Client(sampler.addresses[0]) as client:
        return client.generate("a red fox", model="tiny", width=width, height=height, steps=2, seed=index, timeout=150)


@pytest.fixture(scope="module")
def together(compiled: Process) -> list[str]:
    """SHA-256 of four pictures that rode together, on a replica that had compiled nothing."""
    with ThreadPoolExecutor(4) as pool:
        return [result.images[0].sha256 for result in pool.map(lambda index: drawn(compiled, index), range(4))]


def test_riders_equal_alone(compiled: Process, together: list[str]) -> None:
    """Four requests of two sizes at once draw what each draws alone, and say how."""
    alone = [drawn(compiled, index) for index in range(4)]

    assert [result.images[0].sha256 for result in alone] == together
    assert len(set(together)) == 4
    assert alone[0].finished.numerics is Numerics.COMPILED
    assert alone[0].finished.parameters["numerics"] == "compiled"
    with Client(compiled.addresses[0]) as client:
        assert client.model("tiny").numerics is Numerics.COMPILED


def test_blocks_are_compiled_by_the_helper(compiled: Process, together: list[str]) -> None:
    """Two sizes need five programs (one of Z-Image's three kinds of block sees the prompt alone), made elsewhere."""
    log = compiled.log.read_text()

    assert "blocks=6" in log
    assert log.count("event=compiled ") == 5
    assert "could not compile" not in log
    assert log.count("source=cache") == 5
    assert "compiled here" not in log


def asks_no_helper(sampler: Process) -> bool:
    """Whether no helper process was started: each job ends with a line in the log, well or not."""
    log = sampler.log.read_text()
    return "event=compiled " not in log and "could not compile" not in log


def test_restarted_replica(stack: Stack, cache: Path, together: list[str]) -> None:
    """Another replica over the same cache draws the same, other sizes first, and params streamed through slots.

    It starts no helper: markers in the folder say that all is there.
    """
    ring = replica(stack, cache, "--test-ring")

    assert [drawn(ring, index).images[0].sha256 for index in (3, 2, 1, 0)] == together[::-1]
    assert asks_no_helper(ring)
    assert not psutil.Process(ring.pid).children()
    assert ring.log.read_text().count("source=cache") == 5


def test_markers_without_programs(stack: Stack, cache: Path, tmp_path: Path, together: list[str]) -> None:
    """Programs were removed and markers were not: the sampler compiles, says so, and draws the same."""
    shutil.copytree(cache / MARKERS, tmp_path / "cache" / MARKERS)
    misled = replica(stack, tmp_path / "cache")

    assert drawn(misled, 0).images[0].sha256 == together[0]
    assert asks_no_helper(misled)
    assert misled.log.read_text().count('source="compiled here"') == 3


def test_fresh_cache(stack: Stack, tmp_path: Path, together: list[str]) -> None:
    """A replica that compiles everything anew, the other size first, draws the same; it takes its helper along.

    Its folder takes no markers, which fails nothing.
    """
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / MARKERS).touch()
    fresh = replica(stack, tmp_path / "cache")
    assert drawn(fresh, 1).images[0].sha256 == together[1]
    assert "could not compile" not in fresh.log.read_text()
    children = psutil.Process(fresh.pid).children(recursive=True)
    assert children
    fresh.stop()

    assert not psutil.wait_procs(children, timeout=20)[1]


@pytest.fixture
def compiler_of(
    cache: Path, together: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[CompilerOf]:
    """Makes compilers in this process over the folder that has all programs already; `program` is the helper's part.

    Their helpers' folder is another one, without markers, so that they are asked.
    """
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # restored afterwards
    compiling.use_cache(cache)
    torch._dynamo.reset()
    with ExitStack() as compilers:

        def make(engine: Engine, program: Sequence[str] = YES) -> list[Compiler]:
            return [compilers.enter_context(closing(Compiler(engine, Helper(tmp_path, program))))]

        yield make
    torch._dynamo.reset()


def draw_here(model: AttachedModel, index: int) -> str:
    """SHA-256 of the same request's picture from a model in this process."""
    width, height = SIZES[index]
    request = ImageRequest("tiny", "a red fox", "r", width_px=width, height_px=height, step_count=2, seed=index)
    workspace = Workspace(model.engine, WorkMemory(0))
    drawing = Drawing(
        model, workspace, model.traits.resolve(request), 0, lambda progress: None, lambda step, image: None
    )
    return hashlib.sha256(png(under_baton(model.engine, drawing.draw).image())).hexdigest()


def test_one_program_for_all_blocks_of_a_kind(stack: Stack, compiler_of: CompilerOf, together: list[str]) -> None:
    """Blocks share programs whatever slot their params are in and whoever drew before, and all come from the cache."""
    counters.clear()
    for keep in (False, True):
        ring = Ring(torch.device("cpu"), Budget(1 << 40), keep_residents=keep)
        with attached(stack, "tiny", ring, GATE_LIMIT, compiler_of) as model:
            assert [draw_here(model, index) for index in range(4)] == together

    assert counters["stats"]["unique_graphs"] == 5
    assert counters["inductor"]["fxgraph_cache_hit"] == 5
    assert not counters["inductor"]["fxgraph_cache_miss"]
    assert not counters["graph_break"]


def test_a_dead_helper_changes_no_pixel(stack: Stack, compiler_of: CompilerOf, together: list[str]) -> None:
    """A helper that ends at once leaves the compiling to the sampler."""
    dead = functools.partial(compiler_of, program=("-c", "pass"))
    with attached(stack, "tiny", ArenaViews(), GATE_LIMIT, dead) as model, structlog.testing.capture_logs() as logs:
        assert draw_here(model, 0) == together[0]

    assert "compiling in the sampler" in str(logs)


def test_programs_are_dropped_at_a_limit(
    stack: Stack, compiler_of: CompilerOf, together: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More sizes than a function may have programs for: they are made anew as they are asked for."""
    monkeypatch.setattr(compiling, "PROGRAM_LIMIT", 3)
    counters.clear()
    with attached(stack, "tiny", ArenaViews(), GATE_LIMIT, compiler_of) as model:
        assert [draw_here(model, index) for index in (0, 1, 2, 3)] == together

    assert counters["stats"]["unique_graphs"] > 5


def test_what_cannot_be_compiled_is_said(
    stack: Stack, compiler_of: CompilerOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never eager in its place: the request fails and names the way out."""
    monkeypatch.setitem(compiling.DYNAMO, "recompile_limit", 1)
    monkeypatch.setattr(compiling, "_settled", threading.local())
    with (
        attached(stack, "tiny", ArenaViews(), GATE_LIMIT, compiler_of) as model,
        pytest.raises(UnsupportedModel, match="--numerics eager"),
    ):
        draw_here(model, 0)


def test_other_numerics_are_refused(compiled: Process, sampler_unix: str) -> None:
    """What a replica does not run with is refused by name, on either side."""
    for address, wanted in ((compiled.addresses[0], "eager"), (sampler_unix, "compiled")):
        with Client(address) as client, pytest.raises(InvalidRequest, match="numerics"):
            client.generate("a red fox", model="tiny", numerics=wanted)
