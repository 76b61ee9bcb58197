"""Train the demo model from nothing, in a fixed time: autoencoder, then denoiser and text encoder, then decoder.

    python -m models.demo.train --out DIR [--minutes 9] [--resume FOLDER] [--stages vae flow polish]

`--resume` starts from a trained folder. Of it, a stage that is not run leaves its part as it is, `flow` begins anew
unless `--keep-flow` is given.

Every picture is drawn by draw.py; held-out scenes (draw.held_out) are never drawn. The budget is wall-clock time, so
the learning rates follow the time that is left and the result is written whatever the hardware's speed.
"""

import argparse
import json
import math
import multiprocessing
import random
import string
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, ZImagePipeline

from models.demo import check
from models.demo.descent import Descent
from models.demo.draw import SCENE_FIELDS, caption, pack, render, sample_scene
from models.demo.tiny_zimage import (
    TEXT_MULTIPLE,
    encode_text,
    make_pipeline,
    make_tokenizer,
    modulation_size,
    tokenize,
    velocity,
)

CHUNK = 4096  # scenes a worker makes at a time
LONGEST = 2 * TEXT_MULTIPLE  # tokens; a caption with strange words in it can need the second multiple

STAGES = ("vae", "flow", "polish")
# Shares of the wall-clock budget; what is left after the last is for the figures.
VAE_UNTIL, FLOW_UNTIL, POLISH_UNTIL = 0.30, 0.83, 0.94

VAE_RATE, FLOW_RATE, POLISH_RATE = 1e-3, 6e-4, 3e-4

KL_WEIGHT = 1e-4  # against pixels in [-1, 1]; at 1e-3 small stars came out as circles
LATENT_NOISE = 0.15  # of the latents' deviation, at most: the decoder learns to forgive the denoiser
MODULATION_WEIGHT = 1e-3  # holds the time's influence at the order of 1; left alone it ran off to a million
FULL_WEIGHT_SIGMA = 0.3  # the schedule's last step starts here; below, the loss is mostly the noise that nobody needs
POLISH_SIGMAS = (0.1, 0.5)  # around the last step of an 8- or 9-step schedule


@dataclass(frozen=True)
class Scenes:
    """A pool of scenes and their captions. rows: (n, SCENE_FIELDS); ids: (n, length); counts: (n,) tokens said."""

    rows: torch.Tensor
    ids: torch.Tensor
    counts: torch.Tensor


class Budget:
    """The wall-clock time of the run: how much of a stage is gone, as a fraction."""

    def __init__(self, minutes: float) -> None:
        self.start = time.perf_counter()
        self.seconds = 60 * minutes

    def elapsed(self) -> float:
        """Return the seconds since the start."""
        return time.perf_counter() - self.start

    def steps(self, until: float) -> Iterator[tuple[int, float]]:
        """Yield (step, fraction of this stage gone) until that share of the whole budget is spent."""
        begin, end = self.elapsed(), until * self.seconds
        step = 0
        while (now := self.elapsed()) < end or step == 0:
            yield step, min(1.0, (now - begin) / max(end - begin, 1e-9))
            step += 1


