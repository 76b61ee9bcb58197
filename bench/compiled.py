"""A resident denoise step, eager and compiled, and with each block as a CUDA graph; and what compiling costs.

    python bench/compiled.py [--tiny] [--cache FOLDER]

Z-Image's transformer at its real shapes with random bf16 weights, all on the device, batch 1, one step at 1024x688 and
at 512x512; with `--tiny` the tests' small one, also on a CPU. Prints a table, then one line of JSON. `helper_s` is the
helper process's time for all programs of a size (the first size on an empty cache pays its start too), `trace_s` this
process's afterwards, which a sampler spends under the baton. `fresh process equal` compares a step with that of a
process that has a cache of its own and saw the sizes in the other order: the promise of compiled arithmetic.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from torch import nn
from torch._dynamo.utils import counters

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "gen")]

from bench.common import note
from services.sampler import compiling
from services.sampler.compile_worker import Job
from services.sampler.helper import Helper
from services.sampler.signatures import signature

REAL, TINY = [(1024, 688), (512, 512)], [(256, 256), (384, 256)]
Step = Callable[[], torch.Tensor]


def transformer(device: torch.device, tiny: bool) -> Any:
    """Z-Image's denoiser with seeded random weights."""
    if tiny:
        from tests.tiny_models import z_image

        return z_image().transformer.to(device)
    with torch.device("meta"):
        module: Any = ZImageTransformer2DModel()
    # Params require grad, as the libraries leave them and as the service binds them: the programs depend on it.
    module = module.to(torch.bfloat16).to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for param in module.parameters():
            param.normal_(0, 0.02, generator=generator)
    module.rope_embedder.freqs_cis = None  # made on meta; the model makes it anew
    return module


