"""Solvers and schedules by name, against diffusers' schedulers put into the pipeline as its documentation says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from headwater_client import Client, InvalidRequest, Preview
from numpy.typing import NDArray

from services.sampler.solvers import DIFFUSION, FLOW, SCHEDULES
from tests.sampler.support import pixels, plain_picture, plain_pipeline, served
from tests.stack import Stack, running

ASKED = ("a red fox", (64, 64), 4, 11)
# What each name is to be, from diffusers' "A1111/k-diffusion" tables and the docstrings of its schedulers.
SDXL: dict[str, tuple[str, dict[str, object]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm++2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}
SHAPES: dict[str, dict[str, object]] = {
    "simple": {"timestep_spacing": "trailing"},
    "normal": {"timestep_spacing": "linspace"},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"timestep_spacing": "linspace", "use_exponential_sigmas": True},
    "beta": {"timestep_spacing": "linspace", "use_beta_sigmas": True},
    "sgm_uniform": {"timestep_spacing": "trailing"},
}
EULER, DPM = "FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler"
FLOW_SIGMAS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
Case = tuple[str, dict[str, str], str, dict[str, object]]
CASES: list[Case] = [
    *(("sdxl", {"solver": name}, *found) for name, found in SDXL.items()),
    *(("sdxl", {"schedule": name}, *SDXL["euler"][:1], change) for name, change in SHAPES.items()),
    *(("sdxl", {"solver": "dpm++2m", "schedule": n}, DPM, change) for n, change in SHAPES.items()),
    ("sdxl_leading", {"solver": "euler_a", "schedule": "normal"}, SDXL["euler_a"][0], SHAPES["normal"]),
    ("sdxl_leading", {"solver": "heun", "schedule": "karras"}, SDXL["heun"][0], SHAPES["karras"]),
    ("sdxl_pndm", {"solver": "dpm++2m_sde", "schedule": "karras"}, DPM, SDXL["dpm++2m_sde"][1] | SHAPES["karras"]),
    ("z_image", {"solver": "euler"}, EULER, {}),
    ("z_image", {"schedule": "simple"}, EULER, {}),
    ("z_image", {"schedule": "sgm_uniform"}, EULER, {}),
    *(("z_image", {"schedule": n}, EULER, {f"use_{n}_sigmas": True}) for n in ("karras", "exponential", "beta")),
    ("qwen_image", {"solver": "unipc"}, "UniPCMultistepScheduler", FLOW_SIGMAS),
    ("flux", {"solver": "unipc", "schedule": "simple"}, "UniPCMultistepScheduler", FLOW_SIGMAS),
    ("flux_shifting", {"solver": "unipc"}, "UniPCMultistepScheduler", FLOW_SIGMAS),
    ("flux_shifting", {"solver": "dpm++2m"}, DPM, FLOW_SIGMAS),
]  # fmt: skip
PARAMS = [pytest.param(*c, id=f"{c[0]}-{'-'.join(c[1].values())}") for c in CASES]


def with_scheduler(folder: Path, target: Path, **changes: object) -> Path:
    """A copy of a pipeline folder whose scheduler's config says otherwise; `_class_name` also renames it."""
    shutil.copytree(folder, target)
    file = target / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    if "_class_name" in changes:
        index = json.loads((target / "model_index.json").read_text())
        index["scheduler"][1] = changes["_class_name"]
        (target / "model_index.json").write_text(json.dumps(index))
    return target


