"""One denoise step of Z-Image's transformer as bf16, Q8_0 and Q4_K, nothing resident: fewer bytes, shorter steps?

    python bench/packed.py
    python bench/packed.py --size 1024 688

Denoisers with random weights, written to a temporary folder (23 GB), each alone on the engine in this process, for one
rider and two. `of the bus` is the least time that the step's bytes take from pinned memory; `equals resident` compares
outputs bit for bit with those of the same file when all of it stays on the device.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from bench import checkpoint
from bench.common import Figures, copy_rate, note, pick_device, quiet_libraries, report, table
from bench.riding import UNLIMITED, Call, attached_to, new_ring, ride, step_bytes
from bench.shapes import MODELS
from tests.sampler.inprocess import prepared
from tests.stack import Stack, running

FORMS = ("bf16", *checkpoint.PACKED_FORMS)
GOALS = {"q8_0": 0.60, "q4_k": 0.40}  # of bf16's step


def write_model(form: str, folder: Path, tiny: bool) -> Path:
    """A folder of tiny shapes but for its denoiser, which is packed as `form`."""
    list(checkpoint.write("z-image", folder, tiny=True))
    target = folder / "transformer"
    shutil.rmtree(target)
    target.mkdir()
    recipe = MODELS["z-image"](tiny)
    module = recipe.modules["transformer"]
    module.save_config(target)
    tensors, device = checkpoint.tensors_of(module), pick_device()
    if form == "bf16":
        shard = checkpoint.plan_shard(target / "diffusion_pytorch_model.safetensors", tensors, recipe.dtype)
        checkpoint.write_shard(shard, tensors, recipe.dtype, device)
    else:
        packed = checkpoint.PACKED_FORMS[form]
        checkpoint.write_gguf(target / "model.gguf", recipe.architecture, tensors, device, packed)
    return folder


def rows_of(
    stack: Stack, form: str, options: argparse.Namespace, device: torch.device, rate: float
) -> Iterator[Figures]:
    """A row for one rider and one for two."""
    with attached_to(stack, form, new_ring(device, None), options.tiny) as model:
        transformer = model.pipeline.transformer
        calls = [Call.of(seed, options.size, transformer, device) for seed in (1, 2)]
        streamed = [ride(model, calls[:riders], options.steps) for riders in (1, 2)]
        bytes_ = step_bytes(model)
    with attached_to(stack, form, new_ring(device, UNLIMITED), options.tiny) as model:
        resident = [ride(model, calls[:riders], options.steps) for riders in (1, 2)]
    for riders, (there, here) in enumerate(zip(streamed, resident, strict=True), 1):
        yield {
            "form": form,
            "riders": riders,
            "step_ms": there.step_ms,
            "resident_ms": here.step_ms,
            "step_bytes": bytes_,
            "of_the_bus": there.step_ms / (bytes_ / rate * 1e3),
            "equals_resident": there.equals([outputs[0] for outputs in here.outputs]),
        }


def ratios(rows: list[Figures]) -> Figures:
    """Steps of one rider against bf16's."""
    steps = {str(row["form"]): float(str(row["step_ms"])) for row in rows if row["riders"] == 1}
    return {f"{form}_to_bf16": steps[form] / steps["bf16"] for form in GOALS if form in steps and "bf16" in steps}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--size", type=int, nargs=2, default=(512, 512), metavar="PX")
    parser.add_argument("--steps", type=int, default=9, help="at least 4")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the code")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.size, options.steps = (64, 48), 4
    quiet_libraries()
    device = pick_device()
    rate = copy_rate(device, 1 << 20 if options.tiny else 1 << 30)
    rows: list[Figures] = []
    for form in options.forms:
        with tempfile.TemporaryDirectory() as disk:
            folder = write_model(form, Path(disk) / form, options.tiny)
            with running(Path(disk), {form: folder}) as stack:
                stack.loader("--eager-load", extent_bytes="64KiB" if options.tiny else "64MiB")
                prepared(stack, form)
                for row in rows_of(stack, form, options, device, rate):
                    note("packed", row)
                    rows.append(row)
    table(f"one step at {options.size[0]}x{options.size[1]}", list(rows[0]), [list(row.values()) for row in rows])
    found = ratios(rows)
    table(
        "of bf16's step", ("", "", "goal"), [(key, value, GOALS[key.split("_to_")[0]]) for key, value in found.items()]
    )
    report("packed", device, {"size_px": list(options.size), "copy_rate_gb_s": rate / 1e9, "rows": rows, **found})


if __name__ == "__main__":
    main()
