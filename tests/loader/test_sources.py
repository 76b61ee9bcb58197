"""Where a model's weights come from: files that models.toml names, GGUF, and folders that are added by a flag."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from headwater.loader.v1 import loader_pb2 as pb

from services.errors import BadCheckpoint, BadConfig
from services.loader.catalog import ModelSource, read_model
from services.loader.config import Config, parse_args
from services.loader.entries import ConfigError, ModelEntry, read_models
from services.rpc.loader_client import LoaderClient
from tests.loader.support import (
    ROOT,
    Workbench,
    assert_holds,
    attach_component,
    component,
    environment,
    make_model,
    prepared,
    save_sharded,
    toy_tensors,
)
from tests.loader.test_loader_faults import refused
from tests.loader.weights_files import FLUX, LORA, T5, VAE, WHOLE_SDXL, gguf_bytes, write_gguf, write_named

EXTENT = 1 << 20


def without_weights(folder: Path, part: str) -> None:
    for path in folder.joinpath(part).iterdir():
        if path.name != "config.json":
            path.unlink()


def source_of(folder: Path, **files: Path) -> ModelSource:
    return read_model(ModelEntry("toy", folder, files={name: (path,) for name, path in files.items()}), EXTENT)


def files_of(source: ModelSource) -> dict[str, list[str]]:
    return {part.name: [file.path.name for file in part.checkpoint.files] for part in source.components}


def assert_holds_packed(bench: Workbench, model: pb.Model, name: str, *paths: Path) -> None:
    """Types and bytes in the arena are those that the gguf package reads."""
    with attach_component(bench, model, name) as arena:
        assert all(arena.is_ready(tensor.extent) for tensor in arena.tensors)
        held = {t.name: (t.dtype, bytes(arena.data[t.offset : t.offset + t.size_bytes])) for t in arena.tensors}
    assert held == gguf_bytes(*paths)


def test_a_gguf_transformer_is_served_beside_safetensors(bench: Workbench) -> None:
    """A real loader fills the arena with the file's packed bytes; the folder has no weights for that component."""
    tensors = bench.add_model("toy")
    without_weights(bench.folders["toy"], "transformer")
    path = write_gguf(bench.disk / "toy-Q8_0.gguf")
    bench.options["toy"] = '[models.toy.files]\ntransformer = "toy-Q8_0.gguf"'

    async def use() -> None:
        async with LoaderClient(bench.address) as client:
            model = await prepared(client, "toy")
            assert_holds_packed(bench, model, "transformer", path)
            with attach_component(bench, model, "text_encoder") as arena:
                assert_holds(arena, tensors["text_encoder"])
            assert (bench.arena_dir / model.config / "transformer" / "config.json").is_file()

    with bench.loader():
        asyncio.run(use())


def test_a_killed_loaders_packed_arena_is_taken_over(bench: Workbench) -> None:
    """Its file is the same one, and nothing is read again."""
    bench.add_model("toy")
    path = write_gguf(bench.disk / "toy.gguf")
    bench.options["toy"] = '[models.toy.files]\ntransformer = "toy.gguf"'

    async def use() -> pb.Model:
        async with LoaderClient(bench.address) as client:
            model = await prepared(client, "toy")
            assert_holds_packed(bench, model, "transformer", path)
            return model

    with bench.loader() as process:
        before = asyncio.run(use())
        process.kill()
        process.wait()
    with bench.loader():
        after = asyncio.run(use())

    assert component(after, "transformer").arena == component(before, "transformer").arena
    assert after.read_bytes == 0


