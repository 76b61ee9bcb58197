"""The demo: a loader, two samplers, a dozen pictures through the command `headwater`, and what it all cost.

Everything it starts or makes is gone when it ends, however it ends; only the pictures stay.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from children import ChildError, Children
from costs import arena_bytes, mapping_of, megabytes, read_bytes
from gallery import Exhibit, contact_sheet
from grpc_health.v1 import health_pb2, health_pb2_grpc
from signals import StopFlag, StoppedError

ROOT = Path(__file__).resolve().parents[2]
MODEL = "demo"
SAMPLERS = ("a", "b")
HEALTHY_WITHIN_S = 120.0
PROMPTS = (
    "a red circle left of a small blue square on a white background",
    "a large yellow diamond on a black background",
    "a green triangle above a white ring on a purple background",
    "a small pink cross in the top right corner on a blue background",
    "a purple diamond and a yellow cross on a white background",
    "a huge white circle on a red background",
    "a black ring below a red triangle on a yellow background",
    "a blue square in the bottom left corner on a green background",
    "a yellow ring right of a large pink triangle on a black background",
    "a tiny red cross on a white background",
    "a big green square on a pink background",
    "a white square left of a black circle on a blue background",
)


@dataclass(frozen=True, slots=True)
class Stage:
    """Where everything lives while the demo runs."""

    folder: Path  # in shared memory: sockets, arenas, pictures, logs

    @property
    def arenas(self) -> Path:
        return self.folder / "arenas"

    def address(self, name: str) -> str:
        return f"unix:{self.folder / name}.sock"


def run(stop: StopFlag, arguments: list[str] | None = None) -> int:
    """Run the demo and return its exit code."""
    args = parse(arguments)
    try:
        with stage() as place, Children(place.folder, stop, threads=cores() // len(SAMPLERS) or 1) as children:
            show(place, children, stop, args)
    except StoppedError:
        print("\ndemo: stopped; nothing was left behind", file=sys.stderr)
        return 130
    except (ChildError, grpc.RpcError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 130 if stop.count else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make demo", description="Draw a gallery with a loader and two samplers.")
    parser.add_argument("--model-folder", type=Path, help="a diffusers folder (default: models/demo)")
    parser.add_argument("--pictures", type=int, default=len(PROMPTS), metavar="N", help="how many (default: all)")
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "demo.png", metavar="FILE")
    return parser.parse_args(arguments)


def show(place: Stage, children: Children, stop: StopFlag, args: argparse.Namespace) -> None:
    """The demo itself. Raises StoppedError, ChildError."""
    began = time.monotonic()
    services = start_services(place, children, models_file(place, args.model_folder))
    wait_until_healthy(place, children, stop)
    healthy = time.monotonic()
    print(f"demo: healthy after {healthy - began:.1f} s: a loader and samplers {' and '.join(SAMPLERS)}", flush=True)
    exhibits = draw(place, children, PROMPTS[: args.pictures])
    drawn = time.monotonic()

    args.output.parent.mkdir(parents=True, exist_ok=True)
    title = f"Headwater: {len(exhibits)} pictures, {len(SAMPLERS)} samplers, one copy of the weights"
    sheet = contact_sheet(exhibits, title)
    half_done = place.folder / "sheet.png"
    sheet.save(half_done)
    shutil.copyfile(half_done, args.output)

    size = arena_bytes(place.arenas)
    mapped = {name: mapping_of(process.pid, place.arenas) for name, process in services.items()}
    print("\nWhat it cost")
    cost("read from disk", f"{megabytes(read_bytes(place.address('loader'), MODEL))}, once, by the loader")
    cost("shared memory", f"{megabytes(size)} of arenas")
    for name, mapping in mapped.items():
        line = f"{megabytes(mapping.resident_bytes)} of them in its memory map"
        cost(f"  {name}", f"{line}, {megabytes(mapping.private_bytes)} copied")
    everybody = sum(mapping.proportional_bytes for mapping in mapped.values())
    cost("  all together", f"{megabytes(everybody)}, each shared page counted once (PSS)")
    cost("pictures", f"{len(exhibits)} in {drawn - healthy:.1f} s, two at a time, the first two on a cold model")
    cost("seconds in all", f"{time.monotonic() - began:.1f}")
    print(f"\n{os.path.relpath(args.output)}", flush=True)


def start_services(place: Stage, children: Children, models: Path) -> dict[str, subprocess.Popen[bytes]]:
    """A loader and the samplers, by name."""
    common = ("--arena-dir", str(place.arenas), "--grace", "2")
    loader = ("headwater-loader", "--models", str(models), "--listen", place.address("loader"), *common)
    services = {"loader": children.start("loader", *loader)}
    for name in SAMPLERS:
        sampler = ("headwater-sampler", "--loader", place.address("loader"), "--listen", place.address(name))
        services[f"sampler {name}"] = children.start(
            f"sampler-{name}", *sampler, "--device", "cpu", "--name", name, *common
        )
    return services


def wait_until_healthy(place: Stage, children: Children, stop: StopFlag) -> None:
    """Until every sampler says so, which it does when the loader answers it. Raises StoppedError, ChildError."""
    deadline = time.monotonic() + HEALTHY_WITHIN_S
    while not all(is_healthy(place.address(name)) for name in SAMPLERS):
        children.check_alive()
        if time.monotonic() > deadline:
            raise ChildError(f"the samplers are not healthy after {HEALTHY_WITHIN_S:.0f} s")
        stop.tick()


def is_healthy(address: str) -> bool:
    if not Path(address.removeprefix("unix:")).exists():
        return False
    request = health_pb2.HealthCheckRequest(service="headwater.sampler.v1.SamplerService")
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=0.5)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def draw(place: Stage, children: Children, prompts: tuple[str, ...]) -> list[Exhibit]:
    """All pictures, one on each sampler at a time."""
    exhibits: list[Exhibit] = []
    for first in range(0, len(prompts), len(SAMPLERS)):
        calls = []
        for index, name in enumerate(SAMPLERS[: len(prompts) - first], start=first):
            file = place.folder / f"{index}.png"
            command = ("headwater", "generate", prompts[index], "-o", str(file), "--seed", str(index), "--json")
            call = children.start(f"generate-{index}", *command, "--address", place.address(name), "--timeout", "120")
            calls.append((index, name, file, call))
        for index, name, file, call in calls:
            children.finish(call)
            seconds = json.loads(children.log(f"generate-{index}").read_text())["run_time_s"]
            print(f"  {index + 1:2} of {len(prompts)}  sampler {name}  {seconds:4.1f} s  {prompts[index]}", flush=True)
            exhibits.append(Exhibit(prompts[index], file, f"seed {index}, sampler {name}, {seconds:.1f} s"))
    return exhibits


@contextmanager
def stage() -> Iterator[Stage]:
    """A private folder in shared memory, gone afterwards with all that is in it."""
    folder = Path(tempfile.mkdtemp(prefix=f"headwater-demo-{os.getpid()}-", dir="/dev/shm"))
    try:
        yield Stage(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def models_file(place: Stage, folder: Path | None) -> Path:
    """The repository's models.toml, or one made for another folder. Raises FileNotFoundError."""
    index = (folder or ROOT / "models" / MODEL) / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(f"{index} is missing: a diffusers folder has one")
    if folder is None:
        return ROOT / "models.toml"
    file = place.folder / "models.toml"
    file.write_text(f"[models.{MODEL}]\nfolder = {json.dumps(str(folder.absolute()))}\n")
    return file


def cost(what: str, how_much: str) -> None:
    print(f"  {what:<18} {how_much}")


def cores() -> int:
    return len(os.sched_getaffinity(0))
