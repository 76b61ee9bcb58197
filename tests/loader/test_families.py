"""Models without a diffusers folder: configs of known families, and which file is which component."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import gguf
import pytest
import torch
import transformers
from diffusers import DiffusionPipeline
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel

from services.errors import BadCheckpoint
from services.loader.arenas import ArenaDir
from services.loader.catalog import ModelSource, read_model
from services.loader.config import Config, parse_args
from services.loader.entries import ConfigError, ModelEntry, read_models
from services.loader.family import BUILT_IN, NAMES, built_in
from services.loader.gguf_tokenizer import tokenizer_files
from services.sampler.names import of_diffusers
from tests.loader.published import (
    ORIGINAL,
    components_of,
    index_of,
    module_of,
    original,
    write_component,
    write_files,
    write_llama,
    write_sparse,
)
from tests.loader.weights_files import LORA, write_named
from tests.tiny_models import CHAT, clip_tokenizer, qwen_tokenizer, t5_tokenizer

# What the published files hold.
QWEN_3_4B, QWEN_3_8B, QWEN_25_VL, CLIP_L, CLIP_G, T5_XXL = (
    4_022_468_096, 8_190_735_360, 8_292_166_656, 123_060_480, 694_659_840, 4_762_310_656
)  # fmt: skip
PARAMETERS: dict[str, dict[str, int]] = {
    **dict.fromkeys(("z-image-turbo", "z-image"), {"transformer": 6_154_908_736, "text_encoder": QWEN_3_4B}),
    **dict.fromkeys(
        ("qwen-image", "qwen-image-edit", "qwen-image-edit-2509", "qwen-image-edit-2511"),
        {"transformer": 20_430_401_088, "text_encoder": QWEN_25_VL, "vae": 126_892_531},
    ),
    **dict.fromkeys(
        ("flux.1-dev", "flux.1-kontext-dev"),
        {"transformer": 11_901_408_320, "text_encoder": CLIP_L, "text_encoder_2": T5_XXL},
    ),
    "flux.1-schnell": {"transformer": 11_891_178_560, "text_encoder": CLIP_L, "text_encoder_2": T5_XXL},
    "flux.2-klein-4b": {"transformer": 3_875_544_576, "text_encoder": QWEN_3_4B},
    "flux.2-klein-9b": {"transformer": 9_078_581_248, "text_encoder": QWEN_3_8B},
    # With the table of positions, which is no parameter but is in the file.
    "sd3.5-medium": {"transformer": 2_469_663_936, "text_encoder_2": CLIP_G, "text_encoder_3": T5_XXL},
    "sd3.5-large": {"transformer": 8_146_280_768, "text_encoder_2": CLIP_G, "text_encoder_3": T5_XXL},
    "sdxl": {"unet": 2_567_463_684, "text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "vae": 83_653_863},
    "sd1.5": {"unet": 859_520_964, "text_encoder": CLIP_L, "vae": 83_653_863},
}
TOKENIZERS: dict[str, Callable[[], Any]] = {
    "Qwen2": qwen_tokenizer, "CLIP": clip_tokenizer, "T5": t5_tokenizer
}  # fmt: skip
EXTENT = 1 << 26


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with a small tokenizer of each kind."""
    root = tmp_path_factory.mktemp("tokenizers")
    for kind, make in TOKENIZERS.items():
        make().save_pretrained(root / kind)
    return {kind: root / kind for kind in TOKENIZERS}


def tokenizers_for(family: str, folders: dict[str, Path]) -> dict[str, Path]:
    """A folder for each tokenizer that a family has."""
    found = {}
    for part, entry in index_of(family).items():
        if part.startswith("tokenizer"):
            found[part] = folders[entry[1].removesuffix("Fast").removesuffix("Tokenizer")]
    return found


def reason(entry: ModelEntry) -> str:
    with pytest.raises(BadCheckpoint) as caught:
        read_model(entry, EXTENT)
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
    files = tuple(reversed(write_files(tmp_path, family)))
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
    files = tuple(write_files(tmp_path, family))
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


def published(source: ModelSource, root: Path) -> Path:
    arenas = ArenaDir.open(root / "arenas", allow_disk=True, placement=None)
    return arenas.path / arenas.publish_config("m", source)


Z_IMAGE = ("transformer", "text_encoder", "vae")


