"""Generate at real shapes: the service under a VRAM budget against plain diffusers with everything on the device.

    python bench/generate.py --folder /tmp/z-image --max-vram 11

Writes (once) a Z-Image pipeline folder with random bf16 weights at the real model's shapes, about 20 GB, times plain
diffusers, then a loader and a sampler over the same folder. Prints ratios of one run, and whether pixels are equal.
Needs a CUDA device, 30 GB of /dev/shm and of disk.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ZImagePipeline
from diffusers import ZImageTransformer2DModel as Transformer
from headwater_client import Client

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from tests.stack import running
from tests.tiny_models import qwen_tokenizer

PROMPT, SIZE, STEPS = "a red fox in the snow", (1024, 688), 9


def write_folder(folder: Path) -> None:
    """Z-Image's transformer, Qwen3-4B and the FLUX autoencoder at their real shapes, random bf16 weights."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        transformer = Transformer()
        encoder = transformers.Qwen3Model(
            transformers.Qwen3Config(
                vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
                num_attention_heads=32, num_key_value_heads=8, head_dim=128,
            )
        )  # fmt: skip
        vae = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=16, use_quant_conv=False,
            use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159,
        )  # fmt: skip
    torch.set_default_dtype(torch.float32)
    for module in (transformer, encoder, vae):
        module.eval().requires_grad_(False)
        for param in module.parameters():
            if param.ndim > 1:
                param.normal_(0, 0.02)
    ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae, text_encoder=encoder,
        tokenizer=qwen_tokenizer(), transformer=transformer,
    ).save_pretrained(folder)  # fmt: skip
    del transformer, encoder, vae


def plain(folder: Path, seeds: range) -> tuple[list[np.ndarray], float]:
    """Pictures of plain diffusers with everything resident, and seconds for two of them one by one, warm."""
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16).to("cuda")
    pipeline.set_progress_bar_config(disable=True)

    def draw(seed: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(seed)
        result = pipeline(
            PROMPT, width=SIZE[0], height=SIZE[1], num_inference_steps=STEPS, guidance_scale=0.0, generator=generator
        )
        return np.asarray(result.images[0])

    draw(0)
    start = time.perf_counter()
    pictures = [draw(seed) for seed in seeds[:2]]
    seconds = time.perf_counter() - start
    pictures += [draw(seed) for seed in seeds[2:]]
    return pictures, seconds


def served(address: str, seed: int, count: int) -> tuple[list[np.ndarray], float, Any]:
    with Client(address) as client:
        start = time.perf_counter()
        result = client.generate(
            PROMPT, width=SIZE[0], height=SIZE[1], steps=STEPS, guidance_scale=0.0, seed=seed, count=count, timeout=300
        )
        return [np.asarray(i.pil) for i in result.images], time.perf_counter() - start, result.finished


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--max-vram", default="11")
    options = parser.parse_args()
    rows: dict[str, object] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    if not options.folder.exists():
        write_folder(options.folder)
    gc.collect()
    torch.cuda.empty_cache()
    references, resident_s = plain(options.folder, range(1, 5))
    gc.collect()
    torch.cuda.empty_cache()
    rows["plain diffusers, all resident, 2 pictures one by one: s"] = resident_s
    with tempfile.TemporaryDirectory() as disk, running(Path(disk), {"z": options.folder}) as stack:
        start = time.perf_counter()
        loader = stack.loader("--eager-load", extent_bytes="64MiB")
        sampler = stack.sampler("--device", "cuda", "--max-vram", options.max_vram, gate_limit=512 << 20)
        rows["first picture after start of loader and sampler: s"] = 0.0
        served(sampler.addresses[0], 1, 1)
        rows["first picture after start of loader and sampler: s"] = time.perf_counter() - start
        served(sampler.addresses[0], 1, 2)
        two, two_s, finished = served(sampler.addresses[0], 1, 2)
        start = time.perf_counter()
        with ThreadPoolExecutor(4) as pool:
            four = list(pool.map(lambda seed: served(sampler.addresses[0], seed, 1), range(1, 5)))
        four_s = time.perf_counter() - start
        with Client(sampler.addresses[0]) as client:
            status = client.status()
        rows |= {
            "service, 2 pictures, warm: s": two_s,
            "  bytes streamed for them, GB": finished.streamed_bytes / 1e9,
            "  ratio to plain resident": two_s / resident_s,
            "service, 4 requests at once, warm: s": four_s,
            "  ratio to 2 pictures": four_s / two_s,
            "bit-equal to plain diffusers": [
                bool(np.array_equal(a, b))
                for a, b in zip([*two, *(f[0][0] for f in four)], [*references[:2], *references], strict=True)
            ],
            "transfer": status.transfer,
            "VRAM in use, GiB": status.vram_used_bytes / 2**30,
        }
        print(sampler.log.read_text()[-2000:], loader.log.read_text()[-1500:], file=sys.stderr)
    rows["commit"] = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