@pytest.fixture(scope="module")
def folders(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models, and some with the schedulers of well-known ones: SD 1.5's, SDXL's, FLUX.1-dev's."""
    root = tmp_path_factory.mktemp("solvers")
    found = {name: tiny_folders[name] for name in ("sdxl", "z_image", "qwen_image", "flux")}
    beta = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    changed: dict[str, tuple[str, dict[str, object]]] = {
        "sdxl_leading": ("sdxl", beta | {"timestep_spacing": "leading"}),
        "sdxl_pndm": ("sdxl", beta | {"_class_name": "PNDMScheduler", "skip_prk_steps": True}),
        "sdxl_sigmoid": ("sdxl", {"_class_name": "DDPMScheduler", "beta_schedule": "sigmoid"}),
        "flux_shifting": ("flux", {"use_dynamic_shifting": True, "base_shift": 0.6, "max_shift": 1.2, "shift": 3.0}),
    }
    for name, (base, changes) in changed.items():
        found[name] = with_scheduler(tiny_folders[base], root / name, **changes)
    return found


@pytest.fixture(scope="module")
def solving(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a sampler with these models."""
    with running(tmp_path_factory.mktemp("solving"), folders) as stack:
        yield started(stack)


def started(stack: Stack) -> str:
    stack.loader("--eager-load")
    return stack.sampler().addresses[0]


def reference(folder: Path, scheduler: str, changes: dict[str, object], asked: Any = ASKED) -> NDArray[np.uint8]:
    """What plain diffusers draws with another scheduler, made of the folder's own."""
    pipeline = plain_pipeline(folder, "cpu")
    own = pipeline.scheduler
    shift = {"flow_shift": own.config["shift"]} if "use_flow_sigmas" in changes else {}
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(own.config, **changes, **shift)
    try:
        return pixels(plain_picture(folder, *asked))
    finally:
        pipeline.scheduler = own


def sha256s(address: str, model: str, seed: int = 11, **options: Any) -> list[str]:
    return [image.sha256 for image in served(address, model, *ASKED[:3], seed, **options).images]


@pytest.mark.parametrize(("model", "options", "scheduler", "changes"), PARAMS)
def test_equals_diffusers_with_that_scheduler(
    model: str, options: dict[str, str], scheduler: str, changes: dict[str, object], folders: dict[str, Path],
    solving: str,
) -> None:  # fmt: skip
    """The picture is what the pipeline draws once its scheduler is replaced, and Finished says by which names."""
    result = served(solving, model, *ASKED, **options)

    assert np.array_equal(pixels(result.images[0].pil), reference(folders[model], scheduler, changes))
    assert options.items() <= result.finished.parameters.items()


def test_a_scheduler_that_no_solver_can_follow_is_served_as_it_is(folders: dict[str, Path], solving: str) -> None:
    """A config that diffusers' other schedulers refuse leaves the model its own, and no names."""
    result = served(solving, "sdxl_sigmoid", *ASKED)
    with Client(solving) as client:
        details = client.model("sdxl_sigmoid")

    assert np.array_equal(pixels(result.images[0].pil), reference(folders["sdxl_sigmoid"], "DDPMScheduler", {}))
    assert (details.solvers, details.schedules, details.default_solver) == ((), (), "")
    assert not {"solver", "schedule"} & set(details.request_fields)


def test_names_make_a_difference(solving: str) -> None:
    """Each solver and each schedule draws another picture, but for the two names of trailing timesteps."""
    solvers = [sha256s(solving, "sdxl", solver=name)[0] for name in SDXL]
    schedules = [name for name in SHAPES if name not in ("beta", "sgm_uniform")]
    shapes = [sha256s(solving, "sdxl", schedule=name)[0] for name in schedules]

    assert len(set(solvers)) == len(solvers)
    assert len(set(shapes)) == len(shapes)


def test_the_next_request_is_as_before(solving: str) -> None:
    """A choice is one request's: the model's own scheduler is left as it was."""
    before = sha256s(solving, "sdxl")
    sha256s(solving, "sdxl", solver="dpm++2m", schedule="karras")

    assert sha256s(solving, "sdxl") == before


@pytest.mark.parametrize(("one", "other"), [("euler_a", "dpm++2m_sde"), ("lcm", "heun"), ("unipc", "dpm++2m")])
def test_riders_with_different_solvers_equal_each_alone(one: str, other: str, solving: str) -> None:
    """Two requests of two pictures at once: noise comes from each picture's own seed."""
    alone = [[sha256s(solving, "sdxl", 11 + k, solver=name)[0] for k in (0, 1)] for name in (one, other)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda name: sha256s(solving, "sdxl", count=2, solver=name), (one, other)))

    assert together == alone


@pytest.mark.parametrize(
    ("model", "options", "field", "said"),
    [
        ("sdxl", {"solver": "ddim"}, "solver", "euler, euler_a, heun, dpm++2m, dpm++2m_sde, unipc, lcm"),
        ("sdxl", {"solver": "x" * 5000}, "solver", "use one of"),
        ("sdxl", {"schedule": "cosine"}, "schedule", "simple, normal, karras, exponential"),
        ("sdxl", {"solver": "euler_a", "schedule": "karras"}, "schedule", "simple, normal, sgm_uniform"),
        ("sdxl", {"solver": "lcm", "schedule": "simple"}, "schedule", "leave it out"),
        ("sdxl", {"solver": "lcm", "steps": 51}, "step_count", "at most 50 steps"),
        ("sdxl_pndm", {"schedule": "karras"}, "schedule", "name a solver too"),
        ("sdxl_sigmoid", {"solver": "euler"}, "solver", "leave it out"),
        ("sdxl_sigmoid", {"schedule": "karras"}, "schedule", "leave it out"),
        ("z_image", {"solver": "unipc"}, "solver", "use one of euler, or"),
        ("z_image", {"schedule": "normal"}, "schedule", "simple, karras, exponential"),
        ("qwen_image", {"solver": "dpm++2m"}, "solver", "use one of euler, unipc"),
        ("qwen_image", {"solver": "lcm"}, "solver", "use one of euler, unipc"),
        ("flux", {"solver": "dpm++2m"}, "solver", "use one of euler, unipc"),
        ("flux", {"solver": "unipc", "schedule": "karras"}, "schedule", "use one of simple, sgm_uniform"),
        ("flux_shifting", {"solver": "dpm++2m_sde"}, "solver", "use one of euler, dpm++2m, unipc"),
    ],
)
def test_what_a_model_cannot_use_is_refused(
    model: str, options: dict[str, Any], field: str, said: str, solving: str
) -> None:
    """Under the field's name, with the value and what can be used instead."""
    with Client(solving) as client, pytest.raises(InvalidRequest) as refused:
        client.generate("a fox", model=model, **options)

    assert [name for name, _ in refused.value.violations] == [field]
    assert said in refused.value.violations[0][1]
    assert len(str(refused.value)) < 200


def test_models_say_what_they_can_use(solving: str) -> None:
    """GetModel lists the names, and the model's own where it has some."""
    with Client(solving) as client:
        sdxl, pndm, flux = (client.model(name) for name in ("sdxl", "sdxl_pndm", "flux"))

    assert list(sdxl.solvers) == list(SDXL)
    assert list(sdxl.schedules) == ["simple", "normal", "karras", "exponential", "beta", "sgm_uniform"]
    assert (sdxl.default_solver, sdxl.default_schedule) == ("euler", "normal")
    assert (pndm.default_solver, pndm.default_schedule) == ("", "")
    assert (flux.solvers, flux.default_solver, flux.default_schedule) == (("euler", "unipc"), "euler", "simple")
    assert {"solver", "schedule"} <= set(flux.request_fields)


@pytest.mark.parametrize(
    ("model", "options", "names"),
    [
        ("sdxl", {}, ("euler", "normal")),
        ("sdxl_leading", {"solver": "unipc"}, ("unipc", None)),
        ("sdxl_pndm", {}, (None, None)),
        ("sdxl_pndm", {"solver": "dpm++2m"}, ("dpm++2m", "normal")),
        ("flux_shifting", {}, ("euler", "simple")),
        ("flux_shifting", {"solver": "dpm++2m"}, ("dpm++2m", "simple")),
    ],
)
def test_parameters_name_what_was_used(
    model: str, options: dict[str, str], names: tuple[str | None, str | None], solving: str
) -> None:
    """Defaults have their common names, if they have any, and draw the picture again."""
    first = served(solving, model, *ASKED, **options)
    parameters = first.finished.parameters
    with Client(solving) as client:
        again = client.generate(**parameters)

    assert (parameters.get("solver"), parameters.get("schedule")) == names
    assert again.images[0].sha256 == first.images[0].sha256


@pytest.mark.parametrize(
    ("model", "solver", "step_count"),
    [("sdxl", name, 7 if name == "heun" else 4) for name in SDXL] + [("flux_shifting", name, 4) for name in FLOW],
)
def test_previews_and_progress_know_every_solver(model: str, solver: str, step_count: int, solving: str) -> None:
    """A preview after each step but the last, and the picture is as without; heun asks the model twice a step."""
    with Client(solving) as client:
        ask = {"model": model, "width": 64, "height": 64, "steps": 4, "seed": 11, "solver": solver}
        plain = client.generate("a red fox", **ask)
        previews: list[Preview] = []

        def take(event: object) -> None:
            if isinstance(event, Preview):
                previews.append(event)

        watched = client.generate("a red fox", preview_every=1, on_event=take, **ask)

    assert [preview.step for preview in previews] == list(range(1, step_count))
    assert watched.images[0].sha256 == plain.images[0].sha256


def test_every_name_is_tested() -> None:
    """A name added to the tables needs a picture here."""
    assert DIFFUSION.keys() == SDXL.keys()
    assert SCHEDULES.keys() == SHAPES.keys()
