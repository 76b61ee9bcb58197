"""Sets of files that do not belong together, or lack something: refused in one line that says which and why."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from services.errors import BadCheckpoint
from services.loader.catalog import read_model
from services.loader.config import Config, parse_args
from services.loader.entries import ConfigError, ModelEntry, read_models
from services.loader.models import Models
from tests.loader.published import EXTENT, write_component, write_files, write_llama, write_sparse, write_tokenizers
from tests.loader.weights_files import LORA, write_gguf, write_named


def reason(entry: ModelEntry) -> str:
    with pytest.raises(BadCheckpoint) as caught:
        read_model(entry, EXTENT)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def z_image(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The three files of a Z-Image."""
    return write_files(tmp_path_factory.mktemp("z-image"), "z-image")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_tokenizers(tmp_path_factory.mktemp("tokenizers"))


def test_a_vae_of_another_family_is_refused(z_image: dict[str, Path], tmp_path: Path) -> None:
    """Told from its latent channels, whether its component is named or told; the line says file, found and expected."""
    other = write_component(tmp_path / "sdxl_vae.safetensors", "sdxl", "vae")
    files = {**z_image, "vae": other}

    named = reason(ModelEntry("m", files={part: (path,) for part, path in files.items()}))
    told = reason(ModelEntry("m", checkpoint=tuple(files.values())))

    assert named == (
        "vae: sdxl_vae.safetensors: AutoencoderKL (VAE) of 16 channels expected by z-image-turbo,"
        " AutoencoderKL (VAE) of 4 channels found"
    )
    assert told.startswith("sdxl_vae.safetensors: AutoencoderKL (VAE) of 4 channels found, where z-image-turbo has")


def test_a_text_encoder_of_another_width_is_refused(z_image: dict[str, Path], tmp_path: Path) -> None:
    """Also a GGUF file, which says that it is a Qwen3 in its metadata only."""
    eight = write_llama(tmp_path / "Qwen3-8B.gguf", width=4096, depth=36)
    files = {**{part: (path,) for part, path in z_image.items()}, "text_encoder": (eight,)}

    assert reason(ModelEntry("m", files=files)) == (
        "text_encoder: Qwen3-8B.gguf: Qwen3 (text encoder) of 36 blocks, width 2560 expected by z-image-turbo,"
        " qwen3 (text encoder) of 36 blocks, width 4096 found"
    )


def test_a_vision_tower_joins_its_text_encoder(tmp_path: Path, tokenizers: dict[str, Path]) -> None:
    """Whatever the order of the files; beside a text encoder that has none it does not belong."""
    files = write_files(tmp_path, "qwen-image")
    text = write_llama(tmp_path / "Qwen2.5-VL-7B.gguf", 3584, 28, architecture="qwen2vl")
    tower = write_gguf(tmp_path / "mmproj.gguf", architecture="clip", prefix="v.")
    more = {"tokenizers": {"tokenizer": tokenizers["Qwen2"]}}

    source = read_model(ModelEntry("m", checkpoint=(tower, files["vae"], text, files["transformer"]), **more), EXTENT)

    encoder = next(part for part in source.components if part.name == "text_encoder")
    assert [file.path.name for file in encoder.checkpoint.files] == [text.name, tower.name]
    assert reason(ModelEntry("m", checkpoint=(tower, files["vae"], files["transformer"]))).startswith(
        "mmproj.gguf: clip (vision tower of a text encoder) found, where qwen-image has"
    )


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: write_named(path / "f.safetensors", LORA), "f.safetensors: LoRA found"),
        (lambda path: write_named(path / "f.safetensors", ("a.weight",)), "f.safetensors: no model that is known here"),
        (lambda path: _raw(path / "f.ckpt", b"PK\x03\x04"), "f.ckpt: a pickle, which this loader never opens"),
        (lambda path: _raw(path / "f.pth", b"\x80\x02}q"), "f.pth: a pickle"),
        (lambda path: _raw(path / "f.bin", b"\x80\x02}q"), "f.bin: a pickle"),
        (lambda path: _raw(path / "f.safetensors", b"version https://git-lfs"), "a git-lfs pointer, .* `git lfs pull`"),
        (lambda path: _raw(path / "f.gguf", b"version https://git-lfs"), "f.gguf: a git-lfs pointer"),
        (
            lambda path: write_component(path / "f.safetensors", "sd1.5", "text_encoder"),
            r"CLIP .* found, where z-image",
        ),
    ],
)
def test_a_file_that_does_not_belong_is_refused(
    z_image: dict[str, Path], tmp_path: Path, write: Callable[[Path], Path], words: str
) -> None:
    """Beside those that do."""
    with pytest.raises(BadCheckpoint, match=words):
        read_model(ModelEntry("m", checkpoint=(*z_image.values(), write(tmp_path))), EXTENT)


