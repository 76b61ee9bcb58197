"""Blocks launched as graphs: the same bits, few graphs, and a way out for what a graph cannot stand for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from services.sampler.blocks import Block, describe
from services.sampler.budget import Budget
from services.sampler.desk import fill, same_bits, twin
from services.sampler.drawing import Drawing
from services.sampler.engine import Engine
from services.sampler.gates import Gate
from services.sampler.graphs import CALM_S, Graphs
from services.sampler.model import AttachedModel
from services.sampler.recorder import CudaRecorder
from services.sampler.requests import ImageRequest
from services.sampler.ring import Ring
from services.sampler.work import WorkMemory
from services.sampler.workspace import Workspace
from tests.sampler.inprocess import attached, under_baton
from tests.sampler.tape import TapeRecorder
from tests.stack import Stack

# A gate for each block of the tiny Z-Image, as real sizes have it.
GATE_LIMIT = 400_000
CPU = torch.device("cpu")
SIZES = [(64, 64), (96, 64), (64, 64), (96, 64)]


# ---- pictures


def drawn(model: AttachedModel, index: int, prompt: str = "a red fox") -> str:
    """SHA-256 of request `index`'s picture."""
    width, height = SIZES[index]
    request = ImageRequest("tiny", prompt, "r", width_px=width, height_px=height, step_count=8, seed=index)
    workspace = Workspace(model.engine, WorkMemory(0))
    drawing = Drawing(
        model, workspace, model.traits.resolve(request), 0, lambda progress: None, lambda step, image: None
    )
    return hashlib.sha256(under_baton(model.engine, drawing.draw).image().tobytes()).hexdigest()


def pictures(stack: Stack, ring: Ring, *graphs: Graphs) -> list[str]:
    def speedups_of(engine: Engine) -> Sequence[Graphs]:
        return graphs

    with attached(stack, "tiny", ring, GATE_LIMIT, speedups_of) as model:
        return [drawn(model, index) for index in range(len(SIZES))]


def test_streamed_pictures_are_the_same(stack: Stack) -> None:
    """Six blocks through three slots that are poisoned when left: a graph for each slot serves all of a kind."""
    graphs = Graphs(CPU, TapeRecorder())
    found = pictures(stack, Ring(CPU, Budget(1 << 40), keep_residents=False, poison=True), graphs)

    assert found == pictures(stack, Ring(CPU, Budget(1 << 40), keep_residents=False, poison=True))
    # 4 pictures of 8 steps through 6 blocks, without those that were met first, recorded or compared.
    assert graphs.replay_count > 100
    # Two sizes, three kinds of blocks (before the join, the prompt's, after it), three slots.
    assert graphs.graph_count <= 2 * 3 * 3


def test_resident_pictures_are_the_same(stack: Stack) -> None:
    graphs = Graphs(CPU, TapeRecorder())

    assert pictures(stack, Ring(CPU, Budget(1 << 40)), graphs) == pictures(stack, Ring(CPU, Budget(1 << 40)))
    assert graphs.replay_count > 100


def test_encoders_layers_are_recorded_too(stack: Stack) -> None:
    """A prompt passes them once; prompts are as long as the model pads them, so the next one meets them again."""
    graphs = Graphs(CPU, TapeRecorder())
    prompts = [f"a fox, take {n}" for n in range(5)]
    found = []
    with structlog.testing.capture_logs() as logs:
        for speedups in ([graphs], []):
            with attached(stack, "tiny", Ring(CPU, Budget(1 << 40)), 90_000, lambda engine, s=speedups: s) as model:  # type: ignore[misc]
                found.append([drawn(model, 0, prompt) for prompt in prompts])
                layers = set(model.pipeline.text_encoder.layers)
                assert len(layers.intersection(gate.module for gate in model.gates)) > 1

    assert found[0] == found[1]
    assert "launched kernel by kernel" not in str(logs)


# ---- what a graph cannot stand for


def block_of(module: nn.Module) -> Block:
    arena: Any = object()
    return describe(Gate("denoiser", "block", module, arena, ()), nn.Module, Path())


