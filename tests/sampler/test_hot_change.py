"""Models are replaced, removed and asked back while replicas draw: nothing under way is disturbed."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from headwater_client import Client, Image, MemoryFull, ModelState, Progress, UnknownModel
from PIL import Image as Pillow
from safetensors.torch import load_file, save_file

from tests.sampler.support import idle, pixels, plain_picture, plain_pipeline, served
from tests.stack import Stack, running
from tests.tiny_models import CALLS

SIZE, STEPS, SEED = (64, 64), 40, 7
PROMPT = "a red fox"


@pytest.fixture
def folder(tiny_folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a model that a test may change."""
    return Path(shutil.copytree(tiny_folders["z_image"], tmp_path / "z_image"))


@pytest.fixture
def changing(folder: Path, tmp_path: Path) -> Iterator[Stack]:
    with running(tmp_path, {"z_image": folder}) as stack:
        yield stack


def retrain(folder: Path) -> None:
    """Other numbers of the same names and shapes, put in place as a whole."""
    file = next((folder / "transformer").glob("*.safetensors"))
    save_file({name: tensor * 1.1 for name, tensor in load_file(file).items()}, folder / "new.tmp")
    (folder / "new.tmp").rename(file)


def assert_plain(image: Pillow.Image, folder: Path) -> None:
    """The picture is what diffusers draws from the folder as it is now."""
    plain_pipeline.cache_clear()
    assert np.array_equal(pixels(image), pixels(plain_picture(folder, PROMPT, SIZE, STEPS, SEED)))


def drawing(client: Client) -> Iterator[object]:
    """Events of a picture that is under way."""
    events = client.stream(
        PROMPT, model="z_image", width=SIZE[0], height=SIZE[1], steps=STEPS, seed=SEED, **CALLS["z_image"]
    )
    next(event for event in events if isinstance(event, Progress) and event.step >= 2)
    return events


def test_a_replaced_model_is_drawn_anew_and_what_runs_ends_on_the_old(changing: Stack, folder: Path) -> None:
    """Each picture is diffusers' own of the files before or after; the old arena goes with its last picture."""
    loader = changing.loader("--eager-load")
    sampler = changing.sampler()
    address = sampler.addresses[0]
    with Client(address) as client:
        events = drawing(client)
        old = Path(shutil.copytree(folder, folder.parent / "before" / "z_image"))
        retrain(folder)
        os.kill(loader.pid, signal.SIGHUP)
        sampler.wait_for('event="letting go" model=z_image uses=2')
        new = served(address, "z_image", PROMPT, SIZE, STEPS, SEED)
        images = [event for event in events if isinstance(event, Image)]
    assert_plain(images[0].pil, old)
    assert_plain(new.images[0].pil, folder)
    loader.wait_for("event=evicted arena=transformer")
    assert len(list(changing.arena_dir.glob("*.arena"))) == 3


def test_a_removed_model_ends_what_runs_and_is_unknown_afterwards(
    changing: Stack, tiny_folders: dict[str, Path]
) -> None:
    """Its memory goes back; the model that came in its place is drawn."""
    loader = changing.loader("--eager-load")
    sampler = changing.sampler()
    address = sampler.addresses[0]
    with Client(address) as client:
        events = drawing(client)
        (changing.disk / "models.toml").write_text(f'[models.flux]\nfolder = "{tiny_folders["flux"]}"\n')
        os.kill(loader.pid, signal.SIGHUP)
        sampler.wait_for("letting go")
        with pytest.raises(UnknownModel, match="known: flux"):
            served(address, "z_image", PROMPT, SIZE, STEPS, SEED)
        assert [event for event in events if isinstance(event, Image)]
        loader.wait_for("event=evicted", 3)
        assert [model.name for model in client.models()] == ["flux"]
        assert served(address, "flux", PROMPT, SIZE, STEPS, SEED).images


def one_at_a_time(stack: Stack, names: tuple[str, ...]) -> str:
    """A budget that holds the largest of the stack's models and no second one."""
    text = (stack.disk / "models.toml").read_text()
    folders = dict(re.findall(r'\[models\.(\w+)\]\nfolder = "(.*)"', text))
    sizes = [sum(f.stat().st_size for f in Path(folders[name]).rglob("*.safetensors")) for name in names]
    return str(int(max(sizes) * 1.3))


def test_two_models_take_turns_in_room_for_one(own: Stack) -> None:
    """The sampler gives the idle one back when the other is asked for, and attaches it again: the same pictures."""
    names = ("tiny", "flux")
    own.loader("--host-budget", one_at_a_time(own, names))
    sampler = own.sampler()
    with Client(sampler.addresses[0]) as client:
        digests = [
            client.generate(PROMPT, model=name, steps=2, seed=SEED, timeout=90).images[0].sha256 for name in names * 2
        ]
        ready = [model.name for model in client.models() if model.state is ModelState.READY]
    assert digests[:2] == digests[2:]
    assert ready == ["flux"]


def test_what_is_being_drawn_or_was_asked_to_stay_is_not_given_back(own: Stack) -> None:
    """A picture under way, and --attach, keep a model; the refusal says who has it. Done, and it is given back."""
    own.loader("--host-budget", one_at_a_time(own, ("tiny", "flux")))
    busy = own.sampler("--name", "busy")
    with Client(busy.addresses[0]) as client:
        events = client.stream(PROMPT, model="tiny", steps=1000, seed=SEED)
        next(event for event in events if isinstance(event, Progress) and event.step >= 2)
        with pytest.raises(MemoryFull, match="tiny/transformer in use by busy"):
            client.generate(PROMPT, model="flux", steps=2, timeout=60)
        assert next(model for model in client.models() if model.name == "tiny").attached  # and serves new requests
        events.close()
        idle(busy.addresses[0])
        assert client.generate(PROMPT, model="flux", steps=2, timeout=60).images
    busy.stop()

    keeps = own.sampler("--name", "keeps", "--attach", "tiny")
    with Client(keeps.addresses[0]) as client:
        with pytest.raises(MemoryFull, match="in use by keeps"):
            client.generate(PROMPT, model="flux", steps=2, timeout=60)
        assert client.generate(PROMPT, model="tiny", steps=2, timeout=60).images


def test_a_hint_fills_and_attaches_nothing(own: Stack) -> None:
    """`prepare --background` leaves the model READY in the host's memory and nobody's."""
    own.loader()
    sampler = own.sampler()
    with Client(sampler.addresses[0]) as client:
        assert list(client.prepare("tiny", background=True))[-1].done
        model = next(model for model in client.models() if model.name == "tiny")
        assert (model.state, model.attached) == (ModelState.READY, False)


def test_two_cold_models_come_in_turns(own: Stack) -> None:
    """What a picture stands still for is read before what another will need: nobody waits for all of it."""
    own.loader("--max-fill-rate", "600KiB", "--fill-threads", "1")
    sampler = own.sampler()
    with Client(sampler.addresses[0]) as client, Client(sampler.addresses[0]) as observer:
        first = client.stream(PROMPT, model="tiny", steps=2, seed=SEED)
        next(event for event in first if isinstance(event, Progress))
        for event in observer.stream(PROMPT, model="flux", steps=2, seed=SEED):
            if isinstance(event, Progress) and event.phase.value == "denoising":
                break
        tiny = next(model for model in observer.models() if model.name == "tiny")
        assert tiny.ready_bytes < tiny.size_bytes
        first.close()