def test_another_file_in_models_toml_is_another_model(bench: Workbench) -> None:
    """On SIGHUP the component of the new file is served; those that stay as they were keep their arena."""
    bench.add_model("toy")
    old, new = (write_gguf(bench.disk / f"{seed}.gguf", seed) for seed in (1, 2))
    bench.options["toy"] = '[models.toy.files]\ntransformer = "1.gguf"'

    async def use(pid: int) -> None:
        async with LoaderClient(bench.address) as client:
            before = await prepared(client, "toy")
            assert_holds_packed(bench, before, "transformer", old)
            bench.options["toy"] = '[models.toy.files]\ntransformer = "2.gguf"'
            bench.write_models()
            watch = client.watch("sampler-1")
            await anext(watch)
            os.kill(pid, signal.SIGHUP)
            await anext(watch)
            after = await prepared(client, "toy")
            assert_holds_packed(bench, after, "transformer", new)
            assert component(after, "text_encoder").arena == component(before, "text_encoder").arena
            await watch.aclose()

    with bench.loader() as process:
        asyncio.run(use(process.pid))


def test_a_named_file_that_is_replaced_is_noticed_at_the_next_prepare(bench: Workbench) -> None:
    """As for files in the model's folder."""
    bench.add_model("toy")
    path = write_gguf(bench.disk / "toy.gguf", 1)
    bench.options["toy"] = '[models.toy.files]\ntransformer = "toy.gguf"'

    async def use() -> None:
        async with LoaderClient(bench.address) as client:
            await prepared(client, "toy")
            write_gguf(bench.disk / "new.gguf", 2).rename(path)
            assert_holds_packed(bench, await prepared(client, "toy"), "transformer", path)

    with bench.loader():
        asyncio.run(use())


