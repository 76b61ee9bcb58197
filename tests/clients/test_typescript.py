"""The TypeScript program does what every client does."""

import json
import shutil
import subprocess
from collections.abc import Callable
from typing import NoReturn

import pytest

from tests.clients.behaviour import ClientBehaviour
from tests.clients.scripted_sampler import ROOT

pytestmark = pytest.mark.clients

FOLDER = ROOT / "clients" / "typescript"


@pytest.fixture(scope="module")
def program(without_toolchain: Callable[[str], NoReturn]) -> list[str]:
    """The command, freshly built."""
    missing = [tool for tool in ("node", "npm", "protoc") if shutil.which(tool) is None]
    if not (FOLDER / "node_modules").is_dir():
        missing.append("node_modules")
    if missing:
        without_toolchain(f"missing: {', '.join(missing)}; run scripts/install-client-toolchains.sh")
    build = subprocess.run(["npm", "run", "build"], cwd=FOLDER, capture_output=True, text=True, check=False)
    assert build.returncode == 0, build.stdout + build.stderr
    return ["node", str(FOLDER / "dist" / "main.js")]


class TestTypeScript(ClientBehaviour):
    """clients/typescript."""


def test_lock_file_names_no_host() -> None:
    """The lock file pins versions and digests; where they come from is the user's configuration."""
    lock = json.loads((FOLDER / "package-lock.json").read_text())

    assert not [name for name, package in lock["packages"].items() if "resolved" in package]
