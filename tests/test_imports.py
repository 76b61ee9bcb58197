"""Who may import whom, read from the source with `ast`, also inside functions."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.loader.support import environment

ROOT = Path(__file__).resolve().parents[1]
SERVICES = ROOT / "services"

GRPC = {"grpc", "grpc_health", "grpc_reflection", "grpc_status", "headwater", "google"}
TORCH = {"torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "gguf"}

# The only module of the loader that may import numpy and gguf.
PACKER = "services.loader.packing"
# server.py is the part of the sampler's __main__ that is imported late.
EDGE = {"service", "server", "__main__"}

# package of services -> packages of services it may import
MAY_IMPORT = {
    "errors": set[str](),
    "params": {"params", "errors"},
    "rpc": {"rpc", "errors"},
    "loader": {"loader", "params", "rpc", "errors"},
    "sampler": {"sampler", "params", "rpc", "errors"},
}


def modules() -> dict[str, ast.Module]:
    """Every module of services, by dotted name."""
    found = {}
    for path in sorted(SERVICES.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(), filename=str(path))
    return found


MODULES = modules()


def imports(name: str) -> Iterator[str]:
    """Dotted names that a module imports anywhere in it, relative ones resolved."""
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} uses a relative import"
            assert node.module
            inside = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (full if full in MODULES else node.module for full in inside)


def package(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def roots(name: str) -> set[str]:
    return {imported.split(".")[0] for imported in imports(name)}


def of(*packages: str) -> list[str]:
    return [name for name in MODULES if package(name) in packages]


@pytest.mark.parametrize("name", [name for name in MODULES if package(name)])
def test_packages_import_downwards(name: str) -> None:
    """Loader and sampler never import each other; params and rpc know neither."""
    used = {package(imported) for imported in imports(name) if imported.startswith("services.")}

    assert used <= MAY_IMPORT[package(name)], f"{name} imports {used}"


@pytest.mark.parametrize("name", of("errors", "params"))
def test_params_and_errors_know_neither_grpc_nor_torch(name: str) -> None:
    assert not roots(name) & (GRPC | TORCH)


@pytest.mark.parametrize("name", of("rpc", "loader"))
def test_the_loader_imports_no_torch(name: str) -> None:
    """It starts in a third of a second; numpy and gguf are for the one module that packs."""
    assert not roots(name) & (TORCH - ({"numpy", "gguf"} if name == PACKER else set()))


def test_a_loader_that_packs_nothing_does_without_numpy() -> None:
    """The module that packs is imported when the first tensor is to be packed."""
    late = f"import sys, services.loader.__main__; sys.exit({PACKER!r} in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", late], env=environment(), check=False).returncode == 0


@pytest.mark.parametrize("name", of("loader", "sampler"))
def test_only_the_edge_knows_grpc(name: str) -> None:
    """What serves speaks the protocol, nothing behind it does; LoaderClient hides the loader's."""
    if name.split(".")[-1] not in EDGE:
        assert not roots(name) & (GRPC - {"google"}), f"{name} imports grpc or stubs"


def test_no_pickle_anywhere() -> None:
    """Nothing that can run code from a file or a socket."""
    for name in MODULES:
        assert not roots(name) & {"pickle", "marshal", "shelve", "dill", "multiprocessing"}, name


def test_there_are_no_cycles() -> None:
    """Every module can be read before those that import it."""
    edges = {name: {other for other in imports(name) if other in MODULES and other != name} for name in MODULES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for other in edges[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())
