"""Options that commands share, and what they ask of a picture."""

from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import click

from .options import Options
from .outputs import parse_size

address = click.option(
    "--address",
    envvar="HEADWATER_ADDRESS",
    default="127.0.0.1:50051",
    show_default=True,
    show_envvar=True,
    help="unix:/path or host:port; several with commas.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, no bars.")
timeout = click.option("--timeout", type=click.FloatRange(min=0, min_open=True), help="Seconds for everything.")

_PICTURE = (
    click.option("--model", help="Name of the model; default: the only one."),
    click.option("--size", help="WIDTHxHEIGHT in pixels; default: the model's."),
    click.option("--steps", type=int, help="Denoise steps; default: the model's."),
    click.option("--count", type=int, default=1, show_default=True, help="Pictures of a request."),
    click.option("--guidance", type=float, help="guidance_scale; default: the model's."),
    click.option("--cfg", type=float, help="true_cfg_scale, where the model has one."),
    click.option("--solver", help="Update rule by its common name, e.g. dpm++2m; default: the model's."),
    click.option("--schedule", help="Schedule of sigmas by its common name, e.g. karras; default: the model's."),
    click.option(
        "--rng",
        type=click.Choice(["cpu", "gpu_philox"]),
        help="Whose noise a seed stands for: cpu, or gpu_philox, that of CUDA devices and web UIs; default: cpu.",
    ),
    click.option("--negative", help="What to steer away from."),
    click.option(
        "--tiled-decode/--no-tiled-decode",
        default=None,
        help="Decode in tiles: less memory, slightly other pixels at the seams; default: the server's choice by size.",
    ),
)


def picture(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that say what a picture is."""
    return reduce(lambda so_far, option: option(so_far), reversed(_PICTURE), command)


def options(given: Mapping[str, Any]) -> Options:
    """What the options of `picture` ask for. Raises InvalidRequest for a size that is none."""
    width, height = parse_size(given["size"])
    return {
        "model": given["model"],
        "width": width,
        "height": height,
        "steps": given["steps"],
        "count": given["count"],
        "guidance_scale": given["guidance"],
        "true_cfg_scale": given["cfg"],
        "solver": given["solver"],
        "schedule": given["schedule"],
        "rng": given["rng"],
        "negative_prompt": given["negative"],
        "tiled_decode": given["tiled_decode"],
    }