def make_chunk(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make CHUNK training scenes: packed rows, padded token ids, token counts."""
    rng = random.Random(seed)
    tokenizer = make_tokenizer()
    scenes = [sample_scene(rng) for _ in range(CHUNK)]
    tokens = tokenize(tokenizer, [vary(caption(scene, rng), rng) for scene in scenes])
    ids = np.full((CHUNK, LONGEST), tokenizer.pad_token_id, dtype=np.int64)
    for row, said in zip(ids, tokens, strict=True):
        row[: len(said)] = said[:LONGEST]
    counts = np.array([min(len(said), LONGEST) for said in tokens])
    return np.array([pack(scene) for scene in scenes], dtype=np.float32), ids, counts


def vary(text: str, rng: random.Random) -> str:
    """Now and then add words that mean nothing, a full stop, or leave all words out (for guidance)."""
    if rng.random() < 0.03:
        return ""
    if rng.random() < 0.08:
        words = text.split()
        for _ in range(rng.randint(1, 3)):
            strange = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 8)))
            words.insert(rng.randint(0, len(words)), strange)
        text = " ".join(words)
    return text + "." if rng.random() < 0.05 else text


def make_scenes(count: int, seed: int, workers: int) -> Scenes:
    """Make the pool in worker processes. Call it before CUDA is touched: the workers are forked."""
    seeds = range(seed * 1_000_000, seed * 1_000_000 + math.ceil(count / CHUNK))
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, mp_context=context) as executor:
        chunks = list(executor.map(make_chunk, seeds))
    return Scenes(*(torch.from_numpy(np.concatenate(column)[:count]) for column in zip(*chunks, strict=True)))


def learning_rate(peak: float, step: int, gone: float) -> float:
    """Warm up over 300 steps or a twentieth of the stage, stay, and fall to zero over its second half."""
    return peak * min(1.0, max((step + 1) / 300, 20 * gone)) * min(1.0, 2 * (1 - gone))


def picture_loss(drawn: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the mean error of pixels and, for crisp edges, of the differences between neighbours."""
    error = drawn.float() - wanted
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + edges


def vae_loss(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Return the loss of one autoencoder step. pictures: (batch, 3, side, side) in [-1, 1]."""
    mean, log_variance = vae.encoder(pictures).float().chunk(2, dim=1)
    log_variance = log_variance.clamp(-20, 10)
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    level = LATENT_NOISE * torch.rand(len(mean), 1, 1, 1, device=mean.device) * mean.detach().std()
    noise = torch.randn_like(mean) * (0.5 * log_variance).exp() + torch.randn_like(mean) * level
    return picture_loss(vae.decoder(mean + noise), pictures) + KL_WEIGHT * kl


def train_vae(vae: AutoencoderKL, scenes: Scenes, budget: Budget, batch: int) -> None:
    """Train the autoencoder, then measure its latents into the config's shift and scale."""
    device = scenes.rows.device
    loss_of = torch.compile(vae_loss, dynamic=False, disable=device.type == "cpu")
    vae.train().to(memory_format=torch.channels_last)
    everything = torch.arange(len(scenes.rows), device=device)

    def loss() -> torch.Tensor:
        with mixed_precision(device):
            return loss_of(vae, draw_batch(scenes.rows, pick(everything, batch)))

    descent = Descent(vae, betas=(0.9, 0.99))
    take_step = descent.steps(loss)
    for step, gone in budget.steps(VAE_UNTIL):
        report("vae", step, take_step(learning_rate(VAE_RATE, step, gone)), budget)
    descent.settle()
    vae.eval().to(memory_format=torch.contiguous_format).requires_grad_(False)
    latents = encode_pictures(vae, scenes.rows[:8192]).float()
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


def mixed_precision(device: torch.device) -> torch.autocast:
    """Compute in bfloat16 where that is faster, on a GPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def pick(pool: torch.Tensor, batch: int) -> torch.Tensor:
    """Return random members of a pool of indices, without waiting for the device."""
    return pool[torch.randint(len(pool), (batch,), device=pool.device)]


def draw_batch(rows: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Draw chosen scenes as the autoencoder wants them: (batch, 3, side, side) in [-1, 1], channels last."""
    pictures = render(rows[chosen]) * 2 - 1
    return pictures.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, rows: torch.Tensor) -> torch.Tensor:
    """Draw scenes and return their latents, as the autoencoder gives them: (n, channels, h, w) bfloat16."""
    with mixed_precision(rows.device):
        return torch.cat([vae.encoder(render(part) * 2 - 1).chunk(2, dim=1)[0].bfloat16() for part in rows.split(512)])


def normalise(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Bring latents to zero mean and unit deviation, the inverse of what the pipeline does before decoding."""
    return (latents.float() - vae.config.shift_factor) * vae.config.scaling_factor


def sample_sigmas(batch: int, device: torch.device) -> torch.Tensor:
    """Return noise levels: half of them logit-normal, half uniform, all shifted by 3 as the schedule is."""
    sigmas = torch.randn(batch, device=device).sigmoid()
    # Spread evenly over the batch: fewer accidents. The logit-normal alone would hardly see sigma = 1.
    sigmas[::2] = (torch.arange(len(sigmas[::2]), device=device) + torch.rand(1, device=device)) / len(sigmas[::2])
    return 3 * sigmas / (1 + 2 * sigmas)


def train_flow(
    pipe: ZImagePipeline, scenes: Scenes, latents: torch.Tensor, budget: Budget, batch: int, rate: float
) -> None:
    """Train transformer and text encoder by flow matching."""
    models = torch.nn.ModuleList([pipe.transformer, pipe.text_encoder]).train()
    # Not compiled: torch 2.11 on CUDA then gets gradients wrong, of opposite sign for some (complex rotary factors).
    descent = Descent(models, betas=(0.9, 0.99), decay=0.05)

    def steps(length: int, chosen_from: torch.Tensor) -> Callable[[float], torch.Tensor]:
        def loss() -> torch.Tensor:
            chosen = pick(chosen_from, batch)
            data = normalise(pipe.vae, latents[chosen])
            with mixed_precision(latents.device):
                return flow_loss(pipe, data, *batch_text(scenes, chosen, length))

        return descent.steps(loss)

    short, long = split_by_length(scenes)
    take_short, take_long = steps(TEXT_MULTIPLE, short), steps(LONGEST, long)
    for step, gone in budget.steps(FLOW_UNTIL):
        take_step = take_long if step % 16 == 15 else take_short
        report("flow", step, take_step(learning_rate(rate, step, gone)), budget)
    descent.settle()
    models.eval().requires_grad_(False)


def split_by_length(scenes: Scenes) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the indices of the captions of one multiple of 32 tokens, and of those of two."""
    fits = scenes.counts <= TEXT_MULTIPLE
    return fits.nonzero()[:, 0], (~fits).nonzero()[:, 0]


def batch_text(scenes: Scenes, chosen: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids (batch, length) and which of them are said, not padding."""
    said = torch.arange(length, device=chosen.device) < scenes.counts[chosen, None]
    return scenes.ids[chosen, :length], said


def flow_loss(pipe: ZImagePipeline, data: torch.Tensor, ids: torch.Tensor, said: torch.Tensor) -> torch.Tensor:
    """Return the flow-matching loss: at (1 - sigma) data + sigma noise the transformer answers data - noise.

    The pipeline negates that answer and hands it to the Euler schedule, whose derivative by sigma is noise - data.
    Errors at small sigmas count less: what they do to the picture falls with sigma.
    """
    noise, sigmas = torch.randn_like(data), sample_sigmas(len(data), data.device)
    noisy = torch.lerp(data, noise, sigmas[:, None, None, None])
    answer = velocity(pipe.transformer, noisy, 1 - sigmas, encode_text(pipe.text_encoder, ids), said)
    errors = (answer.float() - (data - noise)).square().mean(dim=(1, 2, 3))
    weights = (sigmas / FULL_WEIGHT_SIGMA).square().clamp(max=1)
    return (weights * errors).mean() + MODULATION_WEIGHT * modulation_size(pipe.transformer, 1 - sigmas)


def polish_decoder(pipe: ZImagePipeline, scenes: Scenes, latents: torch.Tensor, budget: Budget, batch: int) -> None:
    """Train the decoder on what the denoiser's last step really gives, so that it draws that crisply."""
    vae = pipe.vae
    vae.decoder.train().requires_grad_(True)
    short, _ = split_by_length(scenes)

    def loss() -> torch.Tensor:
        chosen = pick(short, batch)
        with mixed_precision(latents.device):
            guess = guess_latents(pipe, normalise(vae, latents[chosen]), *batch_text(scenes, chosen, TEXT_MULTIPLE))
            drawn = vae.decoder(guess / vae.config.scaling_factor + vae.config.shift_factor)
            return picture_loss(drawn, draw_batch(scenes.rows, chosen))

    descent = Descent(vae.decoder, betas=(0.9, 0.99), average=0.99)
    take_step = descent.steps(loss)
    for step, gone in budget.steps(POLISH_UNTIL):
        report("polish", step, take_step(learning_rate(POLISH_RATE, step, gone)), budget)
    descent.settle()
    vae.eval().requires_grad_(False)


@torch.no_grad()
def guess_latents(pipe: ZImagePipeline, data: torch.Tensor, ids: torch.Tensor, said: torch.Tensor) -> torch.Tensor:
    """Return what the schedule's last step would make of the data with a little noise in it."""
    low, high = POLISH_SIGMAS
    sigmas = low + (high - low) * torch.rand(len(data), device=data.device)
    noisy = torch.lerp(data, torch.randn_like(data), sigmas[:, None, None, None])
    answer = velocity(pipe.transformer, noisy, 1 - sigmas, encode_text(pipe.text_encoder, ids), said)
    return noisy + sigmas[:, None, None, None] * answer.float()


def report(stage: str, step: int, loss: torch.Tensor, budget: Budget) -> None:
    """Read the loss, which waits for the device and so keeps the budget's clock true, and print it now and then."""
    if step % 20 == 0:
        value = loss.item()
        if step % 500 == 0 or step in (20, 100):
            print(f"{stage} step {step} loss {value:.4f} at {budget.elapsed():.0f} s", flush=True)


def train(pipe: ZImagePipeline, args: argparse.Namespace, budget: Budget) -> None:
    """Run the three stages, in place."""
    scenes = make_scenes(args.pool, args.seed, args.workers)
    print(f"{len(scenes.rows)} scenes of {SCENE_FIELDS} numbers at {budget.elapsed():.0f} s", flush=True)
    scenes = Scenes(*(getattr(scenes, field.name).to(args.device) for field in fields(scenes)))
    pipe.to(args.device)
    if "vae" in args.stages:
        train_vae(pipe.vae, scenes, budget, args.vae_batch)
    pipe.vae.eval().requires_grad_(False)
    latents = encode_pictures(pipe.vae, scenes.rows)
    print(f"latents {tuple(latents.shape)} at {budget.elapsed():.0f} s", flush=True)
    if "flow" in args.stages:
        train_flow(pipe, scenes, latents, budget, args.batch, args.rate)
    pipe.transformer.eval().requires_grad_(False)
    pipe.text_encoder.eval().requires_grad_(False)
    if "polish" in args.stages:
        polish_decoder(pipe, scenes, latents, budget, args.vae_batch)


def start(args: argparse.Namespace) -> ZImagePipeline:
    """Make the pipeline, of trained parts where those are to be kept or gone on with."""
    pipe = make_pipeline()
    if not args.resume:
        return pipe
    trained = ZImagePipeline.from_pretrained(args.resume, dtype=torch.float32)
    if "flow" in args.stages and not args.keep_flow:
        trained.register_modules(transformer=pipe.transformer, text_encoder=pipe.text_encoder)
    return trained


def main() -> None:
    """Train the demo model and write it, its figures and a sheet of its pictures."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write: model/, figures.json, seen.png, heldout.png"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="wall-clock budget")
    parser.add_argument("--resume", type=Path, help="folder of a trained model to start from")
    parser.add_argument("--keep-flow", action="store_true", help="go on with its denoiser and text encoder too")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=384)
    parser.add_argument("--rate", type=float, default=FLOW_RATE, help="the denoiser's highest learning rate")
    parser.add_argument("--vae-batch", type=int, default=96)
    parser.add_argument("--pool", type=int, default=300_000, help="scenes to draw from")
    parser.add_argument("--pictures", type=int, default=200, help="of each kind, for the figures")
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    budget = Budget(args.minutes)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    pipe = start(args)
    train(pipe, args, budget)
    pipe.to("cpu", torch.bfloat16).save_pretrained(args.out / "model")
    print(f"saved at {budget.elapsed():.0f} s", flush=True)

    figures = {}
    for kind in ("seen", "heldout"):
        prompts = check.read_prompts(kind)[: args.pictures]
        results = check.measure(args.out / "model", prompts, device=args.device, batch=50)
        figures[kind] = check.summarise(results)
        check.save_sheet(results[:64], args.out / f"{kind}.png")
        print(kind, figures[kind], f"at {budget.elapsed():.0f} s", flush=True)
    (args.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