def test_named_files_replace_a_components_own(tmp_path: Path) -> None:
    """An index with its shards, or a file anywhere; the identity changes with the file and with nothing else."""
    make_model(tmp_path / "toy")
    (tmp_path / "other").mkdir()
    save_sharded(tmp_path / "other", "unsloth", toy_tensors(9))
    index = tmp_path / "other" / "unsloth.safetensors.index.json"

    plain, mapped = source_of(tmp_path / "toy"), source_of(tmp_path / "toy", transformer=index)

    shards = [f"unsloth-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert files_of(mapped) == {"text_encoder": ["model.safetensors"], "transformer": shards}
    assert [one.identity == other.identity for one, other in zip(plain.components, mapped.components, strict=True)] == [
        True,
        False,
    ]
    assert mapped == source_of(tmp_path / "toy", transformer=index)


def test_a_component_may_have_several_files(tmp_path: Path) -> None:
    """A vision tower is a second file of the text encoder; a tensor that both have is refused."""
    make_model(tmp_path / "toy")
    text = write_gguf(tmp_path / "Qwen2.5-VL-Q8_0.gguf", architecture="qwen2vl")
    mmproj = write_gguf(tmp_path / "mmproj.gguf", architecture="clip", prefix="v.")

    source = read_model(ModelEntry("toy", tmp_path / "toy", files={"text_encoder": (text, mmproj)}), EXTENT)

    assert files_of(source)["text_encoder"] == [text.name, mmproj.name]
    read = {
        tensor.name: part.checkpoint.files[tensor.file].path.read_bytes()[tensor.offset :][: tensor.size_bytes]
        for part in source.components[:1]
        for tensor in part.checkpoint.tensors
    }
    assert read == {name: held for name, (_, held) in gguf_bytes(text, mmproj).items()}
    with pytest.raises(BadCheckpoint, match=r"tensor blk.0.weight stands in two files of one component"):
        read_model(ModelEntry("toy", tmp_path / "toy", files={"text_encoder": (text, text)}), EXTENT)


def test_the_only_gguf_of_a_component_is_taken(tmp_path: Path) -> None:
    """Without safetensors beside it, and without a line in models.toml."""
    make_model(tmp_path / "toy")
    without_weights(tmp_path / "toy", "transformer")
    write_gguf(tmp_path / "toy" / "transformer" / "toy-Q4_0.gguf")

    assert files_of(source_of(tmp_path / "toy"))["transformer"] == ["toy-Q4_0.gguf"]


@pytest.mark.parametrize(
    ("part", "names", "words"),
    [
        ("transformer", LORA, "transformer: f.safetensors: denoiser expected, LoRA found: name another file"),
        ("transformer", T5, r"denoiser expected, T5 \(text encoder\) found"),
        ("vae", T5, r"VAE expected, T5 \(text encoder\) found"),
        ("text_encoder", VAE, r"text encoder expected, AutoencoderKL \(VAE\) found"),
        ("text_encoder", FLUX, r"text encoder expected, FLUX.1 \(denoiser\) found"),
        ("vae", WHOLE_SDXL, r"VAE expected, SDXL \(all-in-one checkpoint\) found"),
        ("controlnet", LORA, "one component expected, LoRA found"),
    ],
)
def test_a_file_for_something_else_is_refused(tmp_path: Path, part: str, names: tuple[str, ...], words: str) -> None:
    """One line says which file, what it is and what belongs there, without a path."""
    make_model(tmp_path / "toy")
    index = tmp_path / "toy" / "model_index.json"
    index.write_text(index.read_text().replace("{", '{"vae": ["diffusers", "V"], "controlnet": ["diffusers", "C"],', 1))
    for name in ("vae", "controlnet"):
        (tmp_path / "toy" / name).mkdir()

    with pytest.raises(BadCheckpoint, match=words) as caught:
        source_of(tmp_path / "toy", **{part: write_named(tmp_path / "f.safetensors", names)})

    assert "/" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_vision_tower_alone_is_no_text_encoder(tmp_path: Path) -> None:
    """It is one only behind the text encoder's own file."""
    make_model(tmp_path / "toy")
    mmproj = write_gguf(tmp_path / "mmproj.gguf", architecture="clip")

    with pytest.raises(BadCheckpoint, match=r"mmproj.gguf: text encoder expected, clip \(vision tower"):
        source_of(tmp_path / "toy", text_encoder=mmproj)


@pytest.mark.parametrize(
    ("name", "raw", "words"),
    [
        ("model.ckpt", b"PK\x03\x04" + bytes(60), "transformer: model.ckpt: a pickle"),
        ("model.pt", b"\x80\x02}q" + bytes(60), "model.pt: a pickle"),
        ("m.gguf", b"version https://git-lfs.github.com/spec/v1\n", "m.gguf: a git-lfs pointer"),
        ("m.safetensors", b"GGUF" + bytes(60), "m.safetensors: a GGUF file, not safetensors"),
        ("missing.gguf", None, "transformer: missing.gguf: No such file"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str, raw: bytes | None, words: str) -> None:
    """By its component and its name."""
    make_model(tmp_path / "toy")
    if raw is not None:
        (tmp_path / name).write_bytes(raw)

    with pytest.raises(BadCheckpoint, match=words):
        source_of(tmp_path / "toy", transformer=tmp_path / name)


def test_a_component_that_the_model_has_not_is_refused(tmp_path: Path) -> None:
    """The known ones are named, and what to do with a vision tower."""
    make_model(tmp_path / "toy")

    with pytest.raises(BadCheckpoint, match=r"'mmproj'.* \(it has scheduler, text_encoder, tokenizer, transformer\)"):
        source_of(tmp_path / "toy", mmproj=tmp_path / "mmproj.gguf")
    shutil.rmtree(tmp_path / "toy" / "transformer")
    with pytest.raises(BadCheckpoint, match=r"transformer: named by model_index.json, but the folder is missing"):
        source_of(tmp_path / "toy", transformer=write_gguf(tmp_path / "toy.gguf"))


def test_files_are_relative_to_models_toml(tmp_path: Path) -> None:
    """One or several to a component."""
    path = tmp_path / "models.toml"
    files = 'transformer = "sub/a.gguf"\ntext_encoder = ["/abs/b.gguf", "mmproj.gguf"]\n'
    path.write_text(f'[models.a]\nfolder = "a"\n[models.a.files]\n{files}')

    (entry,) = read_models(path)

    assert entry.files == {
        "transformer": (tmp_path / "sub/a.gguf",),
        "text_encoder": (Path("/abs/b.gguf"), tmp_path / "mmproj.gguf"),
    }


@pytest.mark.parametrize("files", ["files = 1", "files = { vae = 1 }", "files = { vae = [] }", "files.vae = [1]"])
def test_what_is_no_file_is_refused(tmp_path: Path, files: str) -> None:
    """The message names the table and how to write it."""
    path = tmp_path / "models.toml"
    path.write_text(f'[models.a]\nfolder = "a"\n{files}\n')

    with pytest.raises(ConfigError, match=r"models.a.files(: vae is a file| is no table)"):
        read_models(path)


def test_folders_are_added_by_a_flag(tmp_path: Path) -> None:
    """Beside models.toml or instead of it; a name twice, and what is no model's folder, are refused."""
    make_model(tmp_path / "toy")
    file = tmp_path / "models.toml"
    file.write_text('[models.b]\nfolder = "toy"\n')
    listen = ["--listen", "unix:/run/l.sock"]
    added = ModelEntry("a", tmp_path / "toy")

    both = parse_args([*listen, "--models", str(file), "--add", f"a={tmp_path}/toy"])
    alone = parse_args([*listen, "--add", f"a={tmp_path}/toy"])

    assert isinstance(both, Config)
    assert isinstance(alone, Config)
    assert both.models == (added, ModelEntry("b", tmp_path / "toy"))
    assert (alone.models, alone.models_file) == ((added,), None)
    for bad, words in (
        (f"b={tmp_path}/toy", "model b is named twice"),
        (f"c={tmp_path}", "there is no model_index.json"),
        (f"../c={tmp_path}/toy", "a name is up to 64"),
        ("c", "NAME=PATH was expected"),
    ):
        with pytest.raises(ConfigError, match=words):
            parse_args([*listen, "--models", str(file), "--add", bad])


def test_reload_keeps_what_was_added(bench: Workbench) -> None:
    """And refuses a models.toml that takes its name."""
    bench.add_model("listed", seed=1)
    tensors = make_model(bench.disk / "extra", seed=2)

    async def use() -> None:
        async with LoaderClient(bench.address) as client:
            bench.add_model("later", seed=3)
            bench.write_models()
            assert (await client.reload()).added == ["later"]
            model = await prepared(client, "extra")
            with attach_component(bench, model, "transformer") as arena:
                assert_holds(arena, tensors["transformer"])
            bench.add_model("extra-too", seed=4)
            bench.folders["extra"] = bench.folders.pop("extra-too")
            bench.write_models()
            await refused(client.reload(), BadConfig, "nothing was changed")
            assert "model extra is named twice" in bench.log.read_text()

    with bench.loader("--add", f"extra={bench.disk}/extra"):
        asyncio.run(use())


def test_a_loader_needs_no_models_toml(bench: Workbench) -> None:
    """One folder, one flag; reload finds nothing to do, and a models.toml that is not there is not missed."""
    tensors = make_model(bench.disk / "toy")
    flags = ["--add", f"toy={bench.disk}/toy", "--listen", bench.address, "--arena-dir", str(bench.arena_dir)]

    async def use() -> None:
        async with LoaderClient(bench.address) as client:
            model = await prepared(client, "toy")
            with attach_component(bench, model, "transformer") as arena:
                assert_holds(arena, tensors["transformer"])
            reloaded = await client.reload()
            assert not (*reloaded.added, *reloaded.removed, *reloaded.changed)

    command = [sys.executable, "-m", "services.loader", *flags, "--extent-bytes", "16KiB"]
    with (
        bench.log.open("a") as log,
        subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=log, text=True) as process,
    ):
        bench.wait_until_serving(process)
        try:
            asyncio.run(use())
        finally:
            process.terminate()
