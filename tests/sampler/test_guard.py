"""Shared modules are as before, or are made so."""

from __future__ import annotations

import torch
from torch import nn

from services.sampler.guard import Guard


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))


def test_untouched_modules_are_left_alone() -> None:
    """Running a module, and what it caches on itself, is no change."""
    module = net()
    guard = Guard([("net", module)])
    module(torch.zeros(1, 4))
    module.cache = torch.zeros(3)

    assert guard.mend() == []


def test_every_kind_of_trace_is_mended() -> None:
    """A hook, a mode, a cast, a swapped module, param or processor is named and undone."""
    module = net()
    inner = module[1]
    weight, linear = module[0].weight, inner[0]
    guard = Guard([("net", module)])
    changes = {
        "net.1.0": lambda: linear.register_forward_hook(lambda *a: None),
        "net.": lambda: setattr(module, "training", False),
        "net.0": lambda: setattr(module[0], "weight", nn.Parameter(torch.zeros(4, 4))),
        "net.1": lambda: setattr(inner, "0", nn.Identity()),
    }
    for name, change in changes.items():
        change()
        assert guard.mend() == [name]
        assert guard.mend() == []

    assert module[0].weight is weight
    assert module[1][0] is linear
    assert module.training
    assert not linear._forward_hooks


def test_a_cast_is_undone() -> None:
    """An upcast of shared params in place is put back, values included."""
    module = net().half()
    before = module[0].weight.clone()
    guard = Guard([("net", module)])
    module.float()

    assert set(guard.mend()) == {"net.0", "net.1.0"}
    assert module[0].weight.dtype == torch.float16
    assert torch.equal(module[0].weight, before)


def test_a_swapped_processor_is_undone() -> None:
    """What attention pipelines swap in mid-request is an attribute without a table."""
    module = net()
    module[0].processor = kept = object()
    guard = Guard([("net", module)])
    module[0].processor = object()

    assert guard.mend() == ["net.0"]
    assert module[0].processor is kept
