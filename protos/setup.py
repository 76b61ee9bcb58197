"""Builds the stubs into the wheel, so that they are never committed and never stale."""

import shutil
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).resolve().parent))

from generate import generate


class StubsOnly(Distribution):
    """Has modules although no source folder does: without, setuptools would neither build nor install anything."""

    def has_pure_modules(self) -> bool:
        return True


class BuildStubs(build_py):
    """Generates stubs straight into the build folder."""

    def run(self) -> None:
        shutil.rmtree(Path(self.build_lib, "headwater"), ignore_errors=True)  # of protos that are gone
        generate(Path(self.build_lib))


setup(distclass=StubsOnly, cmdclass={"build_py": BuildStubs}, packages=[], py_modules=[])
