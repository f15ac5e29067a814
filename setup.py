"""What `setup.cfg` cannot say: a wheel carries the configs, the scripts for Slurm and the pins in
``launch/share``, where ``launch/share.py`` looks for them. In a checkout they lie where one edits
them.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent


class BuildWithShare(build_py):
    """Build the packages, and beside them what is no Python."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        share = Path(self.build_lib) / "launch" / "share"
        shutil.rmtree(share, ignore_errors=True)
        for folder in ("configs", "slurm"):
            without = shutil.ignore_patterns("__pycache__")
            shutil.copytree(HERE / folder, share / folder, ignore=without)
        shutil.copy(HERE / "constraints.txt", share)


setup(cmdclass={"build_py": BuildWithShare})
