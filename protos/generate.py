"""Writes the Python stubs of this folder's protos: `python generate.py OUT`.

Stubs land under OUT/headwater/..., typed, and are never edited. grpcio-tools stays at 1.81: what it writes loads on
protobuf 6.33 and on protobuf 7.
"""

import os
import shutil
import sys
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

PROTOS = Path(__file__).resolve().parent


def generate(out: Path) -> None:
    """Write stubs of every proto into `out`; raises RuntimeError if protoc refuses one."""
    out.mkdir(parents=True, exist_ok=True)
    sources = [str(path.relative_to(PROTOS)) for path in sorted(PROTOS.glob("headwater/**/*.proto"))]
    includes = [f"-I{PROTOS}", f"-I{files('grpc_tools') / '_proto'}"]
    plugins = [f"--plugin={name}={_program(name)}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")]
    outputs = [f"--{kind}_out={out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    if protoc.main(["protoc", *includes, *plugins, *outputs, *sources]):
        raise RuntimeError("protoc failed, see above")
    for package in {(out / source).parent for source in sources}:
        (package / "py.typed").touch()


def _program(name: str) -> str:
    """A plugin of this environment, activated or not."""
    folders = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if not (found := shutil.which(name, path=folders)):
        raise RuntimeError(f"{name} is missing: install mypy-protobuf")
    return found


if __name__ == "__main__":
    generate(Path(sys.argv[1]))