def _raw(path: Path, head: bytes) -> Path:
    path.write_bytes(head + bytes(64))
    return path


def test_what_is_missing_is_named(z_image: dict[str, Path], tokenizers: dict[str, Path], tmp_path: Path) -> None:
    """Components with what they would be, tokenizers with the line that names them, all at once."""
    transformer = (z_image["transformer"],)
    encoder = write_component(tmp_path / "clip.safetensors", "sdxl", "text_encoder")
    sdxl = tuple(write_files(tmp_path, "sdxl").values())
    three = tuple(z_image.values())

    assert reason(ModelEntry("m", checkpoint=transformer)) == (
        "z-image-turbo: no file for text_encoder (Qwen3 (text encoder) of 36 blocks, width 2560),"
        " vae (AutoencoderKL (VAE) of 16 channels)"
    )
    assert reason(ModelEntry("m", checkpoint=(encoder,))).startswith("none of the files is a denoiser")
    assert reason(ModelEntry("m", checkpoint=sdxl)) == (
        'sdxl needs tokenizer = "...", the folder of a CLIP tokenizer;'
        ' tokenizer_2 = "...", the folder of a CLIP tokenizer'
    )
    for folder, why in (
        (tmp_path, f" ({tmp_path.name} has no tokenizer.json and no vocab.json)"),
        (tokenizers["CLIP"], " (CLIP is of a CLIP tokenizer)"),
    ):
        assert reason(ModelEntry("m", checkpoint=three, tokenizers={"tokenizer": folder})) == (
            f'z-image-turbo needs tokenizer = "...", the folder of a Qwen2 tokenizer{why}'
        )
    assert "z-image-turbo has no tokenizer_2; it has tokenizer" in reason(
        ModelEntry("m", checkpoint=three, tokenizers={"tokenizer_2": tmp_path})
    )


def test_the_log_says_which_family_was_taken(z_image: dict[str, Path], tokenizers: dict[str, Path]) -> None:
    """Once, however often the files are looked at; and nothing if it was named."""
    folders = {"tokenizer": tokenizers["Qwen2"]}
    told = ModelEntry("told", checkpoint=tuple(z_image.values()), tokenizers=folders)
    models = Models([told, replace(told, name="named", family="z-image")], EXTENT)

    with capture_logs() as logs:
        asyncio.run(models.read_all())
        asyncio.run(models.read_all())

    note = "taken for z-image-turbo; its files fit z-image too: family = ... says which"
    assert logs == [{"event": "a family was chosen", "log_level": "info", "model": "told", "note": note}]


