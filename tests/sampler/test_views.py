"""A request's own tree of an autoencoder's modules."""

from __future__ import annotations

import copy
import types
from typing import Any

import pytest
import torch
from torch import nn

from services.sampler.views import tree_copy
from tests import tiny_models


@pytest.mark.parametrize("name", ["z_image", "sdxl", "flux", "qwen_image"])
def test_a_tree_is_what_deepcopy_makes(name: str) -> None:
    """Same names, classes, settings and results; no module, dictionary or list in common but what nobody can change."""
    vae = getattr(tiny_models, name)().vae
    own = {id(p): nn.Parameter(p.detach().clone()) for p in vae.parameters()}
    tree, deep = tree_copy(vae, own), copy.deepcopy(vae)

    assert not {id(m) for m in tree.modules()} & {id(m) for m in vae.modules()}
    assert list(map(id, tree.parameters())) == list(map(id, own.values()))
    assert all(
        t is not o and t.equal(o) for t, o in zip(tree_copy(vae, {}).parameters(), vae.parameters(), strict=True)
    )
    for (path, mine), (same_path, theirs), original in zip(
        tree.named_modules(), deep.named_modules(), vae.modules(), strict=True
    ):
        assert (path, type(mine), mine.__dict__.keys()) == (same_path, type(theirs), theirs.__dict__.keys())
        for key, value in mine.__dict__.items():
            if type(value) in (dict, list, set):
                assert value is not original.__dict__[key], (path, key)
    noise = torch.randn(
        1, 3, *([1] if name == "qwen_image" else []), 32, 32, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        assert torch.equal(tree.encode(noise).latent_dist.mode(), vae.encode(noise).latent_dist.mode())


class Knotted(nn.Module):
    """Refers to its own parts in every way that one could think of."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(2, 2)
        self.same = self.part
        self.call = self.part.forward
        self.listed: list[Any] = [self.part, {"again": self.part}]
        object.__setattr__(self, "hidden", self.part)


def test_references_within_a_tree_stay_within_it() -> None:
    knotted = Knotted()
    tree: Any = tree_copy(knotted, {})

    assert tree.part is tree.same is tree.hidden is tree.listed[0] is tree.listed[1]["again"] is not knotted.part
    assert isinstance(tree.call, types.MethodType)
    assert tree.call.__self__ is tree.part
    tree.part.register_forward_hook(lambda *_: None)
    assert not knotted.part._forward_hooks
