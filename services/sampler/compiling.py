"""The settings under which compiled arithmetic keeps its promise: same request, same GPU and software, same pixels.

What each is for:

- `automatic_dynamic_shapes`, `assume_static_by_default`, `specialize_float`, `automatic_dynamic_local_pgo`: a program
  is made for exact sizes and scalars. Otherwise the second size seen makes a program for all sizes, whose last bits
  differ, and a request's pixels would depend on which sizes came before.
- `fail_on_recompile_limit_hit`, `suppress_errors`: never eager in place of compiled without a word.
- `deterministic` (torch 2.10 and later): no choice among reductions, matrix padding or template kernels by timing them.
  Kernels whose candidates give the same bits (pointwise ones) are still timed.
- `max_autotune*`, `coordinate_descent_tuning`: off, for they choose by timing; matrix products stay with the library's.
- `fx_graph_cache` and the remote caches: programs come from the local cache folder and from nowhere else.

torch keeps settings per thread, and riders are threads, so each thread that may compile calls `settle_thread` first.
Those of inductor go along with each `torch.compile` instead: dynamo puts `deterministic` back to what
`torch.use_deterministic_algorithms` says after every compile.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

# Programs that one function may have before they are dropped and made anew as they are asked for: each call of the
# function looks through all of them.
PROGRAM_LIMIT = 128

DYNAMO: dict[str, object] = {
    "automatic_dynamic_shapes": False,
    "assume_static_by_default": True,
    "specialize_float": True,
    "automatic_dynamic_local_pgo": False,
    "suppress_errors": False,
    "fail_on_recompile_limit_hit": True,
    # A backstop: one signature may need several programs, where blocks of a kind differ in a scalar.
    "recompile_limit": 8 * PROGRAM_LIMIT,
    "accumulated_recompile_limit": 8 * PROGRAM_LIMIT,
}
INDUCTOR: dict[str, str | int | bool | Callable[..., Any]] = {
    "deterministic": True,
    "max_autotune": False,
    "max_autotune_pointwise": False,
    "max_autotune_gemm": False,
    "coordinate_descent_tuning": False,
    "fx_graph_cache": True,
    "fx_graph_remote_cache": False,
    "autotune_local_cache": True,
    "autotune_remote_cache": False,
}
COMPILE_ERRORS = (TorchDynamoException, FailOnRecompileLimitHit)

_settled = threading.local()


def settle_thread() -> None:
    """Put the settings in force for the calling thread; cheap when they are. Raises AttributeError if torch is old."""
    if getattr(_settled, "done", False):
        return
    for name, value in DYNAMO.items():
        getattr(torch._dynamo.config, name)  # a setting that this torch does not know would be taken without a word
        setattr(torch._dynamo.config, name, value)
    _settled.done = True


def compiled(cls: type[nn.Module], **options: int) -> Any:
    """`cls.forward`, compiled for exact sizes: one program serves all instances that are alike."""
    return torch.compile(cls.forward, dynamic=False, options=INDUCTOR | options)


def use_cache(folder: Path) -> None:
    """Keep programs in this folder, shared with other processes; before anything is compiled. Raises OSError."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    os.environ.pop("TRITON_CACHE_DIR", None)  # torch then puts Triton's beside its own
    importlib.import_module("torch._inductor.compile_fx")  # seconds, which the first rider would pay under the baton
