"""Compiles blocks in a process of its own, so that the cache has the program before a sampler needs it.

    python -m services.sampler.compile_worker CACHE_FOLDER

Reads one JSON object a line (`Job`) and answers each with one: {"ok": true, "seconds": 9.1} or {"ok": false, "reason":
"..."}; what is done is marked so in the folder. Ends when its input does. It never sees params or a request: blocks are
built from the model's config, all zero.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from services.sampler import compiling
from services.sampler.job import Job
from services.sampler.signatures import build


def compile_block(job: Job) -> None:
    """Build the block, and call it once compiled. Raises what building or compiling raises."""
    torch.set_num_threads(job.thread_count)
    if job.device.startswith("cuda"):
        torch.cuda.set_device(job.device)
    block = build_block(job)
    args, kwargs = build(job.args), build(job.kwargs)
    with torch.inference_mode():
        compiling.compiled(type(block))(block, *args, **kwargs)


def build_block(job: Job) -> nn.Module:
    cls: Any = getattr(importlib.import_module(job.class_module), job.class_name)
    with init_empty_weights(include_buffers=False):
        component: nn.Module = cls.from_config(cls.load_config(job.config))
    block = component.get_submodule(job.block).eval()
    for name, layout in job.tensors.items():
        path, _, own_name = name.rpartition(".")
        owner, tensor = block.get_submodule(path), build(layout)
        if own_name in owner._parameters:
            owner._parameters[own_name] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        else:
            owner._buffers[own_name] = tensor
    return block


def main() -> int:
    """Serve jobs from stdin until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the sampler ends us
    # Answers alone: a compiler may print, and its processes must not keep the sampler's pipe open after our death.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    cache = Path(sys.argv[1])
    compiling.use_cache(cache)
    compiling.settle_thread()
    for line in sys.stdin:
        started = time.monotonic()
        answer: dict[str, object]
        try:
            job = Job(**json.loads(line))
            compile_block(job)
            job.mark_done(cache)
            answer = {"ok": True, "seconds": round(time.monotonic() - started, 3)}
        except Exception as error:  # whatever it is, the sampler compiles by itself then
            answer = {"ok": False, "reason": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(answer), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
