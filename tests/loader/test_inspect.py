"""`--inspect`: what files and folders hold, from the command line and without reading them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.loader.published import write_component, write_files, write_whole
from tests.loader.support import ROOT, environment, make_model, save_sharded, toy_tensors
from tests.loader.weights_files import FLUX, LORA, T5, write_gguf, write_named


def inspect(*arguments: object) -> tuple[int, str]:
    """(exit code, what was said on stdout); nothing goes to stderr."""
    run = subprocess.run(
        [sys.executable, "-m", "services.loader", "--inspect", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment(),
    )
    assert run.stderr == ""
    return run.returncode, run.stdout


def inspect_json(*arguments: object) -> tuple[int, list[dict[str, Any]]]:
    code, text = inspect(*arguments, "--json")
    return code, json.loads(text)


def test_a_file_is_described_in_a_line_and_a_table(tmp_path: Path) -> None:
    """Format, tensors, bytes, what it is, and a row for each type, the largest first."""
    path = write_gguf(tmp_path / "te.gguf", architecture="qwen3")

    assert inspect(path) == (
        0,
        f"{path}: GGUF, 9 tensors, 25.52 KiB, qwen3 (text encoder) of 8 blocks, calls itself qwen3\n"
        "  Q8_0         8   25.50 KiB\n"
        "  F32          1        20 B\n",
    )


def test_json_is_one_document(tmp_path: Path) -> None:
    """A list in the order of the arguments, with the numbers of the table."""
    lora, flux = write_named(tmp_path / "a.safetensors", LORA), write_named(tmp_path / "b.safetensors", FLUX)

    code, (one, other) = inspect_json(lora, flux)

    assert code == 0
    assert one == {
        "path": str(lora),
        "format": "safetensors",
        "files": ["a.safetensors"],
        "architecture": {"name": "", "role": "LoRA"},
        "dimensions": {"depth": None, "channels": None, "width": None, "guided": None},
        "families": [],
        "parts": {},
        "stated": "",
        "tensor_count": 2,
        "size_bytes": 8,
        "types": {"F16": {"count": 2, "size_bytes": 8}},
        "reason": "",
    }
    assert other["architecture"] == {"name": "FLUX.1", "role": "denoiser"}


def test_files_that_cannot_be_read_are_told_and_the_others_shown(tmp_path: Path) -> None:
    """Each by its reason, in one line; the exit code is 1."""
    pickle, pointer, missing = tmp_path / "a.ckpt", tmp_path / "b.gguf", tmp_path / "c.safetensors"
    long = tmp_path / ("x" * 300)
    pickle.write_bytes(b"PK\x03\x04" + bytes(60))
    pointer.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    good = write_named(tmp_path / "d.safetensors", T5)

    code, text = inspect(pickle, pointer, missing, long, good)

    lines = text.splitlines()
    assert code == 1
    assert lines[0] == f"{pickle}: a pickle, which this loader never opens: convert it to safetensors"
    assert lines[1].startswith(f"{pointer}: a git-lfs pointer, not the weights")
    assert lines[2] == f"{missing}: No such file or directory"
    assert lines[3] == f"{long}: File name too long"
    assert lines[4] == f"{good}: safetensors, 2 tensors, 8 B, T5 (text encoder) of 1 block"
    assert inspect_json(pickle)[1][0]["reason"].startswith("a pickle")


def test_a_folder_is_described_by_its_components(tmp_path: Path) -> None:
    """What model_index.json names, with its files and types, and what it names and has not; exit code 0."""
    make_model(tmp_path / "toy", width=32)
    index = tmp_path / "toy" / "model_index.json"
    index.write_text(index.read_text().replace("{", '{"vae": ["diffusers", "V"], "unet": ["diffusers", "U"],', 1))
    (tmp_path / "toy" / "vae").mkdir()
    (tmp_path / "toy" / "vae" / "config.json").write_text("{}")

    code, text = inspect(tmp_path / "toy")

    assert code == 0
    assert text.splitlines() == [
        f"{tmp_path}/toy: ToyPipeline, 36.31 KiB",
        "  text_encoder/model.safetensors: safetensors, 8 tensors, 12.10 KiB, unknown",
        "    F32          5   12.00 KiB",
        "    U8           3        99 B",
        "  transformer/diffusion_pytorch_model.safetensors.index.json: "
        "sharded safetensors in 2 files, 14 tensors, 24.21 KiB, unknown",
        "    F32          8   24.00 KiB",
        "    U8           6       207 B",
        "  missing: unet: named by model_index.json, but the folder is missing",
        "  missing: vae: a model's config.json, but no safetensors file and no GGUF file",
    ]
    ((report,),) = (inspect_json(tmp_path / "toy")[1],)
    assert list(report["components"]) == ["text_encoder", "transformer"]
    assert list(report["missing"]) == ["unet", "vae"]


def test_a_damaged_component_is_told(tmp_path: Path) -> None:
    """The others are described; the exit code is 1."""
    make_model(tmp_path / "toy")
    (tmp_path / "toy" / "text_encoder" / "model.safetensors").write_bytes(b"<html>not found</html>")

    code, text = inspect(tmp_path / "toy")

    assert code == 1
    assert "  text_encoder/model.safetensors: an HTML page, not the weights: download the file again\n" in text
    assert "14 tensors" in text


def test_a_folder_of_files_stands_for_them(tmp_path: Path) -> None:
    """Without a model_index.json; a folder with neither is told."""
    write_gguf(tmp_path / "b.gguf")
    save_sharded(tmp_path, "a", toy_tensors(1))
    (tmp_path / "empty").mkdir()

    code, reports = inspect_json(tmp_path, tmp_path / "empty")

    assert code == 1
    names = [Path(report["path"]).name for report in reports]
    assert names == ["a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors", "b.gguf", "empty"]
    assert reports[-1]["reason"] == "the model's folder has no model_index.json"


def test_no_tensor_bytes_are_read(tmp_path: Path) -> None:
    """A file of a terabyte, with holes on disk for its tensors, is described at once."""
    header = b'{"a": {"dtype": "F16", "shape": [549755813888], "data_offsets": [0, 1099511627776]}}'
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 40))

    assert inspect(path) == (
        0,
        f"{path}: safetensors, 1 tensor, 1024.00 GiB, unknown\n  F16          1 1024.00 GiB\n",
    )


def test_the_readme_shows_what_is_said() -> None:
    """Of the demo model, whose components are all recognised."""
    shown = (ROOT / "README.md").read_text().partition("$ headwater-loader --inspect models/demo\n")[2]

    assert inspect("models/demo") == (0, shown.partition("```")[0])


def test_files_are_described_as_one_model(tmp_path: Path) -> None:
    """Behind each file's own line: what they are together, which other families fit, and what is still to be named."""
    files = write_files(tmp_path, "z-image")

    code, text = inspect(*files.values())

    lines = [line for line in text.splitlines() if not line.startswith("  ")]
    assert code == 0
    assert lines[1] == (
        f"{files['transformer']}: safetensors, 453 tensors, 11.46 GiB, Z-Image (denoiser) of 30 blocks, 16 channels,"
        " width 2560, family z-image-turbo or z-image"
    )
    assert lines[3] == (
        "together these are z-image-turbo (or z-image: family = ... says which);"
        ' missing: tokenizer = "...", the folder of a Qwen2 tokenizer'
    )
    _, text = inspect(files["transformer"])
    assert text.splitlines()[-1].startswith(
        "together these are z-image-turbo (or z-image: family = ... says which); missing:"
        " text_encoder (Qwen3 (text encoder) of 36 blocks, width 2560); vae (AutoencoderKL (VAE) of 16 channels);"
    )


