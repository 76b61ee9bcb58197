"""The noise that torch.randn draws on a CUDA device, computed on the host: Philox4x32-10 and Box-Muller.

torch gives each element of a small tensor to a thread of its own and each thread a sequence of its own, so element i of
draw k is the first normal of the block at counter (k, 0, i, 0) under the seed as the key. A device with fewer threads
than a tensor has elements (about 200,000 to 270,000 on large ones) hands the rest out otherwise, each model in its own
way; here, as in the web UIs and in stable-diffusion.cpp, every device is large enough. Numbers are within 5e-6 of the
device's (seen on an H200), whose sine is approximate.

Sources: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox, its constants); Box and Muller 1958;
cuRAND's curand_normal.h (which bits make the two uniforms), torch's DistributionTemplates.h (which thread draws what).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode

from services.errors import InvalidRequest

MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
WORD = 1 << 32
TWO_PI = np.float64(np.float32(2 * math.pi))


def philox4x32(counters: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """The random blocks at `counters`, both (4, n); the key is two words."""
    block = counters
    for number in range(ROUNDS):
        keys = np.array([[(word + number * step) % WORD] for word, step in zip(key, WEYL, strict=True)], np.uint32)
        products = block[::2] * MULTIPLIERS
        high, low = (products >> np.uint64(32)).astype(np.uint32), products.astype(np.uint32)
        mixed = high[::-1] ^ block[1::2] ^ keys
        block = np.stack([mixed[0], low[1], mixed[1], low[0]])
    return block


def normals(seed: int, draw: int, count: int) -> NDArray[np.float32]:
    """`count` standard normal numbers, those of call `draw` (from 0) of a generator with this seed."""
    counters = np.zeros((4, count), np.uint32)
    counters[0], counters[1] = draw % WORD, draw // WORD
    counters[2] = np.arange(count, dtype=np.uint32)
    return box_muller(philox4x32(counters, (seed % WORD, seed // WORD % WORD))[:2])


def box_muller(words: NDArray[np.uint32]) -> NDArray[np.float32]:
    """A standard normal number for each pair of words, (2, n).

    Every operation is rounded as on the device: near 1 a logarithm shows the last bit of what it is given.
    """
    centred = words.astype(np.float32).astype(np.float64) + 0.5
    uniform = (centred[0] / WORD).astype(np.float32)
    angle = (centred[1] * (TWO_PI / WORD)).astype(np.float32)
    radius = np.sqrt(np.float32(-2) * np.log(uniform.astype(np.float64)).astype(np.float32))
    noise: NDArray[np.float32] = radius * np.sin(angle.astype(np.float64)).astype(np.float32)
    return noise


class PhiloxGenerator(torch.Generator):
    """What a pipeline is given as `generator`: its seed, and how often it was drawn from.

    Only `PhiloxNoise` knows how to draw from it; torch by itself would draw the CPU's noise, which `check` finds out.
    """

    draws = 0

    def check(self) -> None:
        """Raises InvalidRequest if noise was drawn otherwise than by `PhiloxNoise`, or none at all."""
        fresh = torch.Generator("cpu").manual_seed(self.initial_seed())
        if not self.draws or not torch.equal(self.get_state(), fresh.get_state()):
            raise InvalidRequest(("rng", "this model draws noise in a way that only RNG_CPU serves: leave it out"))

    def randn(self, shape: Iterable[int], dtype: torch.dtype | None, device: Any) -> torch.Tensor:
        """The next draw."""
        size = torch.Size(shape)
        noise = torch.from_numpy(normals(self.initial_seed(), self.draws, size.numel())).reshape(size)
        self.draws += 1
        return noise.to(dtype=dtype or torch.get_default_dtype(), device=device)


class PhiloxNoise(TorchFunctionMode):
    """While it is entered, in this thread, torch.randn draws from PhiloxGenerators as a CUDA device would."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        generator = options.get("generator")
        if func is not torch.randn or not isinstance(generator, PhiloxGenerator):
            return func(*args, **options)
        shape = options.get("size", args[0] if args and not isinstance(args[0], int) else args)
        return generator.randn(shape, options.get("dtype"), options.get("device"))


def philox_generator(view: Any, seed: int) -> PhiloxGenerator:
    """A generator for one call of `view`, a request's own pipeline, whose methods that draw are made to know it.

    The mode is entered there and nowhere else: around blocks it would cost time, and make compiled ones compile again.
    """
    for owner, name in ((view, "prepare_latents"), (view.scheduler, "step")):
        owner.__dict__[name] = with_noise(getattr(owner, name))
    generator = PhiloxGenerator("cpu")
    generator.manual_seed(seed)
    return generator


def with_noise(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method`, within `PhiloxNoise`; pipelines see the same signature."""

    @functools.wraps(method)
    def noisy(*args: Any, **options: Any) -> Any:
        with PhiloxNoise():
            return method(*args, **options)

    return noisy
