"""What previews are made of."""

from __future__ import annotations

import diffusers
import pytest
import torch

from services.sampler.previews import denoised_latents


@pytest.mark.parametrize(
    ("scheduler", "config"),
    [
        ("EulerDiscreteScheduler", {}),
        ("EulerAncestralDiscreteScheduler", {}),
        ("HeunDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("UniPCMultistepScheduler", {}),
        ("LCMScheduler", {}),
    ],
)
def test_previews_show_what_the_model_expects(scheduler: str, config: dict[str, object]) -> None:
    """Where the model tells the noise exactly, the preview after the first step is the clean picture."""
    own = getattr(diffusers, scheduler)(**config)
    own.set_timesteps(4)
    clean, noise = (torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    at = own.timesteps[0]
    noisy = own.add_noise(clean, noise, at.reshape(1))
    own.scale_model_input(noisy, at)
    found = denoised_latents(own, noise, noisy, own.step(noise, at, noisy, return_dict=False))

    assert torch.allclose(found, clean, atol=1e-2)
