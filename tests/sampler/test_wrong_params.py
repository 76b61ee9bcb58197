"""Checkpoints that are well-formed and not of the architecture that their configs name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.errors import BadCheckpoint
from services.params.arena import attach
from services.sampler.binding import build_pipeline
from tests.sampler.inprocess import prepared
from tests.stack import running

Tensors = dict[str, torch.Tensor]


def without_one(tensors: Tensors) -> None:
    del tensors[min(tensors)]


def under_another_name(tensors: Tensors) -> None:
    tensors["stranger"] = tensors.pop(min(tensors))


def of_another_shape(tensors: Tensors) -> None:
    name = min(tensors)
    tensors[name] = torch.cat([tensors[name], tensors[name]])


@pytest.mark.parametrize("component", ["transformer", "text_encoder"])
@pytest.mark.parametrize("change", [without_one, under_another_name, of_another_shape])
def test_params_of_another_architecture_are_refused(
    component: str, change: Callable[[Tensors], None], tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    """The component is named, and what is missing of it; no folder is."""
    folder = Path(shutil.copytree(tiny_folders["tiny"], tmp_path / "tiny"))
    (file,) = (folder / component).glob("*.safetensors")
    tensors = load_file(file)
    name = min(tensors)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})

    with running(tmp_path, {"tiny": folder}) as stack, ExitStack() as leases:
        stack.loader()
        model = prepared(stack, "tiny")
        arenas = {
            part.name: leases.enter_context(attach(stack.arena_dir / part.arena, part.generation))
            for part in model.components
        }
        with pytest.raises(BadCheckpoint) as caught:
            build_pipeline(stack.arena_dir / model.config, arenas)

    said = str(caught.value)
    assert said.startswith(f"{component}: ")
    assert (name in said) == (change is not of_another_shape)  # the libraries say of shapes that they differ, no more
    assert str(tmp_path) not in said
    assert "/dev/shm" not in said
