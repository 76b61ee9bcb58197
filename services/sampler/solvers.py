"""Solvers and schedules by their common names, as changes to a model's own diffusers scheduler.

The names are those of k-diffusion and the programs around it. What they mean in diffusers is its own table (the
overview of its schedulers, "A1111/k-diffusion"); `normal`, which the table leaves out, is k-diffusion's `get_sigmas`:
timesteps at even distances from the last to 0, "linspace".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# Of these a scheduler follows at most one; none: its timesteps are evenly spaced.
EVEN: dict[str, object] = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
}
# simple, sgm_uniform: Lin et al. 2023, arXiv 2305.08891, table 2. karras: Karras et al. 2022, arXiv 2206.00364, eq. 5.
# beta: Lee et al. 2024, arXiv 2407.12173. What a scheduler does not know it leaves alone, so flow matching, where the
# pipeline spaces the sigmas as "trailing" does (Esser et al. 2024, arXiv 2403.03206, shifts them), has the same table.
SCHEDULES: dict[str, dict[str, object]] = {
    "simple": EVEN | {"timestep_spacing": "trailing"},
    "normal": EVEN | {"timestep_spacing": "linspace"},
    "karras": EVEN | {"use_karras_sigmas": True},
    "exponential": EVEN | {"timestep_spacing": "linspace", "use_exponential_sigmas": True},
    "beta": EVEN | {"timestep_spacing": "linspace", "use_beta_sigmas": True},
    "sgm_uniform": EVEN | {"timestep_spacing": "trailing"},
}
SPACINGS = ("simple", "normal", "sgm_uniform")
TRAILING = ("simple", "sgm_uniform")


@dataclass(frozen=True, slots=True)
class Solver:
    """An update rule: a scheduler of diffusers, the schedules that it follows, and what its config must say."""

    scheduler: str
    schedules: tuple[str, ...] = tuple(SCHEDULES)
    changes: Mapping[str, object] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)  # its key: the key in the config of flow matching
    step_limit: str = ""  # key of the most steps that it takes; "": no limit


# Karras et al. 2022, algorithms 1 and 2 (euler, heun); k-diffusion's sample_euler_ancestral (euler_a); Lu et al. 2022,
# arXiv 2211.01095 (dpm++2m and its SDE); Zhao et al. 2023, arXiv 2302.04867 (unipc); Luo et al. 2023, arXiv 2310.04378
# (lcm, which has a schedule of its own).
DIFFUSION = {
    "euler": Solver("EulerDiscreteScheduler"),
    "euler_a": Solver("EulerAncestralDiscreteScheduler", SPACINGS),
    "heun": Solver("HeunDiscreteScheduler"),
    "dpm++2m": Solver("DPMSolverMultistepScheduler", changes={"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpm++2m_sde": Solver(
        "DPMSolverMultistepScheduler", changes={"algorithm_type": "sde-dpmsolver++", "solver_order": 2}
    ),
    "unipc": Solver("UniPCMultistepScheduler"),
    "lcm": Solver("LCMScheduler", (), step_limit="original_inference_steps"),
}
# The multistep schedulers bend only the sigmas of diffusion, not those of flow matching: karras and the like are wrong.
MULTISTEP_FLOW = SCHEDULES["simple"] | {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SHIFT = {"flow_shift": "shift"}
FLOW = {
    # Noise would come from no seed: pipelines of flow matching give `step` no generator. So there is no lcm either,
    # no euler_a and no SDE; and no heun, for FlowMatchHeunDiscreteScheduler takes neither `sigmas` nor `mu`.
    "euler": Solver(
        "FlowMatchEulerDiscreteScheduler",
        ("simple", "karras", "exponential", "beta", "sgm_uniform"),
        {"stochastic_sampling": False},
    ),
    "dpm++2m": Solver(
        "DPMSolverMultistepScheduler",
        TRAILING,
        MULTISTEP_FLOW | {"algorithm_type": "dpmsolver++", "solver_order": 2},
        SHIFT,
    ),
    "unipc": Solver("UniPCMultistepScheduler", TRAILING, MULTISTEP_FLOW, SHIFT),
}
# What `set_timesteps` gets: Z-Image a list of sigmas, with which UniPC cannot reckon, and `mu`; Qwen-Image an array of
# sigmas, which DPMSolver does not take, and `mu`; FLUX, of a scheduler with flow sigmas, only `mu`.
FLOW_PIPELINES = {
    "ZImagePipeline": ("euler",),
    "QwenImagePipeline": ("euler", "unipc"),
    "FluxPipeline": ("euler", "dpm++2m", "unipc"),
}
# Others are known to work with their own scheduler; what makes noisy latents of an image (`scale_noise`) only it has.
FLOW_OTHERS = ("euler",)
