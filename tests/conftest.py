"""Tiny models on disk and a running stack that tests share. A test that breaks things starts a stack of its own."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.stack import Process, Stack, running

# Before torch is imported anywhere: references must be computed as the services compute, and 2 cores are shared.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}


LOG_LINES = 60
# They take minutes each: first, so that no worker is left alone with one of them.
LONG_FILES = ("test_bench.py", "test_compiled.py", "test_life.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; the order within files, and of the others, stays."""
    items.sort(key=lambda item: item.path.name not in LONG_FILES)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Function) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows how the logs of its stack's processes end."""
    report = yield
    if report.failed:
        for stack in (value for value in item.funcargs.values() if isinstance(value, Stack)):
            for process in stack.processes:
                log = "\n".join(process.log.read_text(errors="replace").splitlines()[-LOG_LINES:])
                report.sections.append((process.log.name, log))
    return report


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pipeline folders by name: each architecture, also with circulating names; sharded, bf16, "klein", "tiny"."""
    import torch

    from tests import tiny_editors, tiny_models

    root = tmp_path_factory.mktemp("models")
    folders = {name: tiny_models.write_folder(name, root / name) for name in tiny_models.ARCHITECTURES}
    for name in tiny_models.ARCHITECTURES:
        copy = Path(shutil.copytree(folders[name], root / f"{name}_circulating"))
        folders[copy.name] = tiny_models.circulating_names(name, copy)
    folders["z_image_bf16"] = tiny_models.write_folder("z_image", root / "z_image_bf16", torch.bfloat16)
    folders["sdxl_f16"] = tiny_models.write_folder("sdxl", root / "sdxl_f16", torch.float16)
    folders["flux_sharded"] = tiny_models.write_folder("flux", root / "flux_sharded", max_shard_size="100KB")
    folders["klein"] = tiny_editors.write_folder("klein", root / "klein")
    folders["tiny"] = Path(shutil.copytree(folders["z_image"], root / "tiny"))
    defaults = {"width_px": 64, "height_px": 64, "step_count": 4, "guidance_scale": 0}
    (folders["tiny"] / "headwater.json").write_text(json.dumps(defaults))
    return folders


@pytest.fixture(scope="session")
def stack(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A loader with every tiny model, eagerly loaded."""
    with running(tmp_path_factory.mktemp("stack"), tiny_folders) as stack:
        stack.loader("--eager-load")
        yield stack


@pytest.fixture(scope="session")
def sampler(stack: Stack) -> Process:
    """A sampler that computes on the arena itself."""
    return stack.sampler()


@pytest.fixture(scope="session")
def ring_sampler(stack: Stack) -> Process:
    """A sampler that copies params through slots filled with NaN when they are left."""
    return stack.sampler("--test-ring")


@pytest.fixture(scope="session")
def cuda(request: pytest.FixtureRequest) -> None:
    """Skips where torch sees no CUDA device."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")


@pytest.fixture(scope="session")
def cuda_streaming_sampler(cuda: None, stack: Stack) -> Process:
    """A sampler on CUDA that streams every gate."""
    return stack.sampler("--device", "cuda", "--max-vram", "4", "--work-reserve", "1", "--no-stream-layers")


@pytest.fixture(scope="session")
def cuda_resident_sampler(cuda: None, stack: Stack) -> Process:
    """A sampler on CUDA that keeps everything there."""
    return stack.sampler("--device", "cuda", "--max-vram", "8")


@pytest.fixture(scope="session")
def sampler_unix(sampler: Process) -> str:
    """Address of the sampler's Unix socket."""
    return sampler.addresses[0]


@pytest.fixture(scope="session")
def sampler_tcp(sampler: Process) -> str:
    """Address of the sampler's TCP port."""
    return sampler.addresses[1]
