"""Glimpses of a picture in the making: the model's own autoencoder on shrunken latents.

Works for every pipeline whose latents are a grid or a packed grid; costs a decode of the preview's size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image


def denoised_latents(scheduler: Any, model_output: torch.Tensor, sample: torch.Tensor, result: Any) -> torch.Tensor:
    """What the model expects the clean latents to be after a step; shape of `sample`.

    Flow matching: x0 = x - sigma v (Lipman et al. 2023, with diffusers' sigma). Multistep solvers that reckon with it
    (DPM-Solver++, UniPC) remember it. Others give it as the second value of their step, where they have one; else the
    step's own result serves.
    """
    at = getattr(scheduler, "step_index", None)
    if type(scheduler).__name__.startswith("FlowMatch") and at:
        sigma: torch.Tensor = scheduler.sigmas[at - 1]
        return sample.float() - sigma * model_output.float()
    if remembers_clean(scheduler):
        clean: torch.Tensor = scheduler.model_outputs[-1]
        return clean
    values: tuple[torch.Tensor, ...] = result if isinstance(result, tuple) else result.to_tuple()
    return next((v for v in values[1:] if isinstance(v, torch.Tensor) and v.shape == sample.shape), values[0])


def remembers_clean(scheduler: Any) -> bool:
    config = getattr(scheduler, "config", {})
    by_clean = config.get("predict_x0", False) or str(config.get("algorithm_type")).endswith("++")
    return by_clean and hasattr(scheduler, "model_outputs")


def preview_image(view: Any, latents: torch.Tensor, size_px: tuple[int, int], max_edge_px: int) -> Image.Image:
    """Decode `latents` at reduced size. size_px: (width, height) of the picture in the making."""
    width, height = size_px
    if latents.ndim == 3:  # (batch, tokens, channels): a packed grid
        latents = unpacked(view, latents, (width, height))
    frames = latents.ndim == 5  # (batch, channels, 1, height, width)
    grid = latents[:, :, 0] if frames else latents
    grid = shrink(grid.float(), max_edge_px / max(width, height))
    vae = view.vae
    upcast = vae.dtype == torch.float16 and bool(getattr(vae.config, "force_upcast", False))
    if upcast:
        vae.to(torch.float32)
    scaled = unscale(vae.config, grid).to(vae.dtype)
    image = vae.decode(scaled.unsqueeze(2) if frames else scaled, return_dict=False)[0]
    if upcast:
        vae.to(torch.float16)
    pixels = (image[:, :, 0] if frames else image)[0].float().clamp(-1, 1)
    array = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array)


def unpacked(view: Any, latents: torch.Tensor, size_px: tuple[int, int]) -> torch.Tensor:
    """The grid of (batch, tokens, channels), in the autoencoder's channels, by the pipeline's own methods."""
    width, height = size_px
    grid: torch.Tensor
    if hasattr(view, "_unpack_latents"):
        grid = view._unpack_latents(latents, height, width, view.vae_scale_factor)
    else:  # FLUX.2: patches of two by two, normalised by the statistics that its autoencoder keeps
        columns, statistics = width // view.vae_scale_factor // 2, view.vae.bn
        patches = latents.transpose(1, 2).float()
        patches = patches.reshape(*patches.shape[:2], -1, columns)
        mean, var = (s.view(1, -1, 1, 1).to(patches) for s in (statistics.running_mean, statistics.running_var))
        grid = view._unpatchify_latents(patches * torch.sqrt(var + view.vae.config.batch_norm_eps) + mean)
    return grid


def shrink(grid: torch.Tensor, factor: float) -> torch.Tensor:
    """(batch, channels, height, width) by `factor` < 1, never below two cells an edge; unchanged from 1 on."""
    if factor >= 1:
        return grid
    size = tuple(max(2, round(edge * factor)) for edge in grid.shape[-2:])
    return F.interpolate(grid, size=size, mode="area")


def unscale(config: Any, grid: torch.Tensor) -> torch.Tensor:
    """From the denoiser's scale to the autoencoder's, as its config says."""
    scaling = getattr(config, "scaling_factor", None) or 1.0
    shift = getattr(config, "shift_factor", None) or 0.0
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is None or std is None:
        return grid / scaling + shift
    per_channel = (1, -1, 1, 1)
    means, stds = (torch.tensor(v, device=grid.device).view(per_channel) for v in (mean, std))
    return grid * stds / scaling + means + shift
