"""Which files of a diffusers folder are taken, and which folders are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from services.errors import BadCheckpoint
from services.loader.catalog import identity_of, read_model
from services.loader.entries import ModelEntry
from services.loader.weights import pick_weights
from tests.loader.support import make_model

EXTENT = 1 << 20


def touch(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


@pytest.mark.parametrize(
    ("names", "variant", "picked"),
    [
        (["model.safetensors"], "", "model.safetensors"),
        (["model.safetensors", "pytorch_model.bin"], "", "model.safetensors"),
        (["diffusion_pytorch_model.safetensors", "model.safetensors"], "", "diffusion_pytorch_model.safetensors"),
        (["model.safetensors", "model.safetensors.index.json"], "", "model.safetensors.index.json"),
        (["model.safetensors", "model.fp16.safetensors"], "", "model.safetensors"),
        (["model.safetensors", "model.fp16.safetensors"], "fp16", "model.fp16.safetensors"),
        (["model.safetensors"], "fp16", "model.safetensors"),
        (["model.safetensors.index.fp16.json", "model.safetensors"], "fp16", "model.safetensors.index.fp16.json"),
        (["odd_name.safetensors"], "", "odd_name.safetensors"),
        (["odd_name.safetensors", "model.gguf"], "", "odd_name.safetensors"),
        (["model-Q8_0.gguf", "config.json"], "", "model-Q8_0.gguf"),
        (["config.json", "tokenizer_config.json"], "", None),
        (["scheduler_config.json"], "", None),
        ([], "", None),
    ],
)
def test_one_file_is_picked(tmp_path: Path, names: list[str], variant: str, picked: str | None) -> None:
    """The documented order: variant, shards, diffusers' name, transformers' name, the only one."""
    touch(tmp_path / "unet", *names)

    path = pick_weights(tmp_path / "unet", variant)

    assert (path.name if path else None) == picked


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["diffusion_pytorch_model.bin"], "convert"),
        (["model.ckpt", "config.json"], "convert"),
        (["config.json"], "no safetensors file"),
        (["one.safetensors", "two.safetensors"], "several safetensors"),
        (["model-Q4_K.gguf", "model-Q8_0.gguf"], "several GGUF"),
    ],
)
def test_what_cannot_be_picked_is_refused(tmp_path: Path, names: list[str], words: str) -> None:
    """Pickles are never opened, and nothing is guessed."""
    touch(tmp_path / "unet", *names)

    with pytest.raises(BadCheckpoint, match=words):
        pick_weights(tmp_path / "unet", "")


def test_null_components_and_parts_without_params_are_skipped(tmp_path: Path) -> None:
    """Only what model_index.json names and has safetensors is a component."""
    make_model(tmp_path / "toy")
    (tmp_path / "toy" / "leftover").mkdir()
    save_file({"a": np.ones(1)}, tmp_path / "toy" / "leftover" / "model.safetensors")

    source = read_model(ModelEntry("toy", tmp_path / "toy"), EXTENT)

    assert [component.name for component in source.components] == ["text_encoder", "transformer"]
    assert source.pipeline_class == "ToyPipeline"


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("", "no valid JSON"),
        ("[]", "no JSON object"),
        ('{"../../etc": ["a", "b"]}', "no plain word"),
        ('{"unet": ["diffusers", "UNet"]}', "folder is missing"),
        ('{"_class_name": "P"}', "no component"),
        ('{"_class_name": "P", "text_encoder": [null, null]}', "no component"),
    ],
)
def test_a_bad_index_is_refused(tmp_path: Path, index: str, words: str) -> None:
    (tmp_path / "model_index.json").write_text(index)

    with pytest.raises(BadCheckpoint, match=words) as caught:
        read_model(ModelEntry("m", tmp_path), EXTENT)
    assert str(tmp_path) not in str(caught.value)


def test_a_variant_that_no_component_has_is_an_error(tmp_path: Path) -> None:
    """A typing error must not serve other weights in silence."""
    make_model(tmp_path / "toy")

    with pytest.raises(BadCheckpoint, match='variant "bf16"'):
        read_model(ModelEntry("toy", tmp_path / "toy", "bf16"), EXTENT)


def test_identity_changes_with_bytes_times_and_layout(tmp_path: Path) -> None:
    """A touched, rewritten or otherwise laid out component is another one; a second look is not."""
    make_model(tmp_path / "toy")
    entry = ModelEntry("toy", tmp_path / "toy")

    def identities(extent_bytes: int = EXTENT) -> list[str]:
        return [component.identity for component in read_model(entry, extent_bytes).components]

    before = identities()
    assert identities() == before
    assert not set(identities(EXTENT * 2)) & set(before)
    path = tmp_path / "toy" / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes())
    assert identities()[0] != before[0]
    assert identities()[1] == before[1]
    checkpoint = read_model(entry, EXTENT).components[1].checkpoint
    assert identity_of(checkpoint, EXTENT) == before[1]


def test_index_entries_are_checked_before_files(tmp_path: Path) -> None:
    """Odd values in model_index.json are no components."""
    make_model(tmp_path / "toy")
    path = tmp_path / "toy" / "model_index.json"
    index = json.loads(path.read_text()) | {"flag": True, "sizes": [1, 2, 3], "force_zeros": None, "name": "text"}
    path.write_text(json.dumps(index))

    assert len(read_model(ModelEntry("toy", tmp_path / "toy"), EXTENT).components) == 2
