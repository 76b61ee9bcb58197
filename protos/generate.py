"""Writes the Python stubs of this folder's protos: `python generate.py OUT`.

Stubs land under OUT/headwater/..., typed, and are never edited. grpcio-tools stays at 1.81: what it writes loads on
protobuf 6.33 and on protobuf 7.
"""

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
    outputs = [f"--{kind}_out={out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    if protoc.main(["protoc", *includes, *outputs, *sources]):
        raise RuntimeError("protoc failed, see above")
    for package in {(out / source).parent for source in sources}:
        (package / "py.typed").touch()


if __name__ == "__main__":
    generate(Path(sys.argv[1]))