def step(module: Any, size: tuple[int, int]) -> Step:
    """One forward on seeded latents and a prompt of 31 tokens."""
    width, height = (edge // 8 for edge in size)
    config, device = module.config, module.device
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(config.in_channels, 1, height, width, generator=generator).to(device, module.dtype)
    prompt = torch.randn(31, config.cap_feat_dim, generator=generator).to(device, module.dtype)
    moment = torch.full((1,), 0.5, device=device)

    @torch.inference_mode()
    def run() -> torch.Tensor:
        output: torch.Tensor = module([latents], moment, [prompt], return_dict=False)[0][0]
        return output

    return run


def blocks_of(module: Any) -> list[tuple[str, nn.Module]]:
    return [(n, m) for n, m in module.named_modules() if type(m).__name__ in module._repeated_blocks]


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_ms(run: Step, device: torch.device, count: int = 9) -> float:
    times = []
    for _ in range(count + 2):
        sync(device)
        started = time.perf_counter()
        run()
        sync(device)
        times.append(time.perf_counter() - started)
    return sorted(times[2:])[count // 2] * 1e3


@contextmanager
def forwards(module: Any, make: Callable[[nn.Module], Any]) -> Iterator[None]:
    """Each block's forward replaced for the time of the block."""
    kept = [(block, block.forward) for _, block in blocks_of(module)]
    for block, _ in kept:
        block.forward = make(block)
    try:
        yield
    finally:
        for block, forward in kept:
            block.forward = forward


def graphed(forward: Callable[..., torch.Tensor], pool: Any, graphs: dict[Any, Any]) -> Callable[..., torch.Tensor]:
    """`forward` recorded at its first call for a layout, then replayed on copies of its inputs."""

    def replay(*args: Any, **kwargs: Any) -> torch.Tensor:
        given = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
        key = (id(replay), signature(args), signature(kwargs))
        if key not in graphs:
            still_args = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
            still_kwargs = {k: a.clone() if isinstance(a, torch.Tensor) else a for k, a in kwargs.items()}
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                forward(*still_args, **still_kwargs)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                output = forward(*still_args, **still_kwargs)
            still = [a for a in (*still_args, *still_kwargs.values()) if isinstance(a, torch.Tensor)]
            graphs[key] = (graph, still, output)
        graph, still, output = graphs[key]
        for to, source in zip(still, given, strict=True):
            to.copy_(source)
        graph.replay()
        return output

    return replay


def jobs(module: Any, run: Step, config: Path) -> list[Job]:
    """What the helper is asked for a step: one job for each layout of a block's arguments."""
    found: dict[Any, Job] = {}

    def look(name: str, block: nn.Module, args: Any, kwargs: Any) -> None:
        tensors = {n: signature(t) for n, t in (*block.named_parameters(), *block.named_buffers())}
        layout = (tuple(sorted(tensors.items())), signature(args), signature(kwargs))
        cls = type(module)
        found.setdefault(
            layout,
            Job(str(config), cls.__module__, cls.__name__, name, tensors, *layout[1:], str(module.device),
                torch.get_num_threads()),
        )  # fmt: skip

    hooks = [b.register_forward_pre_hook(functools.partial(look, n), with_kwargs=True) for n, b in blocks_of(module)]
    run()
    for hook in hooks:
        hook.remove()
    return list(found.values())


def ask(helper: Helper, wanted: list[Job]) -> float:
    """Seconds until the helper has done all jobs."""
    started = time.perf_counter()
    for job in wanted:
        done = threading.Event()
        helper.ask(("job", id(job)), job, done.set)
        done.wait()
    return time.perf_counter() - started


def digest(output: torch.Tensor) -> str:
    return hashlib.sha256(output.float().cpu().numpy().tobytes()).hexdigest()


def measure(module: Any, size: tuple[int, int], helper: Helper, config: Path) -> dict[str, Any]:
    device, run = module.device, step(module, size)
    eager = run()
    row: dict[str, Any] = {"size": f"{size[0]}x{size[1]}", "eager_ms": median_ms(run, device)}
    wanted = jobs(module, run, config)
    row |= {"programs": len(wanted), "helper_s": ask(helper, wanted)}
    with forwards(module, program):
        counters.clear()
        started = time.perf_counter()
        compiled = run()
        sync(device)
        row["trace_s"] = time.perf_counter() - started
        row["cache_hits"] = counters["inductor"]["fxgraph_cache_hit"]
        row["compiled_ms"] = median_ms(run, device)
    row["max_difference"] = float((compiled.float() - eager.float()).abs().max())
    row["largest_output"] = float(eager.float().abs().max())
    if device.type == "cuda":
        for name, make in (("eager", lambda block: type(block).forward.__get__(block)), ("compiled", program)):
            graphs: dict[Any, Any] = {}
            pool = torch.cuda.graph_pool_handle()
            with forwards(
                module, lambda block, make=make, pool=pool, graphs=graphs: graphed(make(block), pool, graphs)
            ):
                equal = torch.equal(run(), eager if name == "eager" else compiled)
                row |= {f"graphs_{name}_ms": median_ms(run, device), f"graphs_{name}_equal": equal}
    note("size", row)
    row["digest"] = digest(compiled)
    return row


def program(block: nn.Module) -> Any:
    return types.MethodType(compiled_class(type(block)), block)


@functools.lru_cache
def compiled_class(cls: type[nn.Module]) -> Any:
    return compiling.compiled(cls, compile_threads=1)


def digests(arguments: argparse.Namespace, sizes: list[tuple[int, int]], device: torch.device) -> list[str]:
    """Of compiled steps, in the order of `sizes`, in this process without a helper."""
    module = transformer(device, arguments.tiny)
    with forwards(module, program):
        return [digest(step(module, size)()) for size in sizes]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--digests", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    sizes = TINY if arguments.tiny else REAL
    with tempfile.TemporaryDirectory() as folder:
        cache = arguments.cache or Path(folder) / "cache"
        compiling.use_cache(cache)
        compiling.settle_thread()
        if arguments.digests:
            print(json.dumps(digests(arguments, sizes[::-1], device)[::-1]))
            return
        module = transformer(device, arguments.tiny)
        module.save_config(folder)
        helper = Helper(cache)
        try:
            rows = [measure(module, size, helper, Path(folder)) for size in sizes]
        finally:
            helper.close()
    del module
    if device.type == "cuda":
        torch.cuda.empty_cache()
    again = [sys.executable, __file__, "--digests", *(["--tiny"] if arguments.tiny else [])]
    fresh = json.loads(subprocess.run(again, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    for row, theirs in zip(rows, fresh, strict=True):
        row["fresh process equal"] = row.pop("digest") == theirs
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    report(rows, name)


def report(rows: list[dict[str, Any]], device: str) -> None:
    print(f"{device}, torch {torch.__version__}")
    print(f"{'size':>10} {'way':>16} {'ms a step':>10} {'of eager':>9}")
    for row in rows:
        for key in [k for k in row if k.endswith("_ms")]:
            print(f"{row['size']:>10} {key[:-3]:>16} {row[key]:>10.2f} {row[key] / row['eager_ms']:>9.2f}")
    print(json.dumps({"device": device, "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
