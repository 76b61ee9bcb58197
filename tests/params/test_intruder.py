"""Processes that would change an arena, or touch what is not there yet."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash

from services.errors import BadArena
from services.params.arena import attach
from services.params.owned_arena import OwnedArena
from tests.loader.support import needs_mount
from tests.params.test_arena import GENERATION, fill, make_header
from tests.stack import ROOT

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to become another user")


@pytest.fixture
def owned(memory: Path) -> Iterator[OwnedArena]:
    arena = OwnedArena.create(memory / "t.arena", make_header())
    arena.reserve()
    for extent in range(len(arena.header.layout.extents)):
        fill(arena, extent)
    yield arena
    arena.close()


def digest(arena: OwnedArena) -> str:
    return xxhash.xxh3_128_hexdigest(arena.path.read_bytes())


def intrude(*arguments: str | int, prefix: tuple[str, ...] = (), **options: object) -> dict[str, str]:
    """What the kernel answered to each attempt."""
    command = [*prefix, sys.executable, "-m", "tests.params.intruder", *map(str, arguments)]
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT}/gen", "PATH": os.environ["PATH"]}
    run = subprocess.run(command, capture_output=True, check=False, cwd=ROOT, env=environment, **options)  # type: ignore[call-overload]
    assert run.stdout, run.stderr
    answers: dict[str, str] = json.loads(run.stdout)
    return answers


@as_root
def test_another_user_changes_nothing_with_a_descriptor_for_reading(owned: OwnedArena) -> None:
    """Neither by name nor through the descriptor, which no way leads from to one for writing."""
    before = digest(owned)
    fd = os.open(owned.path, os.O_RDONLY)
    try:
        answers = intrude(owned.path, NOBODY, fd, pass_fds=(fd,))
    finally:
        os.close(fd)

    assert len(answers) == 15
    assert set(answers.values()) <= {"EACCES", "EPERM", "EBADF", "EINVAL"}, answers
    assert digest(owned) == before


@as_root
def test_another_user_cannot_attach(owned: OwnedArena) -> None:
    """The folder is for its owner alone; the refusal is ours, in our words."""
    code = f"""
from pathlib import Path
from services.params.arena import attach
from tests.params.intruder import become

become({NOBODY})
attach(Path({str(owned.path)!r}), {GENERATION!r})
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)

    assert "BadArena: an arena that cannot be opened: Permission denied" in run.stderr


@needs_mount
def test_where_the_folder_is_mounted_read_only_not_even_root_changes_it(owned: OwnedArena) -> None:
    """And an arena can be attached all the same: a lease is no write."""
    before = digest(owned)
    folder = owned.path.parent
    mount = f'mount --bind {folder} {folder} && mount -o remount,ro,bind {folder} && exec "$@"'
    inside = ("unshare", "-m", "sh", "-c", mount, "sh")
    attaching = (
        f"import pathlib, services.params.arena as a; a.attach(pathlib.Path({str(owned.path)!r}), {GENERATION!r})"
    )

    answers = intrude(owned.path, prefix=inside)
    attached = subprocess.run([*inside, sys.executable, "-c", attaching], cwd=ROOT, check=False)

    assert set(answers.values()) == {"EROFS"}, answers
    assert attached.returncode == 0
    assert digest(owned) == before


def test_a_reader_that_touches_what_is_not_there_takes_no_memory(memory: Path) -> None:
    """It cannot attach before all is reserved; after that a touched page is zeros and was counted before."""
    arena = OwnedArena.create(memory / "t.arena", make_header(count=40))
    try:
        with pytest.raises(BadArena):
            attach(arena.path, GENERATION)
        arena.reserve()
        blocks = arena.path.stat().st_blocks
        with attach(arena.path, GENERATION) as attached:
            assert not any(attached.is_ready(extent) for extent in range(len(attached.extents)))
            assert not any(attached.data)
            assert arena.path.stat().st_blocks == blocks == arena.file_bytes // 512
    finally:
        arena.close()