@pytest.fixture(scope="module")
def z_image(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The three files of a Z-Image."""
    root = tmp_path_factory.mktemp("z-image")
    return {part: write_component(root / f"{part}.safetensors", "z-image", part) for part in Z_IMAGE}


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
    sdxl = tuple(write_files(tmp_path, "sdxl"))
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


MERGES = ("h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ã ©")
SPECIAL, PLAIN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), ("<think>", "</think>")


def real_tokenizer() -> transformers.Qwen2Tokenizer:
    """With merges, special tokens, added ones that are not special, and a chat template."""
    words = [*sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
    vocab = {word: number for number, word in enumerate(words)}
    real = transformers.Qwen2Tokenizer(vocab=vocab, merges=[tuple(merge.split(" ")) for merge in MERGES])
    real.add_tokens([AddedToken(word, normalized=False, special=True) for word in SPECIAL])
    real.add_tokens([AddedToken(word, normalized=False, special=False) for word in PLAIN])
    real.eos_token, real.chat_template = "<|im_end|>", CHAT
    return real


def tell_words(writer: gguf.GGUFWriter, split: str = "qwen2") -> None:
    """As llama.cpp's converter writes it, with words that only fill the table up."""
    real = real_tokenizer()
    words = [real.convert_ids_to_tokens(number) for number in range(len(real))] + ["[PAD300]", "[PAD301]"]
    kinds = {**dict.fromkeys(SPECIAL, 3), **dict.fromkeys(PLAIN, 4), **dict.fromkeys(words[-2:], 5)}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(words)
    writer.add_token_types([kinds.get(word, 1) for word in words])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(words.index(SPECIAL[0]))
    writer.add_pad_token_id(words.index(SPECIAL[0]))
    writer.add_eos_token_id(words.index(SPECIAL[2]))
    writer.add_chat_template(CHAT)


@pytest.fixture(scope="module")
def made(z_image: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> transformers.Qwen2Tokenizer:
    """The tokenizer that samplers find in the config folder of a model whose text encoder is a GGUF file."""
    root = tmp_path_factory.mktemp("gguf")
    encoder = write_llama(root / "Qwen3-4B.gguf", width=2560, depth=36, words=tell_words)
    files = (z_image["transformer"], z_image["vae"], encoder)
    folder = published(read_model(ModelEntry("m", checkpoint=files), EXTENT), root)
    return transformers.Qwen2Tokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)


@pytest.mark.parametrize(
    "text",
    [
        "hello world, 12345",
        "<|im_start|>user\nhello <think>wor</think> <|im_end|>",
        "<|im_start|>user\nhello <|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "Cafe\u0301, decomposed, and café", "  a\n\n\tdon't  ", "日本語 😀 Ωμέγα", "[PAD300]", "",
    ],
)  # fmt: skip
def test_a_gguf_files_tokenizer_is_the_real_one(made: transformers.Qwen2Tokenizer, text: str) -> None:
    """The same numbers for words, special tokens and signs that Unicode writes in two ways."""
    real = real_tokenizer()

    assert made(text).input_ids == real(text).input_ids
    padded = {"padding": "max_length", "max_length": 99, "truncation": True}
    assert made([text], **padded) == real([text], **padded)


def test_a_gguf_files_tokenizer_speaks_as_the_real_one(made: transformers.Qwen2Tokenizer) -> None:
    """Its chat template, the tokens that end and fill, and the size of the vocabulary."""
    real = real_tokenizer()
    chat = [{"role": "user", "content": "hello world"}]

    assert made.apply_chat_template(chat, tokenize=False) == real.apply_chat_template(chat, tokenize=False)
    assert (made.eos_token, made.pad_token, made.bos_token, len(made)) == (
        real.eos_token, real.pad_token, real.bos_token, len(real)
    )  # fmt: skip
    words = [*SPECIAL, *PLAIN]
    assert made.convert_tokens_to_ids(words) == real.convert_tokens_to_ids(words)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (None, " (te.gguf brings none)"),
        (lambda writer: tell_words(writer, "llama-bpe"), " (te.gguf brings one that is not Qwen's)"),
    ],
)
def test_a_gguf_file_without_a_tokenizer_needs_a_folder(
    z_image: dict[str, Path], tmp_path: Path, words: Callable[[gguf.GGUFWriter], None] | None, why: str
) -> None:
    """Or with one that is cut in another way."""
    encoder = write_llama(tmp_path / "te.gguf", width=2560, depth=36, words=words)

    assert reason(ModelEntry("m", checkpoint=(z_image["transformer"], z_image["vae"], encoder))) == (
        f'z-image-turbo needs tokenizer = "...", the folder of a Qwen2 tokenizer{why}'
    )


def test_a_tokenizer_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    """Kinds of words are missing."""
    path = write_llama(tmp_path / "te.gguf", 8, 1, lambda writer: writer.add_token_list(["a", "b"]))

    with pytest.raises(BadCheckpoint, match=r"te.gguf: its tokenizer is not whole"):
        tokenizer_files(path)


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
