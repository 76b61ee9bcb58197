"""Models without a diffusers folder: configs of known families, and which file is which component."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import diffusers
import pytest
import transformers
from diffusers import DiffusionPipeline

from services.loader.catalog import read_model
from services.loader.entries import ModelEntry
from services.loader.family import BUILT_IN, NAMES, built_in
from services.sampler.names import of_diffusers
from tests.loader.published import (
    EXTENT,
    ORIGINAL,
    components_of,
    index_of,
    module_of,
    original,
    published,
    write_files,
    write_tokenizers,
    write_whole,
)

# What the published files hold.
QWEN_3_4B, QWEN_3_8B, QWEN_25_VL, CLIP_L, CLIP_G, T5_XXL = (
    4_022_468_096, 8_190_735_360, 8_292_166_656, 123_060_480, 694_659_840, 4_762_310_656
)  # fmt: skip
Z_IMAGE = {"transformer": 6_154_908_736, "text_encoder": QWEN_3_4B}
QWEN_IMAGE = {"transformer": 20_430_401_088, "text_encoder": QWEN_25_VL, "vae": 126_892_531}
FLUX_DEV = {"transformer": 11_901_408_320, "text_encoder": CLIP_L, "text_encoder_2": T5_XXL}
PARAMETERS: dict[str, dict[str, int]] = {
    "z-image-turbo": Z_IMAGE,
    "z-image": Z_IMAGE,
    "qwen-image": QWEN_IMAGE,
    "qwen-image-edit": QWEN_IMAGE,
    "qwen-image-edit-2509": QWEN_IMAGE,
    "qwen-image-edit-2511": QWEN_IMAGE,
    "flux.1-dev": FLUX_DEV,
    "flux.1-kontext-dev": FLUX_DEV,
    "flux.1-schnell": {"transformer": 11_891_178_560, "text_encoder": CLIP_L, "text_encoder_2": T5_XXL},
    "flux.2-klein-4b": {"transformer": 3_875_544_576, "text_encoder": QWEN_3_4B},
    "flux.2-klein-9b": {"transformer": 9_078_581_248, "text_encoder": QWEN_3_8B},
    # With the table of positions, which is no parameter but is in the file.
    "sd3.5-medium": {"transformer": 2_469_663_936, "text_encoder_2": CLIP_G, "text_encoder_3": T5_XXL},
    "sd3.5-large": {"transformer": 8_146_280_768, "text_encoder_2": CLIP_G, "text_encoder_3": T5_XXL},
    "sdxl": {"unet": 2_567_463_684, "text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "vae": 83_653_863},
    "sd1.5": {"unet": 859_520_964, "text_encoder": CLIP_L, "vae": 83_653_863},
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_tokenizers(tmp_path_factory.mktemp("tokenizers"))


def tokenizers_for(family: str, folders: dict[str, Path]) -> dict[str, Path]:
    """A folder for each tokenizer that a family has."""
    found = {}
    for part, entry in index_of(family).items():
        if part.startswith("tokenizer"):
            found[part] = folders[entry[1].removesuffix("Fast").removesuffix("Tokenizer")]
    return found


def test_each_family_is_listed() -> None:
    """A folder of configs to each name, and a published size to each."""
    assert {path.name for path in BUILT_IN.iterdir() if path.is_dir()} == set(NAMES) == set(PARAMETERS)


@pytest.mark.parametrize("family", NAMES)
def test_configs_make_models_of_the_published_size(family: str) -> None:
    """Built without memory; what says how large a component is, is what its config says."""
    counts = {}
    for part in components_of(family):
        module = module_of(family, part)
        counts[part] = sum(param.numel() for param in module.parameters())
        if type(module).__name__ == "SD3Transformer2DModel":
            counts[part] += module.pos_embed.pos_embed.numel()  # type: ignore[operator, union-attr]

    assert {part: counts[part] for part in PARAMETERS[family]} == PARAMETERS[family]
    assert built_in(family).wanted.keys() == set(components_of(family))


def test_qwen_encoders_have_their_positions() -> None:
    """Rotations are no params: a config that is not understood would show in pictures only."""
    three, vision = module_of("z-image", "text_encoder").config, module_of("qwen-image", "text_encoder").config

    assert three.rope_parameters["rope_theta"] == 1e6  # type: ignore[union-attr, index]
    rope = vision.text_config.rope_parameters  # type: ignore[union-attr]
    assert (rope["rope_theta"], rope["mrope_section"]) == (1e6, [16, 24, 24])


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_authors_layout_is_the_configs(family: str, prefix: str) -> None:
    """Names and shapes, by diffusers' converter, are those of the module that the config makes."""
    for part in components_of(family):
        module = module_of(family, part)
        if type(module).__name__ in ORIGINAL:
            wanted = module.state_dict()
            theirs = {prefix + name if part != "vae" else name: tensor for name, tensor in original(module).items()}
            found = of_diffusers(type(module), theirs, wanted, module.config)  # type: ignore[arg-type]

            assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in wanted.items()}