def taken(*modules: nn.Module, device: torch.device = CPU) -> Graphs:
    graphs = Graphs(device, TapeRecorder())
    graphs.take([block_of(module) for module in modules])
    return graphs


def inputs(count: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 8, generator=generator) for _ in range(count)]


class Plain(nn.Module):
    def forward(self, x: torch.Tensor, more: dict[str, torch.Tensor], gain: float = 1.0) -> tuple[torch.Tensor, None]:
        return (x.sin() * more["scale"].expand(2, 8) * gain, None)


class Counting(nn.Module):
    """Keeps something to itself from call to call."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * self.calls


class InPlace(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.add_(1)


class Asking(nn.Module):
    """Lets the numbers decide what is computed."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum().item() > 0 else x * 3


class Odd(nn.Module):
    """Returns what is no plain value."""

    def forward(self, x: torch.Tensor) -> Any:
        return {"x"}, x


class Inner(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor


class Scaled(nn.Module):
    """Differs from others of its class in what can hardly be seen from outside."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.inner = Inner(factor)
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight.detach() * self.inner.factor


def test_arguments_and_results_of_any_plain_kind() -> None:
    """Nested, by name, scalars and nothing; a result is the caller's own, whatever is computed next."""
    module = Plain()
    graphs = taken(module)
    scale = [torch.tensor(n / 8) for n in range(8)]
    results = [module(x, {"scale": scale[n]}, gain=2.0 + n % 2) for n, x in enumerate(inputs(8))]

    assert graphs.replay_count == 4  # two gains, four calls each
    for n, x in enumerate(inputs(8)):
        assert results[n][1] is None
        assert torch.equal(results[n][0], x.sin() * scale[n] * (2.0 + n % 2))


def test_what_keeps_something_to_itself_is_never_replayed() -> None:
    module = Counting()
    graphs = taken(module)

    for x in inputs():
        module(x)
    assert graphs.replay_count == 0


@pytest.mark.parametrize("kind", [InPlace, Asking, Odd])
def test_what_does_more_than_launch_is_never_replayed(kind: type[nn.Module]) -> None:
    module, plain = kind(), kind()
    graphs = taken(module)

    for x, same in zip(inputs(), inputs(), strict=True):
        found, wanted = module(x), plain(same)
        assert all(map(torch.equal, found[1:], wanted[1:])) if kind is Odd else torch.equal(found, wanted)
    assert graphs.replay_count == 0


def test_numbers_in_host_memory_are_never_recorded() -> None:
    """They would be read once, when the graph is recorded."""
    module = Scaled(2.0)
    graphs = taken(module, device=torch.device("meta"))

    assert all(torch.equal(module(x), x * 2.0) for x in inputs())
    assert graphs.replay_count == 0


def test_blocks_that_only_look_alike() -> None:
    """Whatever a block gets of a graph for the first time is compared, also of one that another recorded."""
    one, other = Scaled(2.0), Scaled(3.0)
    assert block_of(one).kind == block_of(other).kind
    taken(one, other)
    places = torch.ones(2, 1)
    for turn, x in enumerate(inputs(12)):
        for at, block in enumerate((one, other)):
            # Each lies in one of two slots, and they change places now and then.
            block.weight.data = places[(at + turn // 4) % 2]
            assert torch.equal(block(x), x * block.inner.factor)


# ---- memory


def test_a_full_memory_is_emptied_after_a_while() -> None:
    """What is there is used on; new layouts wait, then all are recorded again."""
    now = 0.0
    recorder = TapeRecorder()
    graphs = Graphs(CPU, recorder, limit_bytes=2000, clock=lambda: now)
    module = Scaled(2.0)
    graphs.take([block_of(module)])

    def calls(width: int) -> int:
        """Replays of four calls."""
        before = graphs.replay_count
        for _ in range(4):
            assert module(torch.ones(width)).tolist() == [2.0] * width
        return graphs.replay_count - before

    assert calls(8) == 2
    assert calls(7) == 2  # on the same desk
    desk_bytes = graphs.held_bytes
    recorder.held_bytes = 1900
    assert calls(9) == 0  # there is no room for more
    assert calls(8) == 4
    now = CALM_S
    assert calls(9) == 3
    assert recorder.drops > 0
    assert graphs.held_bytes == desk_bytes + 8
    assert graphs.make_way()
    assert graphs.held_bytes == 0
    assert calls(9) == 0
    assert not graphs.make_way()


class FullRecorder(TapeRecorder):
    def record(self, work: Any) -> Any:
        raise torch.OutOfMemoryError


def test_without_memory_for_graphs_blocks_compute_on() -> None:
    graphs = Graphs(CPU, FullRecorder())
    module = Scaled(2.0)
    graphs.take([block_of(module)])

    assert all(torch.equal(module(x), x * 2.0) for x in inputs())


# ---- on a device


class Attention(nn.Module):
    """What blocks are made of: a product with a bias, attention, and work memory far larger than the result."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(256, 3 * 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 4, 64)).permute(2, 0, 3, 1, 4)
        wide = torch.nn.functional.scaled_dot_product_attention(q, k, v).repeat(1, 64, 1, 1).sin()
        return wide.view(x.shape[0], 64, 4, x.shape[1], 64).mean(1).transpose(1, 2).flatten(2)


@pytest.mark.gpu
def test_a_device_gives_eagers_bits(cuda: None) -> None:
    device = torch.device("cuda", 0)
    graphs = Graphs(device, CudaRecorder(device))
    module = Attention().to(device, torch.bfloat16)
    plain = Attention.forward.__get__(module)
    graphs.take([block_of(module)])

    with torch.inference_mode():
        for seed in range(8):
            generator = torch.Generator(device).manual_seed(seed)
            x = torch.randn(2, 300, 256, device=device, dtype=torch.bfloat16, generator=generator)
            assert torch.equal(module(x), plain(x))
    assert graphs.replay_count == 6


@pytest.mark.gpu
def test_a_recording_that_fails_leaves_no_trace(cuda: None) -> None:
    """A block that asks the host; then memory is given back as before, and others are recorded."""
    device = torch.device("cuda", 0)
    graphs = Graphs(device, CudaRecorder(device))
    asking, good = Asking(), Attention().to(device, torch.bfloat16)
    graphs.take([block_of(asking), block_of(good)])
    x = torch.randn(2, 300, 256, device=device, dtype=torch.bfloat16)
    with torch.inference_mode():
        for _ in range(4):
            assert torch.equal(asking(x), x * 2 if x.sum().item() > 0 else x * 3)
        before = torch.cuda.memory_reserved(device)
        for _ in range(4):
            good(x)
    assert graphs.replay_count == 2
    assert graphs.held_bytes > 0
    graphs.make_way()

    assert graphs.held_bytes == 0
    assert torch.cuda.memory_reserved(device) <= before + (64 << 20)  # cuBLAS keeps scratch memory


@given(st.lists(st.tuples(st.integers(1, 3), st.sampled_from(["dense", "expanded", "every other"])), max_size=4),
       st.integers(0, 7))  # fmt: skip
def test_a_twin_has_layout_offset_and_numbers(dims: list[tuple[int, str]], lead: int) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [1 if how == "expanded" else 2 * n if how == "every other" else n for n, how in dims]
    base = torch.randn(*sizes, 1, generator=generator).new_empty(lead + torch.Size(sizes).numel())
    base.normal_(generator=generator)
    tensor = base[lead:].view(sizes)
    for dim, (n, how) in enumerate(dims):
        if how == "expanded":
            tensor = tensor.expand(*tensor.shape[:dim], n, *tensor.shape[dim + 1 :])
        elif how == "every other":
            tensor = tensor[(slice(None),) * dim + (slice(None, None, 2),)]
    copy = fill(twin(tensor, 64), tensor)

    assert copy.stride() == tensor.stride()
    assert (copy.data_ptr() - tensor.data_ptr()) % 64 == 0
    assert same_bits(copy, tensor)
