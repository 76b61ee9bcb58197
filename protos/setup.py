"""Builds the stubs into the wheel, so that they are never committed and never stale."""

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).resolve().parent))

from generate import generate


class BuildStubs(build_py):
    """Generates stubs straight into the build folder."""

    def run(self) -> None:
        super().run()
        generate(Path(self.build_lib))


setup(cmdclass={"build_py": BuildStubs}, packages=[], py_modules=[])