@pytest.mark.parametrize("family", NAMES)
def test_files_are_told_apart_and_their_family_with_them(
    family: str, tmp_path: Path, tokenizers: dict[str, Path]
) -> None:
    """By names and shapes; where several families fit, the first is taken unless one is named, and this is said."""
    files = tuple(reversed(write_files(tmp_path, family).values()))
    named = tokenizers_for(family, tokenizers)
    fitting = [name for name in NAMES if PARAMETERS[name] == PARAMETERS[family]]

    own = read_model(ModelEntry("m", checkpoint=files, family=family, tokenizers=named), EXTENT)
    told = read_model(ModelEntry("m", checkpoint=files, tokenizers=tokenizers_for(fitting[0], tokenizers)), EXTENT)

    assert {part.name: part.checkpoint.files[0].path.stem for part in own.components} == {
        part: part for part in components_of(family)
    }
    assert own.pipeline_class == index_of(family)["_class_name"]
    assert told.pipeline_class == index_of(fitting[0])["_class_name"]
    assert (own.note, told.note) == (
        "",
        f"taken for {fitting[0]}; its files fit {', '.join(fitting[1:])} too: family = ... says which"
        if fitting[1:]
        else "",
    )


@pytest.mark.parametrize("family", NAMES)
def test_diffusers_makes_a_pipeline_of_what_samplers_get(
    family: str, tmp_path: Path, tokenizers: dict[str, Path]
) -> None:
    """The published config folder is whole: only the components' params are not in it."""
    files = tuple(write_files(tmp_path, family).values())
    entry = ModelEntry("m", checkpoint=files, family=family, tokenizers=tokenizers_for(family, tokenizers))
    folder = published(read_model(entry, EXTENT), tmp_path)

    components: dict[str, Any] = {part: module_of(family, part) for part in components_of(family)}
    if "processor" in index_of(family):  # the class needs torchvision
        components["processor"] = None
        assert transformers.AutoTokenizer.from_pretrained(folder / "processor")("a fox").input_ids
        assert transformers.Qwen2VLImageProcessor.from_pretrained(folder / "processor").merge_size == 2

    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True, **components)

    assert type(pipeline) is getattr(diffusers, index_of(family)["_class_name"])
    assert pipeline.tokenizer("a fox").input_ids


@pytest.mark.parametrize("family", ["sd1.5", "sdxl", "sd3.5-medium", "flux.1-dev"])
def test_one_file_is_taken_apart(family: str, tmp_path: Path, tokenizers: dict[str, Path]) -> None:
    """Each component is a part of the file under names that its converter knows; the bytes of others are no one's."""
    file = write_whole(tmp_path / "whole.safetensors", family)

    source = read_model(ModelEntry("m", checkpoint=(file,), tokenizers=tokenizers_for(family, tokenizers)), EXTENT)

    assert [part.name for part in source.components] == components_of(family)
    for part in source.components:
        module = module_of(family, part.name)
        names = {tensor.name.removeprefix("model.diffusion_model.") for tensor in part.checkpoint.tensors}
        assert names == original(module).keys()
    ranges = sorted((t.offset, t.size_bytes) for part in source.components for t in part.checkpoint.tensors)
    assert all(at + size <= after for (at, size), (after, _) in itertools.pairwise(ranges))
    assert file.stat().st_size - sum(size for _, size in ranges) > 2 * 1000
    assert len({part.identity for part in source.components}) == len(source.components)
