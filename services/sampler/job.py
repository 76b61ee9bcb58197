"""What the helper process is asked to compile, and the marker that says that it was.

A marker is an empty file in the cache folder: it is there or it is not. The process that compiled leaves it; a sampler
that finds it asks for nothing. One that lies, for programs were removed, costs time and no pixel: the sampler compiles.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import diffusers
import torch

from services.sampler import compiling
from services.sampler.signatures import Signature

MARKERS = "markers"  # folder in the cache folder


@dataclass(frozen=True, slots=True)
class Job:
    """One block with one layout of arguments."""

    config: str  # folder of the component's config.json
    class_module: str
    class_name: str  # of the component
    block: str  # dotted path in the component
    kind: str  # of the block
    tensors: dict[str, Signature]  # layout of the block's params and buffers
    args: Signature
    kwargs: Signature
    device: str
    thread_count: int  # of a CPU: the program depends on it

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def is_done(self, cache: Path) -> bool:
        """Whether a process with this software, on such a device, has done it; no, where the folder cannot be read."""
        return os.access(self._marker(cache), os.F_OK)

    def mark_done(self, cache: Path) -> None:
        """Leave the marker. Where it cannot be written, the next sampler has the job done again."""
        marker = self._marker(cache)
        with contextlib.suppress(OSError):
            marker.parent.mkdir(exist_ok=True)
            marker.touch()

    def _marker(self, cache: Path) -> Path:
        """Named by all that the program depends on. As JSON, for that is how a job came to the helper process."""
        versions = (torch.__version__, diffusers.__version__)
        settings = repr((compiling.DYNAMO, compiling.INDUCTOR))
        facts = json.dumps((self.kind, self.args, self.kwargs, versions, self._device_name(), settings))
        return cache / MARKERS / hashlib.sha256(facts.encode()).hexdigest()

    def _device_name(self) -> str:
        if self.device.startswith("cuda"):
            return torch.cuda.get_device_name(self.device)
        return f"{self.device}, {torch.backends.cpu.get_cpu_capability()}, {self.thread_count} threads"