def test_a_family_that_does_not_fit_is_refused(z_image: dict[str, Path], tmp_path: Path) -> None:
    """One that is not built in, one whose denoiser is another, and denoisers that no built-in family has."""
    wide = write_sparse(
        tmp_path / "fill.safetensors",
        {
            "double_blocks.0.img_attn.qkv.weight": (9, 3), "single_blocks.0.linear1.weight": (9, 3),
            "img_in.weight": (3072, 384), "txt_in.weight": (3072, 4096),
        },
    )  # fmt: skip
    three = tuple(z_image.values())

    assert reason(ModelEntry("m", checkpoint=three, family="sd2")).startswith(
        "no family 'sd2' is built in; there are z-"
    )
    assert "Z-Image (denoiser) of 30 blocks, 16 channels, width 2560 found, where sdxl has" in reason(
        ModelEntry("m", checkpoint=three, family="sdxl")
    )
    assert reason(ModelEntry("m", checkpoint=(wide,))) == (
        "no built-in family has FLUX.1 (denoiser) of 1 block, 384 channels, width 4096, without guidance:"
        " name a diffusers folder, which brings the configs"
    )
    files = {part: (path,) for part, path in z_image.items()}
    assert reason(ModelEntry("m", files={**files, "unet": files["transformer"]})) == (
        "z-image-turbo has no unet; it has text_encoder, transformer, vae"
    )


def test_models_toml_names_files_without_a_folder(tmp_path: Path) -> None:
    """Paths are relative to it; what only makes sense without a folder is refused with one."""
    path = tmp_path / "models.toml"
    path.write_text(
        '[models.a]\nfamily = "z-image"\ntokenizer = "qwen"\n[models.a.files]\ntransformer = "t.gguf"\n'
        '[models.b]\ncheckpoint = "sdxl.safetensors"\ntokenizer_2 = "/clip"\npin = true\n'
        '[models.c]\nfolder = "configs"\ncheckpoint = ["one.safetensors", "two.gguf"]\n'
    )

    assert read_models(path) == (
        ModelEntry(
            "a",
            files={"transformer": (tmp_path / "t.gguf",)},
            family="z-image",
            tokenizers={"tokenizer": tmp_path / "qwen"},
        ),
        ModelEntry(
            "b", pin=True, checkpoint=(tmp_path / "sdxl.safetensors",), tokenizers={"tokenizer_2": Path("/clip")}
        ),
        ModelEntry("c", tmp_path / "configs", checkpoint=(tmp_path / "one.safetensors", tmp_path / "two.gguf")),
    )
    for line, words in (
        ('family = "sdxl"', "family is for a model without a folder"),
        ('tokenizer = "x"', "tokenizer is for a model without a folder"),
        ("checkpoint = 1", "checkpoint is a file"),
        ("tokenizers = 1", "unknown key tokenizers"),
    ):
        path.write_text(f'[models.a]\nfolder = "x"\n{line}\n')
        with pytest.raises(ConfigError, match=words):
            read_models(path)
    for line, words in (
        ('checkpoint = "x"\nvariant = "fp16"', "variant picks files of a folder, and there is none"),
        ('family = "sdxl"', r"needs folder = .*, checkpoint = .* or \[models.a.files\]"),
        ('checkpoint = "x"\nfamily = 1', 'family is a word such as "z-image"'),
        ('checkpoint = "x"\ntokenizer = 1', 'tokenizer is a folder, "..."'),
    ):
        path.write_text(f"[models.a]\n{line}\n")
        with pytest.raises(ConfigError, match=words):
            read_models(path)


def test_files_are_added_by_a_flag(z_image: dict[str, Path], tmp_path: Path) -> None:
    """Several, with what models.toml would say of them; and not one that is not there."""
    files = [str(path) for path in z_image.values()]
    flags = ["--listen", "unix:/run/l.sock", "--add"]

    config = parse_args([*flags, f"z={','.join(files)},family=z-image,tokenizer={tmp_path}"])
    named = parse_args([*flags, f"z={files[0]},vae={files[2]}"])

    assert isinstance(config, Config)
    assert isinstance(named, Config)
    whole = ModelEntry("z", checkpoint=tuple(map(Path, files)), family="z-image", tokenizers={"tokenizer": tmp_path})
    assert config.models == (whole,)
    assert named.models == (ModelEntry("z", checkpoint=(Path(files[0]),), files={"vae": (Path(files[2]),)}),)
    for bad, words in ((f"{files[0]},no.gguf", "there is no file no.gguf"), ("family=sdxl", "no file of weights")):
        with pytest.raises(ConfigError, match=words):
            parse_args([*flags, f"z={bad}"])
