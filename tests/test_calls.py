"""Calls that nobody may make, or one place only, read from the source with `ast`."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.test_imports import MODULES, of, package, roots

# What shortens a file or takes pages out of it.
SHORTENING = {"truncate", "ftruncate", "fallocate", "MADV_REMOVE", "MADV_FREE", "write_bytes", "write_text"}
# (module, function) that may: it makes a new file as long as it will be, before anybody can attach it.
MAY_SHORTEN = {
    ("services.params.owned_arena", "create"),
    ("services.loader.preflight", "check_nodes"),
    ("services.loader.arenas", "_write"),
}
# (module, function) that may take a name away: under the lock that says that nobody maps it, or nobody could yet.
MAY_UNLINK = {
    ("services.params.arena", "discard"),
    ("services.params.owned_arena", "create"),
    ("services.params.owned_arena", "unlink"),
}
# Who is forked holds the loader's locks after its death.
FORKING = {"fork", "forkpty", "vfork", "system", "popen", "posix_spawn", "posix_spawnp", "Popen"}


def named(name: str, words: set[str]) -> Iterator[tuple[str, str]]:
    """(function, word) wherever a module names one of `words`, as an attribute or alone."""

    def visit(node: ast.AST, function: str) -> Iterator[tuple[str, str]]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        word = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        if word in words:
            yield function, word
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function)

    yield from visit(MODULES[name], "")


@pytest.mark.parametrize("name", [name for name in MODULES if package(name)])
def test_no_file_is_shortened(name: str) -> None:
    """Whoever maps it would die of a SIGBUS, or read zeros."""
    allowed = {function for module, function in MAY_SHORTEN if module == name}

    assert [found for found in named(name, SHORTENING) if found[0] not in allowed] == []


@pytest.mark.parametrize("name", of("params"))
def test_names_of_arenas_are_taken_away_in_few_places(name: str) -> None:
    """All of them look at the lock before."""
    allowed = {function for module, function in MAY_UNLINK if module == name}

    assert [found for found in named(name, {"unlink", "remove"}) if found[0] not in allowed] == []


@pytest.mark.parametrize("name", of("params", "rpc", "loader"))
def test_a_loader_starts_no_process(name: str) -> None:
    """A child would have its descriptors, and with them its locks, when it is dead."""
    assert list(named(name, FORKING)) == []
    assert not roots(name) & {"subprocess", "multiprocessing", "pty"}
