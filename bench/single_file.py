"""Writes random weights at the real shapes of published models as the files that circulate, in their authors' names.

    python bench/single_file.py sdxl DIR             one file for all, fp16, 6.9 GB
    python bench/single_file.py flux.1-schnell DIR   denoiser and T5 as Q4_K in GGUF, CLIP-L and VAE beside, 9.9 GB
    python bench/single_file.py z-image-turbo DIR    denoiser as Q4_K, Qwen3-4B as Q8_0 with its tokenizer in it, 8.1 GB

and folders of small tokenizers. What `headwater-loader --inspect` and `--add` make of them is the point, so files have
the names under which one downloads them. Shapes are the built-in families'. Pictures are noise.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from bench import checkpoint
from bench.common import pick_device, quiet_libraries, report, table
from tests import all_in_one
from tests.loader.published import module_of, original, write_tokenizers
from tests.loader.test_gguf_tokenizer import tell_words
from tests.sampler.test_packed_models import llama
from tests.sampler.test_text_encoders import llama_t5

Tensors = dict[str, Any]  # on meta


def shapes(tensors: Tensors) -> checkpoint.Tensors:
    return {name: tensor.shape for name, tensor in tensors.items()}


def safetensors(path: Path, tensors: Tensors, dtype: torch.dtype) -> Path:
    sizes = shapes(tensors)
    checkpoint.write_shard(checkpoint.plan_shard(path, sizes, dtype), sizes, dtype, pick_device())
    return path


def packed(path: Path, tensors: Tensors, form: str, architecture: str, tell: Any = lambda writer: None) -> Path:
    checkpoint.write_gguf(path, architecture, shapes(tensors), pick_device(), checkpoint.PACKED_FORMS[form], tell)
    return path


def sdxl(folder: Path) -> Iterator[Path]:
    parts = {part: module_of("sdxl", part) for part in ("unet", "vae", "text_encoder", "text_encoder_2")}
    whole: Any = SimpleNamespace(**parts)
    yield safetensors(folder / "sd_xl_base_1.0.safetensors", all_in_one.whole(whole), torch.float16)


def flux(folder: Path) -> Iterator[Path]:
    denoiser, words, more_words, vae = (
        module_of("flux.1-schnell", part) for part in ("transformer", "text_encoder", "text_encoder_2", "vae")
    )
    yield packed(folder / "flux1-schnell-Q4_K_S.gguf", original(denoiser), "q4_k", "flux")
    t5 = dict(more_words.state_dict())
    yield packed(folder / "t5-v1_1-xxl-encoder-Q4_K_S.gguf", llama_t5(t5), "q4_k", "t5encoder")
    yield safetensors(folder / "clip_l.safetensors", dict(words.state_dict()), torch.float16)
    yield safetensors(folder / "ae.safetensors", original(vae), torch.bfloat16)


def z_image(folder: Path) -> Iterator[Path]:
    denoiser, words, vae = (module_of("z-image-turbo", part) for part in ("transformer", "text_encoder", "vae"))
    yield packed(folder / "z_image_turbo-Q4_K_S.gguf", original(denoiser), "q4_k", "lumina2")
    yield packed(folder / "Qwen3-4B-Q8_0.gguf", llama(dict(words.state_dict())), "q8_0", "qwen3", tell_words)
    yield safetensors(folder / "ae.safetensors", original(vae), torch.bfloat16)


MODELS: dict[str, Callable[[Path], Iterator[Path]]] = {"sdxl": sdxl, "flux.1-schnell": flux, "z-image-turbo": z_image}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    quiet_libraries()
    start = time.perf_counter()
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "tokenizers").mkdir(exist_ok=True)
    write_tokenizers(options.folder / "tokenizers")
    rows = [
        (path.name, path.stat().st_size, time.perf_counter() - start) for path in MODELS[options.model](options.folder)
    ]
    table(f"{options.model} in {options.folder.name}", ("file", "bytes", "there after s"), rows)
    report("single_file", pick_device(), {"model": options.model, "bytes": sum(size for _, size, _ in rows)})


if __name__ == "__main__":
    main()