def test_files_that_do_not_belong_together_are_told(tmp_path: Path) -> None:
    """By the first reason; the exit code is 1."""
    files = write_files(tmp_path, "z-image")
    vae = write_component(tmp_path / "sdxl_vae.safetensors", "sdxl", "vae")

    code, text = inspect(files["transformer"], vae)

    assert code == 1
    assert text.splitlines()[-1].startswith("together these are no z-image-turbo: sdxl_vae.safetensors: AutoencoderKL")


def test_a_file_of_everything_is_described_by_its_parts(tmp_path: Path) -> None:
    """Each component with its tensors and bytes; also in JSON, with what is missing."""
    path = write_whole(tmp_path / "sd_xl_base.safetensors", "sdxl")

    code, text = inspect(path)
    _, (report, together) = inspect_json(path)

    assert code == 0
    lines = text.splitlines()
    assert lines[0].endswith("SDXL (all-in-one checkpoint), family sdxl")
    assert lines[3:6] == [
        "  first_stage_model.*: 248 tensors, 159.56 MiB, AutoencoderKL (VAE) of 4 channels",
        "  model.diffusion_model.*: 1680 tensors, 4.78 GiB, SDXL (denoiser) of 4 channels, width 2048",
        "  F16       2642    6.46 GiB",
    ]
    assert report["parts"]["model.diffusion_model."]["size_bytes"] == 2 * 2_567_463_684
    assert together["family"] == "sdxl"
    assert together["components"]["unet"] == 2 * 2_567_463_684
    assert [what.partition(" = ")[0] for what in together["missing"]] == ["tokenizer", "tokenizer_2"]
